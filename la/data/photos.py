"""Photos as users have them: files, Pillow images or arrays, of any size, grey or turned by their camera."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from la.backbone.vit import PHOTO_FORMATS
from la.data.rle import MAX_PIXELS
from la.errors import InputError

Photo = Path | str | Image.Image | np.ndarray


def open_photo(photo: Photo) -> Image.Image:
    """RGB, upright as viewers show it; an array is (H, W, 3) or grey (H, W), uint8.

    Raises InputError for a file that is missing, no image, cut off or far too large, and for another kind of array.
    """
    if isinstance(photo, np.ndarray):
        if photo.dtype != np.uint8 or photo.ndim not in (2, 3) or photo.shape[2:] not in ((), (3,)) or not photo.size:
            raise InputError(
                f"a photo is an array {photo.shape} of {photo.dtype}; expected (height, width, 3) or (height, width) "
                "of uint8, RGB in 0..255. Convert it."
            )
        return Image.fromarray(photo).convert("RGB")
    try:
        if isinstance(photo, Image.Image):
            return ImageOps.exif_transpose(photo).convert("RGB")
        with Image.open(photo, formats=PHOTO_FORMATS) as opened:
            if opened.width * opened.height > MAX_PIXELS:
                raise ValueError(f"it says it is {opened.width}x{opened.height} pixels, of at most {MAX_PIXELS} in all")
            return ImageOps.exif_transpose(opened).convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(
            f"{name_of(photo)} cannot be decoded ({error!s:.160}); expected a whole JPEG, PNG, WebP "
            "or BMP. Save it anew, or leave it out."
        ) from error


def name_of(photo: Photo) -> str:
    """What to call a photo in messages and files: its path, or its kind and size."""
    if isinstance(photo, np.ndarray):
        return f"array {photo.shape[1]}x{photo.shape[0]}"
    if isinstance(photo, Image.Image):
        return getattr(photo, "filename", "") or f"image {photo.width}x{photo.height}"
    return str(photo)
