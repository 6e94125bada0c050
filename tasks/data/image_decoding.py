"""Converts any image to upright RGB of one size, and records what had to be converted."""

import io
from collections.abc import Callable
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

# Formats that Pillow decodes itself; for others it starts external programs (PostScript) or is less tested.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
MAX_PIXELS = 2**26  # 8192 x 8192; a small file can declare any number
# Conversions: of the colours, of the size, of a photo that the camera's EXIF tag says is turned, of transparency, and,
# because the image is not square, of its shape.
CHANGES = ("grey", "other_mode", "resized", "rotated", "composited", "stretched", "cropped", "padded")
MISMATCHES = {"grey", "other_mode", "resized"}  # what prepare.on_mismatch may refuse
Fit = Literal["stretch", "crop", "pad"]  # how an image that is not square becomes square
BACKGROUND = "white"  # behind transparent pixels, as browsers show them
PADDING = "black"
_GREY = ("1", "L", "LA")
_OTHER_MODES = ("P", "PA", "RGBA", "CMYK", "YCbCr")


class Decoded(NamedTuple):
    pixels: NDArray[np.uint8]  # (3, size, size), RGB, contiguous
    original: str  # mode and upright size: "L, 20 x 30"
    changes: tuple[str, ...]  # of CHANGES; empty if the file is RGB of that size


def from_file(read: Callable[[], bytes]) -> Image.Image:
    """The image in a file's bytes, opened but not yet decoded. Raises whatever Pillow raises."""
    return Image.open(io.BytesIO(read()), formats=FORMATS)


def decode(image: Image.Image, size: int, fit: Fit = "stretch") -> Decoded:
    """Convert an opened image to upright RGB of `size` x `size` pixels (bilinear).

    Transparency is composited on white.

    Args:
        fit: of an image that is not square: change its proportions, crop its centre, or pad it with black.

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
    if image.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9):
        changes.append("rotated")
        image = ImageOps.exif_transpose(image)
    original = f"{image.mode}, {image.width} x {image.height}"
    if image.has_transparency_data:
        changes.append("composited")
        rgba = image.convert("RGBA")
        rgb = Image.alpha_composite(Image.new("RGBA", rgba.size, BACKGROUND), rgba).convert("RGB")
    else:
        rgb = image.convert("RGB")
    if rgb.size != (size, size):
        changes.append("resized")
        if rgb.width != rgb.height:
            changes.append({"stretch": "stretched", "crop": "cropped", "pad": "padded"}[fit])
        rgb = _resize(rgb, size, fit)
    return Decoded(np.ascontiguousarray(np.asarray(rgb).transpose(2, 0, 1)), original, tuple(changes))


def _resize(image: Image.Image, size: int, fit: Fit) -> Image.Image:
    match fit:
        case "stretch":
            return image.resize((size, size), Image.Resampling.BILINEAR)
        case "crop":
            return ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
        case "pad":
            return ImageOps.pad(image, (size, size), Image.Resampling.BILINEAR, color=PADDING)


def reason(error: Exception) -> str:
    """Why an image could not be decoded, for messages."""
    match error:
        case UnidentifiedImageError():  # Pillow's own message names a buffer in memory
            return "not an image"
        case Image.DecompressionBombError():
            return f"has far more than {MAX_PIXELS} pixels, the maximum"
        case _:
            return str(error) or type(error).__name__
