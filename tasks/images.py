"""Any image to RGB of one size, with a note of what had to be changed."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

CHANGES = ("grey", "other_mode", "resized")
_GREY = ("1", "L", "LA")
_OTHER_MODES = ("P", "PA", "RGBA", "CMYK", "YCbCr")


class Decoded(NamedTuple):
    pixels: NDArray[np.uint8]  # (3, size, size), RGB
    found: str  # what the file holds: "L, 20 x 30"
    changes: tuple[str, ...]  # of CHANGES; empty if the file holds RGB of that size


def decode(image: Image.Image, size: int) -> Decoded:
    """Bring an opened image to RGB and `size` x `size` pixels (bilinear); transparency is dropped.

    Raises:
        ValueError: the mode cannot be brought to 8-bit RGB without a choice of range (16-bit, float).
        Exception: whatever Pillow raises at a damaged file.
    """
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
    return Decoded(np.asarray(rgb).transpose(2, 0, 1), found, tuple(changes))


def reason(error: Exception) -> str:
    """Why an image could not be decoded, for a message."""
    # Pillow's own text names a buffer in memory.
    return "not an image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
