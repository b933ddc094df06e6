"""Photos: those of a data set, of a known size, and as users have them, of any size or turned by their camera."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps

from la.data.rle import MAX_PIXELS
from la.errors import InputError

PHOTO_FORMATS = ("JPEG", "PNG", "WEBP", "BMP")  # of the others of Pillow, EPS starts an interpreter of its own
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


def read_photo(path: Path, image_size: int, expected: tuple[int, int] | None = None) -> torch.Tensor:
    """(3, S, S) uint8 RGB of a photo squashed to `image_size` pixels a side; raises as `decode_photo` does."""
    return squash(decode_photo(path, expected), image_size)


def squash(rgb: Image.Image, image_size: int) -> torch.Tensor:
    """(3, S, S) uint8 of an RGB photo squashed to a square, bicubic: what the backbone takes."""
    squashed = rgb.resize((image_size, image_size), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(squashed)).permute(2, 0, 1).contiguous()


def decode_photo(path: Path, expected: tuple[int, int] | None = None) -> Image.Image:
    """A photo as RGB; grey photos become so.

    Sizes are checked before anything is decoded. Raises InputError for a file that is missing, no photo, truncated or
    of more than MAX_PIXELS, and, where `expected` gives the annotated (height, width) in pixels, for a photo of another
    size: its masks would lie elsewhere.
    """
    skip = "or leave such photos out with skip_bad."
    try:
        with path.open("rb") as file, Image.open(file, formats=PHOTO_FORMATS) as photo:
            width, height = photo.size
            if expected is not None and (height, width) != tuple(expected):
                raise InputError(
                    f"{path} is {width}x{height} pixels, but the annotations say {expected[1]}x{expected[0]}. "
                    f"Restore the original photo, {skip}"
                )
            if width * height > MAX_PIXELS:
                raise InputError(
                    f"{path} says it is {width}x{height} pixels; expected at most {MAX_PIXELS} in all. Scale it down "
                    f"with its annotations, {skip}"
                )
            return photo.convert("RGB")
    except InputError:
        raise
    except Exception as error:  # the decoders answer damaged files with errors of many kinds
        raise InputError(
            f"{path} cannot be decoded ({error!s:.120}); expected a whole JPEG or PNG. Download it again, {skip}"
        ) from error
