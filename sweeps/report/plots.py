"""Plots of the report as inline SVG."""

import io
import re
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from markupsafe import Markup
from matplotlib.figure import Figure

matplotlib.rcParams["svg.hashsalt"] = "report"  # the same plot is the same bytes
matplotlib.rcParams["svg.fonttype"] = "none"


def svg(figure: Figure) -> Markup:
    """The figure as an <svg> element that scales with the page."""
    text = io.StringIO()
    figure.savefig(text, format="svg", metadata={"Date": None})
    body = text.getvalue()
    body = body[body.index("<svg") :]
    return Markup(re.sub(r'<svg([^>]*?) width="[^"]*"', r"<svg\1", re.sub(r' height="[^"]*pt"', "", body, count=1)))


def lines(series: Mapping[str, Sequence[tuple[float, float]]], x: str, y: str) -> Markup:
    """One line a series of (x, y) points."""
    figure = Figure(figsize=(7, 3.6), layout="constrained")
    axes = figure.subplots()
    for name, points in series.items():
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", label=name)
    axes.set(xlabel=x, ylabel=y)
    axes.set_xticks(sorted({point[0] for points in series.values() for point in points}))
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    return svg(figure)


def curves(runs: Mapping[str, Sequence[Mapping]]) -> Markup:
    """Loss and mIoU on seen classes by training step, of each run."""
    figure = Figure(figsize=(7, 3), layout="constrained")
    for axes, key, label in zip(figure.subplots(1, 2), ("loss", "seen_miou"), ("loss", "mIoU, seen, %"), strict=True):
        for name, points in runs.items():
            line = [(p["step"], p[key]) for p in points if p.get(key) is not None]
            if line:
                axes.plot(*zip(*line, strict=True), label=name, linewidth=1, marker=".", markersize=3)
        axes.set(xlabel="step", ylabel=label)
        axes.grid(alpha=0.3)
        if axes.lines and key == "loss":
            axes.legend(fontsize=6)
    return svg(figure)


def bars(methods: Mapping[str, Mapping[str, float]], label: str) -> Markup:
    """IoU of each class, a bar a method; classes by the first method's IoU."""
    first = next(iter(methods.values()))
    names = sorted(first, key=lambda name: first[name])
    figure = Figure(figsize=(7, 1 + 0.13 * len(names) * (len(methods) + 1)), layout="constrained")
    axes = figure.subplots()
    thick = 0.85 / len(methods)
    for number, (method, ious) in enumerate(methods.items()):
        places = np.arange(len(names)) + thick * ((len(methods) - 1) / 2 - number)
        axes.barh(places, [ious.get(name, 0) for name in names], thick, label=method)
    axes.set_yticks(range(len(names)), names, fontsize=7)
    axes.set_xlabel(label)
    axes.legend(fontsize=7, loc="lower right")
    return svg(figure)


def profile(rows: Sequence[Mapping]) -> list[Markup]:
    """Memory and seconds by number of shots, a line for each method with and without the backbone."""
    drawn = []
    for key, label in (("beyond_mb", "peak MB beyond the episode"), ("seconds", "seconds")):
        series: dict[str, list] = {}
        for row in rows:
            if row.get(key) is not None:
                name = row["method"] + (" from photos" if row["backbone"] else "")
                series.setdefault(name, []).append((row["shots"], row[key]))
        drawn.append(lines(series, "shots", label))
    return drawn
