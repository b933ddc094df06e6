"""The web page: classes, support photos and their marks, query photos and their masks.

Nothing is loaded from elsewhere. Each open page is a `Page` with a session of its own; what takes the model goes
through the service's queue.
"""

import io
import json
import re
import weakref
from collections.abc import Awaitable, Callable, Iterator, Sized
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from fastapi import FastAPI
from nicegui import events, ui
from PIL import Image

from la.errors import InputError
from la.predictor.predictor import PhotoPrompts
from la.predictor.support_set import Support
from pipelines.demo.drawing import Scene
from pipelines.demo.scenes import CLASS_NAMES, PAIRS, draw_scene
from pipelines.predict.mask_files import shape_of
from pipelines.serve.annotating import AnnotatedPhoto, Session
from pipelines.serve.canvas import TOOLS, Canvas
from pipelines.serve.jobs import ClassSet, Jobs, Preview, Refused, Upload
from pipelines.serve.queries import Queries
from pipelines.serve.service import MB, Service
from pipelines.serve.widgets import data_url, download_button, section, warn

TOOL_KEYS = dict(zip("ioxbe", TOOLS, strict=True))
STYLE = Path(__file__).with_name("page.css")
# Quasar gives the button that opens the file dialogue no name.
NAME_UPLOADS = """document.querySelectorAll('.q-uploader').forEach(
    (u) => u.querySelector('a')?.setAttribute('aria-label', u.getAttribute('aria-label')))"""
# Drawn scenes of which two photos show a class each, by a box and by points, and the third shows both.
EXAMPLE_SEED, EXAMPLE_SIDE, EXAMPLE_SUPPORTS, EXAMPLE_QUERY = 7, 384, (27, 70), 102


def add_page(app: FastAPI, service: Service) -> None:
    """Put the page at / of the application with the API."""
    open_pages: set[str] = set()

    @ui.page("/", title="Label Anything", language="en-US")
    def index() -> None:
        client = ui.context.client
        if len(open_pages) >= service.config.max_pages:
            ui.label("As many people as this service takes are using it. Try again in a while.")
            return
        open_pages.add(client.id)
        client.on_delete(lambda: open_pages.discard(client.id))
        client.on_connect(lambda: client.run_javascript(NAME_UPLOADS))
        Page(service)

    ui.run_with(app, title="Label Anything", show_welcome_message=False, reconnect_timeout=30.0)


