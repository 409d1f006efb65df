"""Picture files as other people leave them, to upright 8-bit pixels.

Only decoders of common raster formats are used: some of Pillow's others start programs, or are rarely looked at.
"""

from __future__ import annotations

import io
import math
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from layerwise.data.seen import Unreadable as Unreadable

if TYPE_CHECKING:
    from PIL.Image import Image

FORMATS = {
    "JPEG": (".jpg", ".jpeg", ".jfif"),
    "PNG": (".png",),
    "WEBP": (".webp",),
    "BMP": (".bmp",),
    "GIF": (".gif",),
    "TIFF": (".tif", ".tiff"),
    "PPM": (".ppm", ".pgm", ".pbm", ".pnm"),
    "JPEG2000": (".jp2",),
    "AVIF": (".avif",),
}
SUFFIXES = frozenset(suffix for suffixes in FORMATS.values() for suffix in suffixes)
MOST_PIXELS = 178_956_970  # beyond this Pillow takes a picture for a decompression bomb
ORIENTATION = 0x0112  # EXIF tag


def decode(content: bytes, *, grayscale: bool, max_pixels: int, short_side: int | None = None) -> Image:
    """The first frame, upright, in mode L or RGB; transparent parts become white, 16-bit levels their 8 high bits.

    A JPEG may come at a half, a quarter or an eighth of its size, with its shorter side no shorter than `short_side`.

    Raises:
        Unreadable: it is cut short, has more than `max_pixels`, or is in none of the formats; the message says why.
    """
    from PIL import Image

    try:
        image: Image.Image = Image.open(io.BytesIO(content), formats=list(FORMATS))
        width, height = image.size
        if width * height > max_pixels:
            raise Unreadable(f"{width} x {height} pixels, more than dataset.max_pixels = {max_pixels:,}")
        if short_side is not None:
            enough = short_side / min(width, height)
            image.draft(None, (math.ceil(width * enough), math.ceil(height * enough)))
        image.load()
        return _in_8_bits(_upright(image), grayscale)
    except Unreadable:
        raise
    except Exception as error:  # decoders meet hostile bytes with errors of every kind
        reason = "in no format that is read here" if type(error).__name__ == "UnidentifiedImageError" else str(error)
        raise Unreadable(reason or type(error).__name__) from error


def _upright(image: Image) -> Image:
    from PIL.Image import Transpose

    try:
        orientation = int(image.getexif().get(ORIENTATION, 1))
    except Exception:  # damaged metadata beside sound pixels
        return image
    turn = {
        2: Transpose.FLIP_LEFT_RIGHT,
        3: Transpose.ROTATE_180,
        4: Transpose.FLIP_TOP_BOTTOM,
        5: Transpose.TRANSPOSE,
        6: Transpose.ROTATE_270,
        7: Transpose.TRANSVERSE,
        8: Transpose.ROTATE_90,
    }.get(orientation)
    return image if turn is None else image.transpose(turn)


def _in_8_bits(image: Image, grayscale: bool) -> Image:
    from PIL import Image

    if image.mode == "F":
        raise Unreadable("levels are floating-point numbers; convert it to 8 or 16 bits")
    if image.mode.startswith("I"):
        levels = np.asarray(image).astype(np.int64)
        if levels.min() < 0 or levels.max() > 65535:
            raise Unreadable("levels of 32 bits; convert it to 8 or 16 bits")
        image = Image.fromarray((levels >> 8).astype(np.uint8))
    elif image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or "transparency" in image.info:
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    if image.mode != "L":
        image = image.convert("RGB")
    return image.convert("L" if grayscale else "RGB")


def window(image: Image, box: tuple[float, float, float, float], side: int) -> npt.NDArray[np.uint8]:
    """(C, side, side): the part of the image in `box` (left, top, right, bottom, in pixels), resampled to `side`.

    Only that part is resampled, so a long picture costs no more than a square one.
    """
    from PIL.Image import Resampling

    left, top, right, bottom = map(int, box)
    if (left, top, right, bottom) == box and right - left == bottom - top == side:
        part = image.crop((left, top, right, bottom))
    else:
        part = image.resize((side, side), Resampling.BILINEAR, box=box)
    pixels = np.asarray(part)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
