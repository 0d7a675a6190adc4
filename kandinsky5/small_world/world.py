"""The drawn world of the small base: one shape in one colour with one motion, as clips and captions.

The DiT has no absolute positions: rotary angles are relative, and with an even background nothing
distinguishes left from right at high sigma. The scene is therefore lit from the left, cool above, warm
below, and brightens with time, so that every patch of background shows where and when it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

SIZE = 64
FRAMES = 17
LENGTHS = (1, 5, 9, 17)
"""Pixel frames of a clip. A shorter clip is the beginning of the long one, at the same speed."""

SHAPES = ("circle", "square", "triangle", "star", "ring")
COLOURS = {
    "red": (0.88, 0.12, 0.12),
    "yellow": (0.93, 0.80, 0.08),
    "green": (0.10, 0.64, 0.16),
    "cyan": (0.08, 0.74, 0.80),
    "blue": (0.14, 0.24, 0.88),
    "purple": (0.62, 0.14, 0.74),
}
MOTIONS = {
    "left": ("moves left", "moving left"),
    "right": ("moves right", "moving right"),
    "up": ("moves up", "moving up"),
    "down": ("moves down", "moving down"),
    "grows": ("grows", "growing"),
    "shrinks": ("shrinks", "shrinking"),
    "still": ("stands still", "standing still"),
    "spins": ("spins", "spinning"),
}
"""Every motion as a verb and as a participle."""

HELD_OUT_SHAPES = ("star", "ring")
HELD_OUT_MOTION = "spins"
HELD_OUT_PAIR = ("red", "triangle")
"""Held out from the training of the DiT, not of the VAE."""

WORDINGS = (
    "a {colour} {shape} {verb}",
    "a {shape} that is {colour} {verb}",
    "{colour} {shape}, {participle}",
)

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
TRAVEL = 30.0
"""Pixels that a moving shape crosses in 17 frames, centred in the frame."""
GROWTH = 1.25 / 0.55
"""Ratio of the radii at both ends of a growing clip."""
SPIN = math.pi / 2
"""Radians that a spinning shape turns clockwise in 17 frames."""

_RADIUS = {"circle": 1.0, "square": 0.886, "triangle": 1.4, "star": 1.45, "ring": 1.15}
"""Radius per shape for about equal areas: half the side of a square, the circumradius of the others."""


@dataclass(frozen=True, slots=True)
class Scene:
    """What one clip shows."""

    shape: str
    colour: str
    motion: str

    def caption(self, wording: int = 0) -> str:
        """The caption of the scene; `wording` indexes `WORDINGS`."""
        verb, participle = MOTIONS[self.motion]
        return WORDINGS[wording].format(
            colour=self.colour, shape=self.shape, verb=verb, participle=participle
        )

    @property
    def is_visible(self) -> bool:
        """Whether the motion can be seen: a spinning circle or ring looks like one that stands still."""
        return self.motion != "spins" or self.shape not in ("circle", "ring")

    @property
    def is_held_out(self) -> bool:
        """Whether the DiT of the base has not been trained on this scene."""
        return (
            self.shape in HELD_OUT_SHAPES
            or self.motion == HELD_OUT_MOTION
            or (self.colour, self.shape) == HELD_OUT_PAIR
        )


ALL_SCENES = tuple(
    Scene(shape, colour, motion) for shape in SHAPES for colour in COLOURS for motion in MOTIONS
)
BASE_SCENES = tuple(scene for scene in ALL_SCENES if not scene.is_held_out)


def coverage(shape: str, x: Tensor, y: Tensor, radius: Tensor, angle: Tensor) -> Tensor:
    """Anti-aliased mask of a shape.

    Args:
        x, y: pixel positions relative to the shape's centre, x right, y down; broadcast with the others.
        radius: of the circle of equal area, in pixels; `angle`: clockwise turn in radians.
    Returns:
        Share of each pixel that is covered, in [0, 1].
    """
    cos, sin = angle.cos(), angle.sin()
    turned_x, turned_y = x * cos + y * sin, y * cos - x * sin
    return (0.5 - _signed_distance(shape, turned_x, turned_y, radius * _RADIUS[shape])).clamp(0, 1)


def _signed_distance(shape: str, x: Tensor, y: Tensor, r: Tensor) -> Tensor:
    """Distance in pixels to the outline, negative inside.

    Source of the formulas: iquilezles.org/articles/distfunctions2d.
    """
    if shape == "circle":
        return torch.hypot(x, y) - r
    if shape == "square":
        return torch.maximum(x.abs(), y.abs()) - r
    if shape == "triangle":  # equilateral, tip up
        slant = math.sqrt(3) / 2 * x.abs() - 0.5 * y
        return torch.maximum(y, slant) - r / 2
    if shape == "ring":
        half_width = 0.27 * r
        return (torch.hypot(x, y) - (r - half_width)).abs() - half_width
    if shape == "star":
        return _star_distance(x, y, r)
    raise ValueError(f"unknown shape {shape!r}")


def _star_distance(x: Tensor, y: Tensor, r: Tensor, inner: float = 0.45) -> Tensor:
    """Five points, tip up: fold the plane into one half point, then the distance to its edge."""
    cos, sin = math.cos(math.pi / 5), math.sin(math.pi / 5)
    x, y = x.abs(), -y
    for side in (1, -1):
        beyond = 2 * (side * cos * x - sin * y).clamp(min=0)
        x, y = x - beyond * side * cos, y + beyond * sin
    x, y = x.abs(), y - r
    edge_x, edge_y = inner * sin, inner * cos - 1
    along = ((x * edge_x + y * edge_y) / (edge_x**2 + edge_y**2)).clamp(min=0)
    along = torch.minimum(along, r.expand_as(along))
    return torch.hypot(x - edge_x * along, y - edge_y * along) * torch.sign(y * edge_x - x * edge_y)


def draw(
    scenes: Sequence[Scene],
    generator: torch.Generator,
    *,
    times: Tensor | None = None,
    any_colour: float = 0.0,
) -> Tensor:
    """One clip per scene, with place, size, shade and colour varied a little.

    Args:
        times: [B, F] or [F], where in the motion each frame lies, 0 its beginning and 1 its end;
            None gives the 17 frames of a whole clip.
        any_colour: share of clips whose colour is drawn from all saturated colours, for the VAE.
    Returns:
        [B, 3, F, 64, 64], RGB in [-1, 1].
    """
    whole = torch.linspace(0, 1, FRAMES) if times is None else times
    rows = whole.expand(len(scenes), -1)
    return torch.stack([
        _draw_one(scene, row, generator, any_colour) for scene, row in zip(scenes, rows, strict=True)
    ])


def _draw_one(scene: Scene, times: Tensor, generator: torch.Generator, any_colour: float) -> Tensor:
    """times [F] -> [3, F, 64, 64] in [-1, 1]."""
    jitter = 2 * torch.rand(12, generator=generator) - 1  # in [-1, 1]
    radius = (10.5 + 1.5 * jitter[0]).expand_as(times)
    centre_x, centre_y = SIZE / 2 + 4 * jitter[1].expand_as(times), SIZE / 2 + 4 * jitter[2].expand_as(times)
    angle = torch.zeros_like(times)
    if scene.motion in DIRECTIONS:
        right, down = DIRECTIONS[scene.motion]
        path = SIZE / 2 + TRAVEL * (times - 0.5) * (right + down) + 1.5 * jitter[3]
        centre_x, centre_y = (path, centre_y) if right else (centre_x, path)
    elif scene.motion == "grows":
        radius = radius * 0.55 * GROWTH**times
    elif scene.motion == "shrinks":
        radius = radius * 0.55 * GROWTH ** (1 - times)
    elif scene.motion == "spins":
        angle = SPIN * times
    grid = torch.arange(SIZE) + 0.5
    mask = coverage(
        scene.shape,
        grid[None, None, :] - centre_x[:, None, None],
        grid[None, :, None] - centre_y[:, None, None],
        radius[:, None, None],
        angle[:, None, None],
    )  # [F, H, W]
    if float(torch.rand((), generator=generator)) < any_colour:
        fill = _any_colour(generator)
    else:
        fill = torch.tensor(COLOURS[scene.colour]) + 0.03 * jitter[4:7]
    clip = _background(times, jitter[7:11]) * (1 - mask) + fill[:, None, None, None] * mask
    return clip.clamp(0, 1) * 2 - 1


def _background(times: Tensor, jitter: Tensor) -> Tensor:
    """times [F], jitter [4] in [-1, 1] -> the lit wall, [3, F, 64, 64] in [0, 1]."""
    grid = (torch.arange(SIZE) + 0.5) / SIZE - 0.5
    level = 0.82 + 0.03 * jitter[0] + 0.06 * (times[:, None, None] - 0.5)
    light = level - (0.16 + 0.03 * jitter[1]) * grid[None, None, :]
    warmth = (0.08 + 0.02 * jitter[2]) * grid[None, :, None] + 0.01 * jitter[3]
    return torch.stack([light + warmth, light.expand(-1, SIZE, SIZE), light - warmth])


def _any_colour(generator: torch.Generator) -> Tensor:
    """A colour of full hue range with a saturation that the judge separates from the background."""
    hue, floor, value = torch.rand(3, generator=generator).tolist()
    phases = torch.tensor([0.0, 1 / 3, 2 / 3])
    ramp = (2 - 6 * ((hue + 0.5 - phases) % 1.0 - 0.5).abs()).clamp(0, 1)
    low, high = 0.05 + 0.2 * floor, 0.6 + 0.35 * value
    return low + (high - low) * ramp


def pick_scenes(scenes: Sequence[Scene], count: int, generator: torch.Generator) -> list[Scene]:
    """`count` scenes drawn with replacement."""
    return [scenes[i] for i in torch.randint(len(scenes), (count,), generator=generator).tolist()]
