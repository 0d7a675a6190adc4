"""Clips as small moving pictures, as TensorBoard shows them."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

_LONGEST_SIDE = 256


@dataclass(frozen=True, slots=True)
class Animation:
    """A small moving picture: a whole GIF file, or PNG for one frame."""

    encoded: bytes
    size: tuple[int, int]
    """Width, height."""


def animate(frames: np.ndarray) -> Animation:
    """Frames uint8 [F, H, W, 3] as a picture small enough for a log."""
    height, width = frames.shape[1:3]
    factor = min(1.0, _LONGEST_SIDE / max(height, width))
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    first, *rest = [Image.fromarray(frame).resize(size) for frame in frames]
    stream = io.BytesIO()
    if rest:
        # Hundredths of a second are all that GIF knows.
        first.save(stream, format="gif", save_all=True, append_images=rest, duration=40, loop=0)
    else:
        first.save(stream, format="png")
    return Animation(stream.getvalue(), size)
