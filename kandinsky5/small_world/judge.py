"""Classifies clips of the drawn world by image arithmetic: `python -m kandinsky5.small_world.judge CLIP...`.

Saturation separates the shape from the background; the colour is the nearest hue, the motion comes from the
centroid, area and angle over time, and the shape is the template that covers it best at its own size,
place and angle. Nothing is learned, so there is no model to go wrong.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from dataset.media.media import read_image
from dataset.media.videos import probe_video, read_frames
from kandinsky5.small_world.world import (
    COLOURS,
    DIRECTIONS,
    FRAMES,
    GROWTH,
    SHAPES,
    SIZE,
    SPIN,
    TRAVEL,
    Scene,
    coverage,
)
from modules.command_line import Parser, user_errors

NOTHING = "nothing"

_SATURATION = (0.18, 0.42)
"""Chroma, the largest less the smallest channel, at which a pixel begins and ends to belong to the shape."""
_AREA = (0.01, 0.4)
"""Share of the frame that a shape may cover."""
_LEAST_IOU = 0.6
_LEAST_FOUND = 0.75
"""Share of the frames that must show a shape."""
_LEAST_CHANGE = 1 / 3
"""Share of a drawn motion, for the length of the clip, from which it counts as that motion."""
_SYMMETRY = {"square": 4, "triangle": 3, "star": 5}
"""Turns of 360 degrees over this number leave the shape as it is; circles and rings show no turn."""
_SCALES = torch.tensor([0.88, 0.94, 1.0, 1.06, 1.12])
_IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a clip shows; `nothing` where no shape is seen."""

    shape: str
    colour: str
    motion: str
    """`still` for pictures."""
    found: float
    """Share of the frames with one compact saturated shape."""
    iou: float
    """Overlap of the shape with its best template, mean over first, middle and last frame by area."""
    travel: tuple[float, float]
    """How far the centroid moves right and down, in 64ths of the frame's shorter side."""
    growth: float
    """Last radius over first."""
    turn: float
    """Degrees clockwise between first and last frame."""

    def matches(self, scene: Scene) -> bool:
        """Whether shape, colour and motion are all those of the scene."""
        return (self.shape, self.colour, self.motion) == (scene.shape, scene.colour, scene.motion)


_EMPTY = Verdict(NOTHING, NOTHING, NOTHING, 0.0, 0.0, (0.0, 0.0), 1.0, 0.0)


@dataclass(frozen=True, slots=True)
class _Blobs:
    """The saturated part of every frame."""

    mask: Tensor
    """[F, H, W] in [0, 1]."""
    area: Tensor
    x: Tensor
    y: Tensor
    """[F] each: pixels, and the centroid."""

    @classmethod
    def of(cls, pixels: Tensor) -> _Blobs:
        low, high = _SATURATION
        chroma = pixels.amax(0) - pixels.amin(0)
        mask = ((chroma - low) / (high - low)).clamp(0, 1)
        area = mask.sum((1, 2)).clamp(min=1e-6)
        across = torch.arange(mask.shape[2]) + 0.5
        down = torch.arange(mask.shape[1]) + 0.5
        x = (mask.sum(1) * across).sum(1) / area
        y = (mask.sum(2) * down).sum(1) / area
        return cls(mask, area, x, y)

    def distances(self, frame: int) -> tuple[Tensor, Tensor]:
        """Of every pixel from the frame's centroid: right [1, W] and down [H, 1]."""
        height, width = self.mask.shape[1:]
        return (
            torch.arange(width)[None, :] + 0.5 - self.x[frame],
            torch.arange(height)[:, None] + 0.5 - self.y[frame],
        )


