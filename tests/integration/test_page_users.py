"""Eight users of the page at once: nobody sees another's classes or masks, and the server's memory stays flat."""

import base64
import io
import json
import os
import re
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from page_driver import Marker, add_class, files_of, opened, saved, served, upload
from PIL import Image

from la.predictor.predictor import Predictor
from la.predictor.user_prompts import Box

pytest.importorskip("nicegui")
USERS = 8
SECONDS = float(os.environ.get("LA_PAGE_SECONDS", "12"))  # how long they segment; the bar is 60
GROWTH = 1.05  # of the server's memory, over its peak of the first third of that time
# What a page shows once it has an answer that was not looked at before, which is then asked for again; else null.
LOOK = """() => {
    const mask = document.querySelector('img.mask:not([data-seen])');
    const button = [...document.querySelectorAll('button')].find((b) => b.innerText.includes('Segment'));
    const text = document.body.innerText;
    if (!mask || !text.includes('Without this support') || button.className.includes('loading')) return null;
    mask.dataset.seen = 'yes';
    button.click();
    const names = (where) => [...document.querySelectorAll(where)].map((e) => e.innerText.trim());
    return {mask: mask.src, text, classes: names('[aria-label^="Class that"] button[aria-pressed]'),
            legend: names('main li')};
}"""


@dataclass
class User:
    """One open page, what it may show, and what it was seen to show."""

    number: int
    page: object
    complaints: list[str]
    expected: np.ndarray | None = None  # (H, W) of labels
    waited: list[float] = field(default_factory=list)  # seconds in the queue, of each answer

    @property
    def names(self) -> list[str]:
        return [f"disc of {self.number}", f"star of {self.number}"]

    def prepare(self, folder: Path, predictor: Predictor) -> None:
        """Mark two boxes of this user's own on a photo of his own, and hand in another."""
        support, query = files_of(folder, 20 + self.number, 100 + self.number)
        for name in self.names:
            add_class(self.page, name)
        upload(self.page, "Add support photos", support)
        self.page.get_by_role("button", name=f"Mark {support.name}").wait_for()
        self.page.get_by_role("button", name="Box", exact=True).click()
        marker = Marker(self.page)
        for name, left in zip(self.names, (20, 170), strict=True):
            self.page.get_by_role("button", name=name, exact=True).click()
            marker.drag((left + 5 * self.number, 40), (left + 60 + 5 * self.number, 120 + 10 * self.number))
        upload(self.page, "Add photos to segment", query)
        self.page.get_by_role("img", name=query.name, exact=True).wait_for()
        boxes = [
            one["bbox"] for one in json.loads(saved(self.page, "Marks as COCO", folder).read_text())["annotations"]
        ]
        prompts = {name: Box(x, y, x + w, y + h) for name, (x, y, w, h) in zip(self.names, boxes, strict=True)}
        self.expected = predictor.segment(
            [query], predictor.learn(predictor.read_supports([support], [prompts]))
        ).masks[0]

    def look(self) -> bool:
        """Check the next answer, where it is there."""
        if (seen := self.page.evaluate(LOOK)) is None:
            return False
        assert [name.removeprefix("check").strip() for name in seen["classes"]] == self.names
        assert [line.rsplit(" ", 1)[0].removesuffix(" (not") for line in seen["legend"]] == self.names
        assert set(re.findall(r"(?:disc|star) of \d", seen["text"])) == set(self.names)
        (waited,) = re.findall(r"\d s, after (\d+\.\d\d) s in the queue", seen["text"])
        self.waited.append(float(waited))
        shown = np.asarray(Image.open(io.BytesIO(base64.b64decode(seen["mask"].partition(",")[2]))))
        np.testing.assert_array_equal(shown, self.expected)
        return True


def memory_mb(process) -> float:
    """Resident megabytes of the server."""
    pages = int(Path(f"/proc/{process.pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


@pytest.mark.timeout(600 + 2 * SECONDS)
def test_eight_users_see_their_own_masks_while_memory_stays_flat(tmp_path):
    predictor = Predictor.from_checkpoint("demo", "cpu")
    with served(tmp_path / "log") as (address, process), opened(address) as first:
        users = [User(number, *beside(first, address)) for number in range(USERS)]
        for user in users:
            user.prepare(tmp_path, predictor)
        assert len({user.expected.tobytes() for user in users}) == USERS, "masks have to differ for this to tell"
        for user in users:
            user.page.get_by_role("button", name="Segment", exact=True).click()
        started, memory = time.monotonic(), []
        while time.monotonic() < started + SECONDS or not all(user.waited for user in users):
            if not sum(user.look() for user in users):
                time.sleep(0.02)
            memory.append((time.monotonic() - started, memory_mb(process)))
        assert not [complaint for user in users for complaint in user.complaints]
        assert not any(user.page.locator(".q-notification").count() for user in users), "a warning is shown"
    early = max(mb for at, mb in memory if at <= max(SECONDS / 3, memory[0][0]))
    waited = sorted(wait for user in users for wait in user.waited)
    print(
        f"\n{len(waited)} answers in {memory[-1][0]:.0f} s, {min(len(user.waited) for user in users)} or more a user; "
        f"in the queue {statistics.median(waited):.2f} s, at most {waited[-1]:.2f} s; "
        f"server {memory[0][1]:.0f} MB, {early:.0f} MB after a third, {memory[-1][1]:.0f} MB at the end"
    )
    assert waited[-1] > 0, "eight users of one model wait for one another, and are told so"
    assert memory[-1][1] < GROWTH * early


def beside(page, address: str) -> tuple[object, list[str]]:
    """A page with a profile of its own in the same browser, and what it complains of."""
    complaints: list[str] = []
    other = page.context.browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    other.set_default_timeout(120_000)
    other.on("console", lambda m: complaints.append(m.text) if m.type in ("error", "warning") else None)
    other.on("pageerror", lambda error: complaints.append(str(error)))
    other.goto(address)
    other.get_by_role("button", name="Show an example").wait_for()
    return other, complaints
