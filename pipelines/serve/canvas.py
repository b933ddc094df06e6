"""The part of the page where a support photo is marked, by mouse, finger or keyboard."""

from collections.abc import Callable

from nicegui import ui

from pipelines.serve.annotating import Mark, Session, Tool, corners

TOOLS: dict[Tool, str] = {"inside": "Inside", "outside": "Outside", "box": "Box", "brush": "Brush", "eraser": "Eraser"}
OTHER: dict[Tool, Tool] = {"inside": "outside", "brush": "eraser"}  # with Shift or the right button
ARROWS = {"ArrowLeft": (-1, 0), "ArrowRight": (1, 0), "ArrowUp": (0, -1), "ArrowDown": (0, 1)}
STEP = 0.02  # of the photo's longer side, that an arrow key moves the cursor
MOST_MARKS, MOST_CORNERS = 500, 5000  # of a photo, of a stroke
POINTER_EVENTS = ["pointerdown", "pointermove", "pointerup", "pointerleave", "pointercancel"]
# Moves without a button pressed are of no use, and each would be a message.
ONLY_DRAGS = "(e) => { if (e.mouse_event_type !== 'pointermove' || e.buttons) emit(e) }"
ONLY_KEYS = """(e) => {
    if (!['ArrowLeft', 'ArrowRight', 'ArrowUp', 'ArrowDown', 'Enter', ' '].includes(e.key)) return;
    e.preventDefault(); e.stopPropagation(); emit({key: e.key, shift: e.shiftKey});
}"""


class Canvas:
    """Draws the session's photo with its marks, and adds marks; `tell` is for what cannot be done."""

    def __init__(self, session: Session, tell: Callable[[str], None]):
        self._session, self._tell = session, tell
        self.tool: Tool = "inside"
        self.brush = 6.0  # percent of the photo's longer side
        self._path: list[tuple[float, float]] = []  # of the action under way
        self._tool_under_way: Tool = "inside"
        self._cursor: tuple[float, float] | None = None
        self.image = ui.interactive_image(events=POINTER_EVENTS, sanitize=False).classes("canvas w-full rounded")
        self.image.props(
            'tabindex=0 role=application aria-label="Support photo. Arrow keys move a cursor, Enter uses the tool '
            'there, Shift with Enter outside for inside and eraser for brush."'
        )
        self.image.on("mouse", self._pointer, js_handler=ONLY_DRAGS)
        self.image.on("contextmenu", js_handler="(e) => e.preventDefault()")
        self.image.on("keydown", self._key, js_handler=ONLY_KEYS)
        self.show()

    def show(self) -> None:
        """Another photo, or the same anew."""
        self._path, self._cursor = [], None
        photo = self._session.photo
        self.image.set_visibility(photo is not None)
        if photo is not None:
            self.image.set_source(photo.preview)
            self.draw()

    def draw(self) -> None:
        """The marks, and the one under way."""
        if photo := self._session.photo:
            self.image.set_content(photo.drawing(self._session.classes, self._under_way(), self._cursor))

    def undo(self) -> None:
        """The last action on this photo."""
        if (photo := self._session.photo) and photo.marks:
            photo.marks.pop()
            self.draw()

    def clear(self) -> None:
        """All actions on this photo."""
        if (photo := self._session.photo) and photo.marks:
            photo.marks.clear()
            self.draw()

    def _under_way(self) -> Mark | None:
        if not self._path:
            return None
        path = corners(self._path) if self._tool_under_way == "box" else tuple(self._path)
        return Mark(self._tool_under_way, self._session.chosen, path, self._width())

    def _width(self) -> float:
        return max(1.0, self.brush / 100 * max(self._session.photo.size))

    def _pointer(self, event) -> None:
        photo, what = self._session.photo, event.args
        if photo is None:
            return
        kind = what["mouse_event_type"]
        at = (what["image_x"] * photo.reduction, what["image_y"] * photo.reduction)
        if kind == "pointerdown" and what["button"] in (0, 2):
            self._begin(at, what["shiftKey"] or what["button"] == 2)
        elif self._path and kind == "pointercancel":
            self._path = []
            self.draw()
        elif self._path:
            if len(self._path) < MOST_CORNERS or self._tool_under_way == "box":
                self._path[1 if self._tool_under_way == "box" else len(self._path) :] = [at]
            self.draw()
            if kind != "pointermove":
                self._end()

    def _begin(self, at: tuple[float, float], other: bool) -> None:
        if self._session.chosen is None:
            self._tell("Add a class first: marks say where it is.")
            return
        if len(self._session.photo.marks) >= MOST_MARKS:
            self._tell(f"There are {MOST_MARKS} marks on this photo, the most that are kept.")
            return
        self._tool_under_way = OTHER.get(self.tool, self.tool) if other else self.tool
        self._path = [at]
        if self._tool_under_way in ("inside", "outside"):
            self._end()
        else:
            self.draw()

    def _end(self) -> None:
        path, self._path = self._path, []
        self._session.photo.add(self._tool_under_way, self._session.chosen, path, self._width())
        self.draw()

    def _key(self, event) -> None:
        photo, key = self._session.photo, event.args["key"]
        if photo is None:
            return
        height, width = photo.size
        x, y = self._cursor or (width / 2, height / 2)
        if key in ARROWS:
            step, (dx, dy) = STEP * max(height, width), ARROWS[key]
            self._cursor = min(max(x + step * dx, 0), width), min(max(y + step * dy, 0), height)
            self.draw()
        elif self._path:  # Enter again, at the box's other corner or the stroke's end
            self._path.append((x, y))
            self._end()
        else:
            self._cursor = x, y
            self._begin((x, y), event.args["shift"])