def judge(pixels: Tensor) -> Verdict:
    """Judge one clip or picture, [3, F, H, W] in [-1, 1], of any size and length."""
    scaled = _to_world_size((pixels.float().clamp(-1, 1) + 1) / 2)
    blobs = _Blobs.of(scaled)
    frame_area = scaled.shape[2] * scaled.shape[3]
    is_shown = (blobs.area > _AREA[0] * frame_area) & (blobs.area < _AREA[1] * frame_area)
    found = float(is_shown.float().mean())
    if found < _LEAST_FOUND:
        return _EMPTY
    shown = is_shown.nonzero().flatten().tolist()
    first, last = shown[0], shown[-1]
    frames = sorted({first, shown[len(shown) // 2], last})
    overlaps = {shape: _mean_overlap(blobs, shape, frames) for shape in SHAPES}
    shape = max(overlaps, key=overlaps.__getitem__)
    if overlaps[shape] < _LEAST_IOU:
        return _EMPTY
    travel = (float(blobs.x[last] - blobs.x[first]), float(blobs.y[last] - blobs.y[first]))
    growth = float((blobs.area[last] / blobs.area[first]).sqrt())
    turn = _turn(blobs, shape, shown)
    share = (scaled.shape[1] - 1) / (FRAMES - 1)
    return Verdict(
        shape=shape,
        colour=_nearest_colour(scaled, blobs.mask),
        motion=_motion(travel, growth, turn, share),
        found=round(found, 3),
        iou=round(overlaps[shape], 3),
        travel=(round(travel[0], 1), round(travel[1], 1)),
        growth=round(growth, 3),
        turn=round(math.degrees(turn), 1),
    )


def _to_world_size(pixels: Tensor) -> Tensor:
    """[3, F, H, W] -> the same with a shorter side of 64."""
    height, width = pixels.shape[2:]
    if min(height, width) == SIZE:
        return pixels
    scale = SIZE / min(height, width)
    size = (round(height * scale), round(width * scale))
    mode = "area" if scale < 1 else "bilinear"
    return F.interpolate(pixels.transpose(0, 1), size, mode=mode).transpose(0, 1)


def _nearest_colour(pixels: Tensor, mask: Tensor) -> str:
    """The named colour whose hue is nearest to that of the mean over the shape's inner pixels."""
    core = mask * (mask > 0.95)
    core = core if core.sum() > 0 else mask
    mean = (pixels * core).sum((1, 2, 3)) / core.sum()
    hue = _hue(mean.tolist())

    def distance(name: str) -> float:
        difference = abs(hue - _hue(COLOURS[name]))
        return min(difference, 1 - difference)

    return min(COLOURS, key=distance)


def _hue(rgb: Sequence[float]) -> float:
    """The angle round the grey axis, in turns within [0, 1)."""
    red, green, blue = rgb
    return math.atan2(math.sqrt(3) * (green - blue), 2 * red - green - blue) / math.tau % 1.0


def _angle(blobs: _Blobs, frame: int, order: int) -> float:
    """Clockwise angle of a shape with this symmetry, within a turn over `order`, 0 with a tip or side up."""
    x, y = blobs.distances(frame)
    weight = blobs.mask[frame]
    radius, direction = torch.hypot(x, y), torch.atan2(x, -y)  # clockwise from up
    strength = weight * radius**order
    moment_x, moment_y = (
        (strength * (order * direction).cos()).sum(),
        (strength * (order * direction).sin()).sum(),
    )
    return math.atan2(float(moment_y), float(moment_x)) / order


def _turn(blobs: _Blobs, shape: str, frames: Sequence[int]) -> float:
    """Radians clockwise from first to last frame, followed from frame to frame."""
    order = _SYMMETRY.get(shape)
    if order is None:
        return 0.0
    angles = np.array([_angle(blobs, frame, order) for frame in frames])
    unwrapped = np.unwrap(angles, period=math.tau / order)
    return float(unwrapped[-1] - unwrapped[0])


def _mean_overlap(blobs: _Blobs, shape: str, frames: Sequence[int]) -> float:
    """The mean over `frames`, weighted by area: a VAE that blurs keeps little of a small shape's outline."""
    overlaps = torch.tensor([_overlap(blobs, shape, frame) for frame in frames])
    weights = blobs.area[list(frames)]
    return float((overlaps * weights).sum() / weights.sum())


def _overlap(blobs: _Blobs, shape: str, frame: int) -> float:
    """Intersection over union with the best of five sizes of the template."""
    x, y = blobs.distances(frame)
    order = _SYMMETRY.get(shape)
    angle = 0.0 if order is None else _angle(blobs, frame, order)
    if shape == "square":  # its moment is largest along the corners
        angle += math.pi / 4
    one = torch.tensor(1.0)
    unit = coverage(shape, *_UNIT_GRID, _UNIT_RADIUS * one, 0 * one).sum() / _UNIT_RADIUS**2
    radius = (blobs.area[frame] / unit).sqrt() * _SCALES[:, None, None]
    template = coverage(shape, x, y, radius, torch.tensor(angle))  # [scales, H, W]
    mask = blobs.mask[frame]
    shared = torch.minimum(template, mask).sum((1, 2))
    return float((shared / torch.maximum(template, mask).sum((1, 2))).max())


_UNIT_RADIUS = 20.0
_UNIT_GRID = (torch.arange(-39.5, 40)[None, :], torch.arange(-39.5, 40)[:, None])


def _motion(travel: tuple[float, float], growth: float, turn: float, share: float) -> str:
    """The motion whose drawn extent, for `share` of its duration, is reached most; `still` below a third."""
    if share == 0:
        return "still"
    extents = {name: right * travel[0] + down * travel[1] for name, (right, down) in DIRECTIONS.items()}
    reached = {name: extent / (TRAVEL * share) for name, extent in extents.items()}
    log_growth = math.log(growth) / (math.log(GROWTH) * share)
    reached |= {"grows": log_growth, "shrinks": -log_growth, "spins": abs(turn) / (SPIN * share)}
    most = max(reached, key=reached.__getitem__)
    return most if reached[most] > _LEAST_CHANGE else "still"


def read_clip(path: Path) -> Tensor:
    """All frames of a video, or an image, as [3, F, H, W] in [-1, 1].

    Raises:
        MediaError: not a readable image or video.
    """
    if path.suffix.lower() in _IMAGE_SUFFIXES:
        frames = [read_image(path)]
    else:
        info = probe_video(path)
        frames = [frame for _, frame in read_frames(path, info, range(info.num_frames))]
    return torch.from_numpy(np.stack(frames)).permute(3, 0, 1, 2).float() / 127.5 - 1


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        for path in _parse(argv).clips:
            print(json.dumps({"clip": str(path), **asdict(judge(read_clip(path)))}), file=sys.stdout)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.small_world.judge",
        "Print what clips of the drawn world show, as one JSON line each.",
    )
    parser.add_argument("clips", type=Path, nargs="+", metavar="CLIP", help="videos or images")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
