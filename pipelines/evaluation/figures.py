"""Pictures of episodes: supports with prompts, the query, its truth and the prediction (as in figure 4)."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from la.data.coco import IGNORED, decode
from la.data.photos import decode_photo
from la.device import pick_device
from la.episodes.sampling import Episode
from la.errors import InputError
from la.model.decoder import segment
from pipelines.config import EvaluateConfig
from pipelines.episodes.batches import BatchBuilder
from pipelines.episodes.episode_shards import draw, ensure_episodes, evaluation_plan
from pipelines.evaluation.methods import Method, find_method
from pipelines.remote_path import path_or_uri
from pipelines.store.reader import FeatureStore
from pipelines.workspace import Workspace, write_whole

COLOURS = matplotlib.colormaps["tab10"].colors  # of classes, by slot
SHADE = 0.55  # opacity of a mask over a photo


def draw_episodes(
    path: Path,
    method: Method,
    title: str,
    builder: BatchBuilder,
    episodes: Sequence[Episode],
    device: torch.device,
    labels: Sequence[str] = (),
) -> Path:
    """Write a picture with one row an episode, `labels` above them; photos that are no longer there are grey."""
    most = max(len(e.supports) for e in episodes)
    figure = Figure(figsize=(2.4 * (most + 3), 2.7 * len(episodes)), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(len(episodes), most + 3, squeeze=False)
    for row, episode in zip(axes, episodes, strict=True):
        for cell in row:
            cell.axis("off")
        _draw_row(row, most, method, builder, episode, device)
    for cell, heading in zip(
        axes[0], ["supports"] + [""] * (most - 1) + ["query", "truth", "" if labels else "prediction"], strict=True
    ):
        cell.set_title(heading)
    for row, label in zip(axes, labels, strict=False):
        row[-1].set_title(label, loc="right", fontsize=8)
    kind = "jpeg" if path.suffix in (".jpg", ".jpeg") else "png"
    write_whole(path, lambda temporary: figure.savefig(temporary, dpi=110, format=kind))
    return path


def draw_first_episodes(path: Path, chosen: Sequence[tuple[EvaluateConfig, int]]) -> Path:
    """Draw the first episode of each (evaluation, seed); all of one method, fold, split and store."""
    config = chosen[0][0]
    store = FeatureStore(Workspace(config.workspace).find_store(config.store))
    device = pick_device(config.device)
    method, name, mask_px = find_method(config, store, device)
    episodes = [next(iter(ensure_episodes(evaluation_plan(one, seed), store))) for one, seed in chosen]
    title = f"{name}: {config.classes} classes of fold {config.fold}, the first episode of each seed"
    return draw_episodes(path, method, title, BatchBuilder(store, config.split, mask_px), episodes, device)


def draw_extremes(
    config: EvaluateConfig,
    method: Method,
    name: str,
    builder: BatchBuilder,
    device: torch.device,
    extremes: Mapping[str, Sequence[tuple[int, int, float]]],
) -> Path:
    """Draw the episodes (seed, index, IoU) under their names into `config.gallery`, best first."""
    chosen = [(kind, *one) for kind, found in extremes.items() for one in found]
    episodes = [draw(evaluation_plan(config, seed), builder.store, 0, at, at + 1)[0] for _, seed, at, _ in chosen]
    labels = [f"prediction: {kind}, IoU {iou:.0f} %" for kind, _, _, iou in chosen]
    title = f"{name}: {config.classes} classes of fold {config.fold}, best, median and worst episodes"
    return draw_episodes(config.gallery, method, title, builder, episodes, device, labels)


@torch.inference_mode()
def _draw_row(row: Sequence[Axes], most: int, method: Method, builder: BatchBuilder, episode: Episode, device) -> None:
    for position, image_id in enumerate(episode.supports):
        _draw_support(row[position], builder, episode, position, image_id)
    photo = _photo(builder, episode.query)
    truth = builder.full_truth(episode)
    logits = method(builder.pack([episode]).to(device)).float()
    predicted = segment(logits[0], truth.shape).cpu()
    for cell, labels in zip(row[most:], (None, truth.numpy(), predicted.numpy()), strict=True):
        cell.imshow(photo if labels is None else _shaded(photo, labels, always=True))
    names = builder.dataset.categories
    handles = [Patch(color=COLOURS[slot % 10], label=names[c]) for slot, c in enumerate(episode.classes)]
    row[most].legend(handles=handles, loc="lower left", fontsize=7, framealpha=0.8)


def _draw_support(cell: Axes, builder: BatchBuilder, episode: Episode, position: int, image_id: int) -> None:
    photo = _photo(builder, image_id)
    height, width = photo.shape[:2]
    by_id = {a.id: a for a in builder.dataset.annotations[image_id]}
    labels = np.zeros((height, width), np.uint8)
    for pair in (p for p in episode.pairs if p.support == position):
        colour = COLOURS[pair.slot % 10]
        labels[decode([by_id[i] for i in pair.masks], height, width) > 0] = pair.slot + 1
        for x, y, label in pair.points:
            cell.plot(x, y, "o" if label else "x", color=colour, markeredgecolor="white", markersize=5)
        for x0, y0, x1, y1 in pair.boxes:
            cell.add_patch(Rectangle((x0, y0), x1 - x0, y1 - y0, fill=False, edgecolor=colour, linewidth=2))
    cell.imshow(_shaded(photo, labels))


def _photo(builder: BatchBuilder, image_id: int) -> np.ndarray:
    """(H, W, 3) uint8."""
    image = builder.dataset.images[image_id]
    info = builder.store.info
    split = next(s for s in info.splits if image_id in builder.store.dataset(s).images)
    path = path_or_uri(info.coco_dir) / info.splits[split].name / image.file_name
    try:
        return np.asarray(decode_photo(path, (image.height, image.width)))
    except InputError:
        return np.full((image.height, image.width, 3), 128, np.uint8)


def _shaded(photo: np.ndarray, labels: np.ndarray, always: bool = False) -> np.ndarray:
    """The photo in grey, so that the colours of the classes stand out; ignored pixels white."""
    if not (always or labels.any()):
        return photo
    shaded = 0.7 * photo.mean(-1, keepdims=True).repeat(3, -1)
    for slot in np.unique(labels):
        if slot:
            colour = np.ones(3) if slot == IGNORED else np.array(COLOURS[(slot - 1) % 10])
            shaded[labels == slot] = (1 - SHADE) * shaded[labels == slot] + SHADE * 255 * colour
    return shaded.astype(np.uint8)
