"""`cli.py serve` in a process of its own, and its page in a browser, as a user works it."""

import base64
import io
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from conftest import browser_page
from PIL import Image

from pipelines.demo.scenes import draw_scene

ROOT = Path(__file__).parents[1]


@contextmanager
def served(log: Path, *options: str) -> Iterator[tuple[str, subprocess.Popen]]:
    """(the page's address, the server), with its output in `log`, which must be without a traceback at the end."""
    command = [sys.executable, "cli.py", "serve", "--port", "0", "--device", "cpu", "--threads", "1", *options]
    with open(log, "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=file, env=os.environ | {"COLUMNS": "200"})
    try:
        for _ in range(1200):
            if found := re.search(r"http://[\d.:]+", log.read_text()):
                break
            assert process.poll() is None, log.read_text()
            time.sleep(0.1)
        yield found[0], process
        assert process.poll() is None, log.read_text()
        assert "Traceback" not in log.read_text(), log.read_text()
    finally:
        process.terminate()
        process.wait(20)


@contextmanager
def opened(address: str, width: int = 1280):
    """The page in a browser that must not complain, nor ask anything of another address."""
    with browser_page(width) as (page, complaints):
        elsewhere = []
        local = (address, address.replace("http", "ws"), "data:", "blob:")
        page.on("request", lambda request: None if request.url.startswith(local) else elsewhere.append(request.url))
        page.set_default_timeout(60_000)
        page.goto(address)
        page.get_by_role("button", name="Show an example").wait_for()
        yield page
        assert not complaints
        assert not elsewhere


def files_of(tmp_path: Path, *numbers: int) -> list[Path]:
    paths = [tmp_path / f"photo {number}.png" for number in numbers]
    for path, number in zip(paths, numbers, strict=True):
        Image.fromarray(draw_scene(7, "val2017", number, (240, 320)).image).save(path)
    return paths


def upload(page, which: str, *paths: Path) -> None:
    page.locator(f'[aria-label="{which}"] input[type=file]').set_input_files(paths)


def add_class(page, name: str) -> None:
    page.get_by_label("Name of a class").fill(name)
    page.get_by_role("button", name="Add class").click()
    page.get_by_role("button", name=name, exact=True).wait_for()


class Marker:
    """Marks by the mouse, in pixels of a photo of 320 x 240."""

    def __init__(self, page):
        self._page = page
        image = page.locator(".canvas img")
        image.scroll_into_view_if_needed()
        self._at = image.bounding_box()

    def place(self, x: float, y: float) -> tuple[float, float]:
        return self._at["x"] + x * self._at["width"] / 320, self._at["y"] + y * self._at["height"] / 240

    def click(self, x: float, y: float, button: str = "left") -> None:
        self._page.mouse.click(*self.place(x, y), button=button)

    def drag(self, *path: tuple[float, float], button: str = "left") -> None:
        self._page.mouse.move(*self.place(*path[0]))
        self._page.mouse.down(button=button)
        for point in path[1:]:
            self._page.mouse.move(*self.place(*point), steps=4)
        self._page.mouse.up(button=button)


def saved(page, button: str, folder: Path) -> Path:
    with page.expect_download() as download:
        page.get_by_role("button", name=button).click()
    path = folder / f"download of {download.value.suggested_filename}"
    download.value.save_as(path)
    return path


def overlay(page) -> np.ndarray:
    """(H, W, 4) RGBA of the mask that is shown over the photo."""
    url = page.locator("img.mask").get_attribute("src")
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).convert("RGBA"))
