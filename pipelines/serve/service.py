"""What the page and the API share: a queue of jobs, the limits, and what users handed in and showed."""

import secrets
import time
import unicodedata
from collections.abc import Callable

from pipelines.config import ServeConfig
from pipelines.serve.jobs import ClassSet, Refused, Upload
from pipelines.serve.queue import JobQueue

MB = 1_000_000  # bytes
NAME_LENGTH = 80  # characters of a file's or a class's name that are kept


class Service:
    """All of it but the model, which is behind `queue`: in this process or in others."""

    def __init__(self, config: ServeConfig, queue: JobQueue):
        self.config, self.queue = config, queue
        self.class_sets = ClassSets(config.max_class_sets, 60 * config.idle_minutes)

    def receive(self, name: str | None, data: bytes, field: str) -> Upload:
        """Raises Refused (413) for too many bytes, before anything looks at them."""
        name, most = clean_name(name), self.config.max_photo_mb
        if len(data) > most * MB:
            message = f"{name} has more than {most} MB, the most that is taken. Scale it down."
            raise Refused(413, "photo_too_large", field, message)
        return Upload(name, data, field)


class ClassSets:
    """Class sets of the HTTP API by an id that nobody guesses. Used from the event loop alone."""

    def __init__(self, most: int, idle_seconds: float, clock: Callable[[], float] = time.monotonic):
        self._most, self._idle_seconds, self._clock = most, idle_seconds, clock
        self._kept: dict[str, tuple[ClassSet, float]] = {}

    def check_room(self) -> None:
        """Raises Refused (429) where there is no room, after forgetting those that nobody used for long."""
        now = self._clock()
        self._kept = {i: (s, used) for i, (s, used) in self._kept.items() if now - used < self._idle_seconds}
        if len(self._kept) >= self._most:
            message = f"there are {self._most} class sets, the most that are kept. Delete one, or try again later."
            raise Refused(429, "too_many_class_sets", None, message)

    def add(self, class_set: ClassSet) -> str:
        """Its id. Raises Refused as `check_room`."""
        self.check_room()
        number = secrets.token_urlsafe(16)
        self._kept[number] = (class_set, self._clock())
        return number

    def get(self, number: str) -> ClassSet:
        """Raises Refused (404)."""
        if number not in self._kept or self._clock() - self._kept[number][1] >= self._idle_seconds:
            message = f"there is no class set {number!r:.60}; it was deleted, unused for long, or never made."
            raise Refused(404, "no_such_class_set", "class_set_id", message)
        class_set, _ = self._kept[number]
        self._kept[number] = (class_set, self._clock())
        return class_set

    def delete(self, number: str) -> None:
        """Raises Refused (404)."""
        self.get(number)
        del self._kept[number]


def clean_name(name: str | None) -> str:
    """A file's own name without folders and control characters, to be shown and saved under."""
    last = (name or "").replace("\\", "/").rsplit("/", 1)[-1]
    kept = "".join(c for c in last if not unicodedata.category(c).startswith("C")).strip(". ")
    return kept[-NAME_LENGTH:] or "photo"
