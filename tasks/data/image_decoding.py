"""Converts any image to RGB of one size, and records what had to be converted."""

import io
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

# Formats that Pillow decodes itself; for others it starts external programs (PostScript) or is less tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26  # 8192 x 8192; a small file can declare any number
CHANGES = ("grey", "other_mode", "resized")
_GREY = ("1", "L", "LA")
_OTHER_MODES = ("P", "PA", "RGBA", "CMYK", "YCbCr")


class Decoded(NamedTuple):
    pixels: NDArray[np.uint8]  # (3, size, size), RGB, contiguous
    original: str  # mode and size in the file: "L, 20 x 30"
    changes: tuple[str, ...]  # of CHANGES; empty if the file is RGB of that size


def from_file(read: Callable[[], bytes]) -> Image.Image:
    """The image in a file's bytes, opened but not yet decoded. Raises whatever Pillow raises."""
    return Image.open(io.BytesIO(read()), formats=FORMATS)


def decode(image: Image.Image, size: int) -> Decoded:
    """Convert an opened image to RGB and resize it to `size` x `size` pixels (bilinear); transparency is dropped.

    Raises:
        ValueError: the image has too many pixels, or a mode that has no unique conversion to 8-bit RGB (16-bit, float).
        Exception: whatever Pillow raises for a damaged file.
    """
    if image.width * image.height > MAX_PIXELS:
        raise ValueError(f"has {image.width} x {image.height} pixels; at most {MAX_PIXELS} are allowed")
    image.load()
    changes = []
    if image.mode != "RGB":
        if image.mode not in (*_GREY, *_OTHER_MODES):
            raise ValueError(f"has the mode {image.mode}; 8-bit colour or grey is required")
        changes.append("grey" if image.mode in _GREY else "other_mode")
    if image.size != (size, size):
        changes.append("resized")
    original = f"{image.mode}, {image.width} x {image.height}"
    # Pillow warns about a palette with transparency unless it passes through RGBA.
    rgb = (image.convert("RGBA") if image.has_transparency_data else image).convert("RGB")
    if rgb.size != (size, size):
        rgb = rgb.resize((size, size), Image.Resampling.BILINEAR)
    return Decoded(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), original, tuple(changes))


def reason(error: Exception) -> str:
    """Why an image could not be decoded, for messages."""
    match error:
        case UnidentifiedImageError():  # Pillow's own message names a buffer in memory
            return "not an image"
        case Image.DecompressionBombError():
            return f"has far more than {MAX_PIXELS} pixels, the maximum"
        case _:
            return str(error) or type(error).__name__