class Page:
    """One open page."""

    def __init__(self, service: Service):
        self._service, self._session = service, Session()
        self._queries = Queries(service)
        self._read: list[tuple[AnnotatedPhoto, tuple, Support]] = []  # supports by what they were read from
        self._busy = False
        # Of this page alone: `refreshable_method` would keep every page there ever was.
        self._class_list = ui.refreshable(self._draw_class_list)
        self._thumbnails = ui.refreshable(self._draw_thumbnails)
        ui.add_css(STYLE)
        ui.colors(primary="#1565c0")  # white on it is read well
        with ui.column().classes("w-full max-w-6xl mx-auto p-2 gap-4"):
            self._header()
            with ui.element("main").classes("grid grid-cols-1 lg:grid-cols-2 gap-4 w-full"):
                with ui.column().classes("w-full gap-4 min-w-0"):
                    self._classes_part()
                    self._supports_part()
                with ui.column().classes("w-full gap-4 min-w-0"):
                    self._queries_part()
        ui.keyboard(self._shortcut)

    # What is on the page

    def _header(self) -> None:
        with ui.element("header").classes("w-full"):
            with ui.row().classes("items-center justify-between w-full mb-2"):
                ui.html("<h1>Label Anything</h1>", sanitize=False)
                example = ui.button("Show an example", icon="auto_awesome").props("no-caps")
                example.on_click(partial(self._alone, self._show_example))
            ui.label("Mark what you mean on a photo or two; other photos are segmented alike.")

    def _classes_part(self) -> None:
        with section("1. Classes"):
            with ui.row().classes("items-end w-full gap-2"):
                self._name = ui.input("Name of a class").props("dense maxlength=80").classes("grow")
                self._name.on("keydown.enter", self._add_class)
                self._colour = ui.color_input("Colour", value=self._session.next_colour, preview=True)
                self._colour.props("dense").classes("w-32")
                ui.button("Add class", on_click=self._add_class).props("no-caps")
            self._class_list()

    def _draw_class_list(self) -> None:
        if not self._session.classes:
            ui.label("None yet. Marks are for the class that is chosen here.").classes("text-gray-700")
        with ui.row().classes("gap-2").props('role=group aria-label="Class that marks are for"'):
            for one in self._session.classes:
                chosen = one.number == self._session.chosen
                with ui.element("div").classes("flex items-center no-wrap border rounded"):
                    button = ui.button(one.name, icon="check" if chosen else None, color=None)
                    button.on_click(partial(self._choose, one.number))
                    button.style(f"background:{one.colour};color:{one.text_colour};max-width:15rem")
                    button.props(f"no-caps dense unelevated padding='2px 10px' aria-pressed={str(chosen).lower()}")
                    remove = ui.button(icon="close", color=None, on_click=partial(self._remove_class, one.number))
                    remove.props["aria-label"] = f"Remove class {one.name}"
                    remove.props("flat dense size=sm")

    def _supports_part(self) -> None:
        with section("2. Support photos") as card:
            self._canvas = Canvas(self._session, warn)  # first, as the tools are bound to it
            self._upload("Drop support photos here, or press +", Page._support_came, "Add support photos")
            self._thumbnails()
            with ui.row().classes("items-center gap-2 w-full"):
                self._tool = ui.toggle(TOOLS, value="inside").bind_value_to(self._canvas, "tool")
                self._tool.props('no-caps dense padding="4px 10px" aria-label="Tool"')
                for text, icon, action in (
                    ("Undo", "undo", self._canvas.undo),
                    ("Clear", "delete_sweep", self._canvas.clear),
                    ("Remove photo", "delete", self._remove_photo),
                ):
                    ui.button(icon=icon, on_click=action).props(f'flat dense aria-label="{text}"').tooltip(text)
            with ui.row().classes("items-center w-full no-wrap gap-4"):
                ui.label("Brush").classes("shrink-0")
                size = ui.slider(min=1, max=30, value=6).bind_value_to(self._canvas, "brush")
                size.props('label aria-label="Size of the brush in percent of the photo"')
            self._canvas.image.move(card)
            with ui.row().classes("items-center justify-between w-full"):
                ui.label("Shift or the right button: outside, eraser.").classes("text-sm text-gray-700")
                download_button("Marks as COCO", self._download_supports)

    def _draw_thumbnails(self) -> None:
        with ui.row().classes("gap-2"):
            for at, photo in enumerate(self._session.photos):
                chosen = at == self._session.at
                with ui.button(color=None, on_click=partial(self._choose_photo, at)) as button:
                    ui.html(f'<img src="{photo.preview}" alt="" style="height:3rem">', sanitize=False)
                button.props(f"flat dense padding=2px aria-pressed={str(chosen).lower()}")
                button.props["aria-label"] = f"Mark {photo.upload.name}"
                button.style(f"border:3px solid {'#1565c0' if chosen else 'transparent'}").tooltip(photo.upload.name)

    def _queries_part(self) -> None:
        with section("3. Photos to segment"):
            self._upload("Drop photos to segment here, or press +", Page._query_came, "Add photos to segment")
            with ui.row().classes("items-center w-full gap-2"):
                self._button = ui.button("Segment", icon="play_arrow").props("no-caps")
                self._button.on_click(partial(self._alone, self._segment_all))
                download_button("COCO JSON", self._queries.download)
                ui.button("Remove all", icon="delete", on_click=self._queries.clear).props("flat no-caps dense")
            with ui.row().classes("items-center w-full no-wrap gap-4"):
                ui.label("Opacity").classes("shrink-0")
                opacity = ui.slider(min=0, max=100, value=60).props(
                    'label aria-label="Opacity of the masks in percent"'
                )
                opacity.on(
                    "update:model-value",
                    js_handler="(v) => document.documentElement.style.setProperty('--mask-opacity', v / 100)",
                )
            self._queries.draw()
        with ui.expansion("Keyboard", icon="keyboard").classes("w-full bg-white"):
            ui.label("1 to 9: class. I, O, X, B, E: inside, outside, box, brush, eraser. Z: undo. S: segment.")
            ui.label("On the support photo: arrows move a cursor, Enter uses the tool there (a box: at two corners).")

    def _upload(self, label: str, came: Callable[["Page", Upload], Awaitable[None]], name: str) -> None:
        service, page = self._service, weakref.ref(self)  # FastAPI's caches keep what the routes of uploads call

        async def handle(event: events.UploadEventArguments) -> None:
            if mine := page():
                with ui.context.client, warned():
                    await came(mine, service.receive(event.file.name, await event.file.read(), "photo"))

        config = service.config
        rejected = f"At most {config.max_photos} photos of {config.max_photo_mb} MB are taken; JPEG, PNG, WebP or BMP."
        upload = ui.upload(
            multiple=True,
            auto_upload=True,
            label=label,
            max_file_size=config.max_photo_mb * MB,
            max_files=config.max_photos,
            on_upload=handle,
            on_rejected=partial(warn, rejected),
        )
        upload.props('flat bordered accept=".jpg,.jpeg,.png,.webp,.bmp" color=blue-grey-8')
        upload.props["aria-label"] = name
        upload.on("finish", lambda: upload.run_method("removeUploadedFiles"), args=[])  # it would count them for ever

    # What users do

    async def _support_came(self, upload: Upload) -> None:
        preview = await self._preview(upload, self._session.photos)
        photo = AnnotatedPhoto(upload, preview.size, data_url(preview.jpeg, "jpeg"), preview.reduction)
        self._session.photos.append(photo)
        self._choose_photo(len(self._session.photos) - 1)

    async def _query_came(self, upload: Upload) -> None:
        self._queries.add(upload, await self._preview(upload, self._queries))

    async def _preview(self, upload: Upload, photos: Sized) -> Preview:
        """Raises Refused (413) where there is no room among `photos` for one more."""

        def check_room() -> None:
            most = self._service.config.max_photos
            if len(photos) >= most:
                raise Refused(413, "too_many_photos", "photo", f"There are {most} photos, the most that are taken.")

        check_room()
        preview = (await self._service.queue.run(Jobs.preview, upload)).value
        check_room()  # others may have come meanwhile
        return preview

    def _add_class(self) -> None:
        name, colour = (self._name.value or "").strip(), (self._colour.value or "").strip().lower()
        if not name:
            warn("Give the class a name.")
        elif len(self._session.classes) >= self._service.config.max_classes:
            warn(f"There are {len(self._session.classes)} classes, the most that are taken.")
        elif not re.fullmatch("#[0-9a-f]{6}", colour):
            warn(f"{colour!r:.20} is no colour such as #56b4e9.")
        else:
            self._session.add_class(name, colour)
            self._name.value, self._colour.value = "", self._session.next_colour
            self._changed_classes()

    def _choose(self, number: int) -> None:
        self._session.chosen = number
        self._class_list.refresh()

    def _remove_class(self, number: int) -> None:
        self._session.remove_class(number)
        self._changed_classes()

    def _choose_photo(self, at: int) -> None:
        self._session.at = at
        self._thumbnails.refresh()
        self._canvas.show()

    def _remove_photo(self) -> None:
        if self._session.photo is not None:
            self._session.remove_photo()
            self._thumbnails.refresh()
            self._canvas.show()

    def _changed_classes(self) -> None:
        self._class_list.refresh()
        self._canvas.draw()

    async def _alone(self, do: Callable[[], Awaitable[None]]) -> None:
        """Not while the same is being done: people press buttons twice."""
        if self._busy:
            return
        self._busy = True
        self._button.props("loading")
        try:
            with warned():
                await do()
        finally:
            self._busy = False
            self._button.props(remove="loading")

    async def _segment_all(self) -> None:
        names, marked = self._session.shown()
        if not marked:
            warn("Nothing is marked yet: choose a class, and mark it on a support photo.")
            return
        if not self._queries:
            warn("Add a photo to segment.")
            return
        rgb = {one.name: one.rgb for one in self._session.classes}
        class_set = await self._learn(names, marked)
        await self._queries.segment(class_set, tuple(rgb[name] for name in class_set.supports.classes))

    async def _learn(self, names: list[str], marked: list[tuple[AnnotatedPhoto, PhotoPrompts]]) -> ClassSet:
        """Only supports whose marks are others than last time are read anew."""
        keys = [(tuple(photo.marks), tuple(prompts)) for photo, prompts in marked]
        shown = []
        for key, (photo, prompts) in zip(keys, marked, strict=True):
            known = [support for p, k, support in self._read if p is photo and k == key]
            shown.append(known[0] if known else (photo.upload, prompts))
        class_set: ClassSet = (await self._service.queue.run(Jobs.show, shown, names)).value
        self._read = [(photo, *of) for (photo, _), *of in zip(marked, keys, class_set.supports.supports, strict=True)]
        return class_set

    async def _show_example(self) -> None:
        self._session.clear()
        self._queries.clear()
        scenes = [
            draw_scene(EXAMPLE_SEED, "val2017", n, (EXAMPLE_SIDE,) * 2) for n in (*EXAMPLE_SUPPORTS, EXAMPLE_QUERY)
        ]
        uploads = [_upload_of(scene, f"scene {at}.png") for at, scene in enumerate(scenes, 1)]
        for scene, upload in zip(scenes[:-1], uploads[:-1], strict=True):
            await self._support_came(upload)
            thing = scene.things[0]
            one = self._session.add_class(CLASS_NAMES[PAIRS.index((thing.shape, thing.texture))])
            x, y, width, height = shape_of(scene.instances == 1)["bbox"]
            self._session.photo.add("box", one.number, [(x, y), (x + width, y + height)], 0.0)
        self._colour.value = self._session.next_colour
        await self._query_came(uploads[-1])
        self._changed_classes()
        await self._segment_all()

    def _download_supports(self) -> None:
        if not self._session.shown()[1]:
            warn("Nothing is marked yet.")
            return
        ui.download.content(json.dumps(self._session.support_file()), "support.json")

    async def _shortcut(self, event: events.KeyEventArguments) -> None:
        held = event.modifiers
        if not event.action.keydown or event.action.repeat or held.ctrl or held.alt or held.meta:
            return
        key = event.key.name.lower()
        if key in TOOL_KEYS:
            self._tool.value = TOOL_KEYS[key]
        elif key == "z":
            self._canvas.undo()
        elif key == "s":
            await self._alone(self._segment_all)
        elif key.isdigit() and 0 < int(key) <= len(self._session.classes):
            self._choose(self._session.classes[int(key) - 1].number)


@contextmanager
def warned() -> Iterator[None]:
    """Tell the user of the page of an InputError."""
    try:
        yield
    except InputError as error:
        warn(str(error))


def _upload_of(scene: Scene, name: str) -> Upload:
    file = io.BytesIO()
    Image.fromarray(scene.image).save(file, "PNG")
    return Upload(name, file.getvalue(), "photo")
