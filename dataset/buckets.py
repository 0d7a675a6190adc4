"""Aspect-ratio buckets: the training size of an item and the resize to it.

Pure arithmetic. Source of the rules: kohya-ss/musubi-tuner, whose users expect the same buckets.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.geometry import NABLA_STEP, PIXEL_STEP

Size = tuple[int, int]
"""(width, height) in pixels."""


def round_down(size: int, step: int = PIXEL_STEP) -> int:
    """The largest multiple of `step` that is not above `size`."""
    return size - size % step


def round_up(size: int, step: int) -> int:
    """The smallest multiple of `step` that is not below `size`."""
    return -(-size // step) * step


def bucket_sizes(resolution: Size, *, enable_bucket: bool) -> tuple[Size, ...]:
    """All sizes an item of this dataset may take, ascending; only `resolution` itself without buckets."""
    if not enable_bucket:
        return (resolution,)
    area = resolution[0] * resolution[1]
    side = math.isqrt(area)
    buckets: set[Size] = set()
    for width in range(max(PIXEL_STEP, round_down(side // 2)), side + PIXEL_STEP, PIXEL_STEP):
        height = round_down(area // width)
        if height:
            buckets.update({(width, height), (height, width)})
    return tuple(sorted(buckets))


def choose_bucket(
    source: Size, resolution: Size, buckets: Sequence[Size], *, bucket_no_upscale: bool
) -> Size:
    """The bucket for a source of this size.

    With `bucket_no_upscale` a source no larger than the resolution's area keeps its own size, rounded down to
    multiples of 16 (which may be 0 for a tiny source: the caller refuses that). Otherwise the bucket whose
    width / height is nearest by absolute difference; the first in `buckets` wins a tie.
    """
    width, height = source
    if bucket_no_upscale and width * height <= resolution[0] * resolution[1]:
        return round_down(width), round_down(height)
    ratio = width / height
    return min(buckets, key=lambda bucket: abs(bucket[0] / bucket[1] - ratio))


def nabla_size(bucket: Size) -> Size:
    """The bucket with each side rounded up to what NABLA's blocks need."""
    return round_up(bucket[0], NABLA_STEP), round_up(bucket[1], NABLA_STEP)


@dataclass(frozen=True, kw_only=True, slots=True)
class CropPlan:
    """Resize to `resized`, then crop the target size at `offset`."""

    resized: Size
    offset: tuple[int, int]
    """(x, y) of the target's corner in the resized frame."""
    enlarges: bool


def plan_crop(source: Size, target: Size) -> CropPlan:
    """Cover the target with the source, keeping its shape, and crop the centre."""
    scale = max(target[0] / source[0], target[1] / source[1])
    # max(): rounding may never leave the frame smaller than the target.
    resized = (max(int(source[0] * scale + 0.5), target[0]), max(int(source[1] * scale + 0.5), target[1]))
    offset = ((resized[0] - target[0]) // 2, (resized[1] - target[1]) // 2)
    return CropPlan(resized=resized, offset=offset, enlarges=scale > 1)
