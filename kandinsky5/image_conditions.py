"""Images that a clip starts or ends with: what size the clip takes from them, and how they fill it.

Source: kandinskylab/kandinsky-5:kandinsky/i2v_pipeline.py (size rule, bilinear resize with antialiasing).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageOps

from modules.errors import DataError

if TYPE_CHECKING:  # torch is imported late: sizes are read before anything heavy
    from torch import Tensor

MAX_IMAGE_PIXELS = 256 * 2**20
"""Larger images are refused from their header, before they are decoded."""
_EXIF_ORIENTATION = 0x0112
_TURNED_ORIENTATIONS = (5, 6, 7, 8)


def image_clip_size(height: int, width: int, *, max_area: int, divisor: int) -> tuple[int, int]:
    """(height, width) of the clip for an image: scaled up or down to `max_area` pixels.

    Each side is rounded to the nearest multiple of `divisor` by itself, halves to even, so the aspect ratio
    may change a little and nothing is cropped.
    """
    scale = math.sqrt(max_area / (height * width)) / divisor
    return round(height * scale) * divisor, round(width * scale) * divisor


def read_image_size(path: Path) -> tuple[int, int]:
    """(height, width) of an image file, upright, from its header.

    Raises:
        DataError: the file is not an image or claims an unreasonable size.
    """
    with _opened(path) as image:
        width, height = image.size
        is_turned = image.getexif().get(_EXIF_ORIENTATION) in _TURNED_ORIENTATIONS
    return (width, height) if is_turned else (height, width)


def read_image(path: Path) -> np.ndarray:
    """An image file as uint8 [H, W, 3]: upright, alpha composited over white, 16 bits scaled to 8.

    Raises:
        DataError: the file cannot be decoded.
    """
    with _opened(path) as image:
        try:
            upright = ImageOps.exif_transpose(image)
            if upright.mode.startswith("I"):  # PIL would clip 16-bit values to white
                levels = np.asarray(upright).astype(np.float32) / 257
                upright = Image.fromarray(levels.round().clip(0, 255).astype(np.uint8))
            if upright.has_transparency_data:
                layer = upright.convert("RGBA")
                background = Image.new("RGBA", layer.size, "white")
                upright = Image.alpha_composite(background, layer)
            return np.asarray(upright.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(f"{path}: the image is damaged: {error}") from error


def image_pixels(path: Path, height: int, width: int, *, crop: bool) -> Tensor:
    """A conditioning image at the clip's size, ready for the VAE.

    Args:
        crop: scale the image to cover the size and cut the middle out; else scale each side to fit.
    Returns:
        [1, 3, 1, height, width] float32 in [-1, 1], on the CPU.
    """
    import torch
    import torch.nn.functional as F

    levels = torch.from_numpy(read_image(path).copy()).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    size = (height, width)
    if crop:
        scale = max(height / levels.shape[2], width / levels.shape[3])
        size = (max(height, round(levels.shape[2] * scale)), max(width, round(levels.shape[3] * scale)))
    resized = F.interpolate(levels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # Rounded to whole levels, as the official pipeline's resize of an 8-bit image is.
    whole = resized[:, :, top : top + height, left : left + width].round().clamp(0, 255)
    return (whole / 127.5 - 1)[:, :, None]


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_IMAGE_PIXELS:
                raise DataError(f"{path}: {image.width}x{image.height} pixels are too many for an image")
            yield image
    except Image.DecompressionBombError as error:
        raise DataError(f"{path}: {error}") from error
    except OSError as error:  # PIL.UnidentifiedImageError is one
        raise DataError(f"{path}: not a readable image: {error}") from error
