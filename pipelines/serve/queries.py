"""The photos to segment on the page, and what was found on them."""

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from html import escape
from typing import NamedTuple

import numpy as np
from nicegui import ui
from PIL import Image

from pipelines.serve.jobs import PREVIEW, ClassSet, Jobs, Preview, Upload
from pipelines.serve.queue import Timed
from pipelines.serve.result_files import Colour, coco_document, png
from pipelines.serve.service import Service
from pipelines.serve.widgets import data_url, download_button, warn


class QueryResult(NamedTuple):
    """Of a segmented photo all that is shown and handed out; its mask is kept as PNG, which is far smaller."""

    class_set: ClassSet
    colours: tuple[Colour, ...]
    scores: tuple[float, ...]
    png: bytes
    overlay: str  # data URL
    seconds: float
    queue_seconds: float
    moved: list[float] | None  # share of each support; None where it is not known (yet)


@dataclass
class Query:
    """A photo to segment, and what was found on it."""

    upload: Upload
    preview: str
    shown: QueryResult | None = None


class Queries:
    """The queries of one open page."""

    def __init__(self, service: Service):
        self._service = service
        self._queries: list[Query] = []
        self.draw = ui.refreshable(self._draw)  # of this page alone: `refreshable_method` would keep every page

    def __len__(self) -> int:
        return len(self._queries)

    def add(self, upload: Upload, preview: Preview) -> None:
        """Show one more photo, nothing found on it yet."""
        self._queries.append(Query(upload, data_url(preview.jpeg, "jpeg")))
        self.draw.refresh()

    def clear(self) -> None:
        """Show none."""
        self._queries.clear()
        self.draw.refresh()

    async def segment(self, class_set: ClassSet, colours: tuple[Colour, ...]) -> None:
        """Segment all photos, one after the other; `colours` are of the classes of the set. Raises Refused."""
        for query in self._queries:  # all results are of the same marks
            query.shown = None
        for query in list(self._queries):
            done = await self._service.queue.run(Jobs.segment, class_set, query.upload)
            query.shown = await asyncio.to_thread(_shown, class_set, done, colours)
            self.draw.refresh()
            moved = (await self._service.queue.run(Jobs.moved, class_set, done.value)).value
            query.shown = query.shown._replace(moved=moved)
            self.draw.refresh()

    async def download(self) -> None:
        """Hand out all that was found as one COCO document."""
        done = [(query.upload.name, query.shown) for query in self._queries if query.shown]
        if done:
            ui.download.content(await asyncio.to_thread(_coco_of, done), "masks.json")
        else:
            warn("Nothing is segmented yet.")

    def _draw(self) -> None:
        if not self._queries:
            ui.label("None yet.").classes("text-gray-700")
        for query in self._queries:
            with ui.card().classes("w-full gap-2").props("flat bordered"):
                ui.label(query.upload.name).classes("font-medium break-all")
                mask, alt = "", escape(query.upload.name)
                if query.shown:
                    mask = f'<img class="mask" src="{query.shown.overlay}" alt="Mask of {alt}">'
                image = (
                    f'<div class="stack {"masked" if mask else ""}"><img src="{query.preview}" alt="{alt}">{mask}</div>'
                )
                ui.html(image, sanitize=False).classes("w-full")
                if query.shown:
                    _about(query.upload.name, query.shown)


def _about(name: str, shown: QueryResult) -> None:
    supports = shown.class_set.supports
    scores = zip(supports.classes, shown.colours, shown.scores, strict=True)
    legend = "".join(
        f'<li><span class="swatch" style="background:rgb{colour}"></span> {escape(one)} '
        f"{f'{score:.2f}' if score else '(not found)'}</li>"
        for one, colour, score in scores
    )
    ui.html(f'<ul style="display:flex;flex-wrap:wrap;gap:0 1rem">{legend}</ul>', sanitize=False)
    ui.label(f"{shown.seconds:.2f} s, after {shown.queue_seconds:.2f} s in the queue").classes("text-sm")
    if shown.moved is not None:
        ui.label("Without this support, so much of the result would be different:").classes("text-sm")
        for support, share in zip(supports.supports, shown.moved, strict=True):
            with ui.row().classes("items-center w-full no-wrap gap-2 text-sm"):
                ui.label(support.name).classes("truncate w-32 shrink-0")
                bar = ui.linear_progress(share, show_value=False, size="10px").classes("grow")
                bar.props["aria-label"] = f"{support.name}: {share:.0%}"
                ui.label(f"{share:.0%}").classes("w-10 text-right shrink-0")
    button = download_button("PNG", partial(ui.download.content, shown.png, f"{name}.mask.png"))
    button.props["aria-label"] = f"Download the mask of {name} as PNG"


def _shown(class_set: ClassSet, done: Timed, colours: tuple[Colour, ...]) -> QueryResult:
    mask, scores, _ = done.value
    step = -(-max(mask.shape) // PREVIEW)  # what is laid over the preview need not be larger than that
    overlay = data_url(png(mask[::step, ::step], colours, clear_background=True), "png")
    found = tuple(map(float, scores))
    return QueryResult(class_set, colours, found, png(mask, colours), overlay, done.seconds, done.queue_seconds, None)


def _coco_of(done: Sequence[tuple[str, QueryResult]]) -> str:
    photos = ((name, np.asarray(Image.open(io.BytesIO(shown.png))), shown.scores) for name, shown in done)
    return json.dumps(coco_document(photos, done[0][1].class_set.supports.classes))
