"""Any image to RGB of one size, with a note of what had to be changed."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# What Pillow decodes by itself; for others it starts programs (PostScript) or has had little use.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26  # 8192 x 8192; a small file can claim any number
CHANGES = ("grey", "other_mode", "resized")
_GREY = ("1", "L", "LA")
_OTHER_MODES = ("P", "PA", "RGBA", "CMYK", "YCbCr")


class Decoded(NamedTuple):
    pixels: NDArray[np.uint8]  # (3, size, size), RGB, contiguous
    found: str  # what the file holds: "L, 20 x 30"
    changes: tuple[str, ...]  # of CHANGES; empty if the file holds RGB of that size


def from_file(read: Callable[[], bytes]) -> Image.Image:
    """The image that a file's bytes hold, not decoded yet. Raises whatever Pillow raises."""
    return Image.open(io.BytesIO(read()), formats=FORMATS)


def decode(image: Image.Image, size: int) -> Decoded:
    """Bring an opened image to RGB and `size` x `size` pixels (bilinear); transparency is dropped.

    Raises:
        ValueError: too many pixels, or the mode cannot be brought to 8-bit RGB without a choice of range (16-bit,
            float).
        Exception: whatever Pillow raises at a damaged file.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are decoded")
    image.load()
    changes = []
    if image.mode != "RGB":
        if image.mode not in (*_GREY, *_OTHER_MODES):
            raise ValueError(f"has the mode {image.mode}; 8-bit colour or grey is needed")
        changes.append("grey" if image.mode in _GREY else "other_mode")
    if image.size != (size, size):
        changes.append("resized")
    found = f"{image.mode}, {image.width} x {image.height}"
    # Pillow warns at a palette with transparency unless it passes through RGBA.
    rgb = (image.convert("RGBA") if image.has_transparency_data else image).convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return Decoded(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), found, tuple(changes))


def reason(error: Exception) -> str:
    """Why an image could not be decoded, for a message."""
    match error:
        case UnidentifiedImageError():  # Pillow's own text names a buffer in memory
            return "not an image"
        case Image.DecompressionBombError():
            return f"has far more than the {MAX_PIXELS} pixels that are decoded at most"
        case _:
            return str(error) or type(error).__name__
