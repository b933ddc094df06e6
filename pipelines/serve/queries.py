"""The photos to segment on the page, and what was found on them."""

import asyncio
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
from nicegui import ui
from PIL import Image

from pipelines.serve.jobs import PREVIEW, ClassSet, Jobs, Preview, Upload
from pipelines.serve.queue import Timed
from pipelines.serve.result_files import Colour, coco_document, png, template
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
    result: QueryResult | None = None


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
            query.result = None
        for query in list(self._queries):
            done = await self._service.queue.run(Jobs.segment, class_set, query.upload)
            query.result = await asyncio.to_thread(_result_of, class_set, done, colours)
            self.draw.refresh()
            moved = (await self._service.queue.run(Jobs.moved, class_set, done.value)).value
            query.result = query.result._replace(moved=moved)
            self.draw.refresh()

    async def download(self) -> None:
        """Hand out all that was found as one COCO document."""
        done = [(query.upload.name, query.result) for query in self._queries if query.result]
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
                ui.html(_markup(query), sanitize=False).classes("w-full")
                if query.result:
                    file = f"{query.upload.name}.mask.png"
                    button = download_button("PNG", partial(ui.download.content, query.result.png, file))
                    button.props["aria-label"] = f"Download the mask of {query.upload.name} as PNG"


def _markup(query: Query) -> str:
    legend, moved = [], []
    if result := query.result:
        supports = result.class_set.supports
        legend = list(zip(supports.classes, result.colours, result.scores, strict=True))
        moved = [(support.name, share) for support, share in zip(supports.supports, result.moved or (), strict=False)]
    return template("query.html").render(query=query, result=result, legend=legend, moved=moved)


def _result_of(class_set: ClassSet, done: Timed, colours: tuple[Colour, ...]) -> QueryResult:
    mask, scores, _ = done.value
    step = -(-max(mask.shape) // PREVIEW)  # what is laid over the preview need not be larger than that
    overlay = data_url(png(mask[::step, ::step], colours, clear_background=True), "png")
    scores = tuple(map(float, scores))
    return QueryResult(class_set, colours, scores, png(mask, colours), overlay, done.seconds, done.queue_seconds, None)


def _coco_of(done: Sequence[tuple[str, QueryResult]]) -> str:
    photos = ((name, np.asarray(Image.open(io.BytesIO(result.png))), result.scores) for name, result in done)
    return json.dumps(coco_document(photos, done[0][1].class_set.supports.classes))
