"""Small parts that are on the page more than once."""

import base64
from collections.abc import Callable

from nicegui import ui


def section(title: str) -> ui.card:
    """A card under a heading."""
    card = ui.card().classes("w-full gap-3").props("flat bordered")
    with card:
        ui.html(f"<h2>{title}</h2>", sanitize=False)
    return card


def download_button(text: str, action: Callable[[], None]) -> ui.button:
    """A button that hands out a file."""
    return ui.button(text, icon="download", on_click=action).props("flat no-caps dense")


def data_url(data: bytes, kind: str) -> str:
    """An image, such as one of kind "png", as the address of itself."""
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def warn(message: str) -> None:
    """Tell the user of the page that is served at the moment."""
    ui.notify(message, type="warning", multi_line=True, timeout=8000, close_button="OK")
