"""Conditioning images: the clip size they imply, and resizing to it.

Source: kandinskylab/kandinsky-5:kandinsky/i2v_pipeline.py (size rule, bilinear resize with antialiasing).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from dataset.media.media import read_image

if TYPE_CHECKING:  # torch is imported late: sizes are needed before anything heavy
    from torch import Tensor


def image_clip_size(height: int, width: int, *, max_area: int, divisor: int) -> tuple[int, int]:
    """(height, width) of the clip for an image, scaled to `max_area` pixels.

    Each side is rounded to the nearest multiple of `divisor` by itself, halves to even, so the aspect ratio
    may change a little and nothing is cropped.
    """
    scale = math.sqrt(max_area / (height * width)) / divisor
    return round(height * scale) * divisor, round(width * scale) * divisor


def image_pixels(path: Path, height: int, width: int, *, crop: bool) -> Tensor:
    """A conditioning image at the clip's size, ready for the VAE.

    Args:
        crop: scale the image to cover the size and crop the centre; else scale each side to fit.
    Returns:
        [1, 3, 1, height, width] float32 in [-1, 1], on the CPU.
    Raises:
        DataError: the file cannot be decoded.
    """
    import torch
    import torch.nn.functional as F

    levels = torch.from_numpy(read_image(path)).permute(2, 0, 1)[None].float()  # [1, 3, H, W]
    size = (height, width)
    if crop:
        scale = max(height / levels.shape[2], width / levels.shape[3])
        size = (max(height, round(levels.shape[2] * scale)), max(width, round(levels.shape[3] * scale)))
    resized = F.interpolate(levels, size=size, mode="bilinear", antialias=True, align_corners=False)
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    # Rounded to whole levels, as the official pipeline's resize of an 8-bit image is.
    whole = resized[:, :, top : top + height, left : left + width].round().clamp(0, 255)
    return (whole / 127.5 - 1)[:, :, None]
