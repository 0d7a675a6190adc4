"""Faults in what the small base is given or gives, each alone: what a wrong program would do."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from kandinsky5.model.conditioning import TextConditioning
from kandinsky5.model.dit import NUM_TIMESTEPS
from kandinsky5.model.layers import RotaryAngles
from kandinsky5.sampling.sampler import sigma_schedule
from kandinsky5.tasks import DitParams
from kandinsky5.text.templates import ContentType, PromptTemplates
from tests.kandinsky5.small_world.base_kit import Sampling, SmallBase

Fault = Callable[[SmallBase], SmallBase]


@dataclass(frozen=True, slots=True)
class Changed:
    """A DiT that is called through `run`."""

    dit: Any
    run: Callable[..., Tensor]

    @property
    def dit_params(self) -> DitParams:
        return self.dit.dit_params

    def __call__(self, *inputs: Any, **how: Any) -> Tensor:
        return self.run(self.dit, *inputs, **how)


@dataclass(frozen=True, slots=True)
class ChangedText:
    """Text encoders with other template or other tokens."""

    encoders: Any
    content: ContentType | None = None
    """The template of every caption; None: the right one."""
    repeats: int = 1
    """How often the tokens of a caption follow each other."""

    @property
    def templates(self) -> PromptTemplates:
        return self.encoders.templates

    def encode(self, captions: Sequence[str], content: ContentType) -> list[TextConditioning]:
        texts = self.encoders.encode(captions, self.content or content)
        return [replace(text, text_embeds=text.text_embeds.repeat(self.repeats, 1)) for text in texts]


def through(run: Callable[..., Tensor]) -> Fault:
    """A fault of the DiT's inputs (x [B, F, H, W, 33], text, pooled, timestep [B]) or output."""
    return lambda base: replace(base, dit=Changed(base.dit, run))


def with_timestep(change: Callable[[Tensor], Tensor]) -> Fault:
    return through(lambda dit, x, text, pooled, at, **how: dit(x, text, pooled, change(at), **how))


def rotated(change: Callable[[Tensor], Tensor], extra: int) -> Fault:
    """Other rotary angles: `change` picks from those of a grid with `extra` more positions per axis."""

    def run(dit: Any, *inputs: Any, **how: Any) -> Tensor:
        with _rotary(dit.visual_rotary, change, extra):
            return dit(*inputs, **how)

    return through(run)


@contextmanager
def _rotary(angles: RotaryAngles, change: Callable[[Tensor], Tensor], extra: int) -> Iterator[None]:
    right = angles.forward

    def wrong(shape: tuple[int, ...], scale_factor: tuple[float, ...]) -> Tensor:
        return change(right(tuple(size + extra for size in shape), scale_factor))

    angles.forward = wrong
    try:
        yield
    finally:
        del angles.forward


def _first_twice(angles: Tensor) -> Tensor:
    """Positions 0, 0, 1, 2 ... along every axis."""
    for axis in range(3):
        rows = (torch.arange(angles.shape[axis]) - 1).clamp(min=0)
        angles = angles.index_select(axis, rows)
    return angles


def _next_step(timestep: Tensor) -> Tensor:
    """The timestep of the step that follows in the default schedule; the given one where none is."""
    how = Sampling()
    schedule = NUM_TIMESTEPS * sigma_schedule(how.steps, how.shift)
    changed = timestep.clone()
    for here, following in pairwise(schedule):
        changed = torch.where((timestep - here).abs() < 1e-2, following, changed)
    return changed


def _exchange_rows_and_columns(dit: Any, x: Tensor, *rest: Any, **how: Any) -> Tensor:
    return dit(x.transpose(2, 3), *rest, **how).transpose(2, 3)


def _mask_without_frame(dit: Any, x: Tensor, *rest: Any, **how: Any) -> Tensor:
    marked = x.clone()
    marked[:, 0, ..., -1] = 1
    return dit(marked, *rest, **how)


def _image_in_channels(dit: Any, x: Tensor, text: Tensor, pooled: Tensor, at: Tensor, **how: Any) -> Tensor:
    """Given frames in the condition channels and noisy in their own place: as official training does."""
    latents, condition, mask = x.split([16, 16, 1], dim=-1)
    sigma = (at / NUM_TIMESTEPS)[:, None, None, None, None]
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(5))
    noisy = torch.where(mask > 0, (1 - sigma) * latents + sigma * noise, latents)
    condition = torch.where(mask > 0, latents, condition)
    return dit(torch.cat([noisy, condition, mask], dim=-1), text, pooled, at, **how)


def _without_mask(dit: Any, x: Tensor, *rest: Any, **how: Any) -> Tensor:
    return dit(torch.cat([x[..., :-1], torch.zeros_like(x[..., -1:])], dim=-1), *rest, **how)


FAULTS: dict[str, Fault] = {
    "velocity with the wrong sign": through(lambda dit, *inputs, **how: -dit(*inputs, **how)),
    "timestep in units of sigma": with_timestep(lambda at: at / NUM_TIMESTEPS),
    "timestep a tenth too low": with_timestep(lambda at: 0.9 * at),
    "timestep of the next step": with_timestep(_next_step),
    "timestep one of 1000 too high": with_timestep(lambda at: at + 1),
    "rows and columns exchanged": through(_exchange_rows_and_columns),
    "rotary positions 0, 0, 1, 2 ...": rotated(_first_twice, extra=0),
    "rotary positions from 1": rotated(lambda angles: angles[1:, 1:, 1:], extra=1),
    "mask channel set without a given frame": through(_mask_without_frame),
    "pooled text vector zero": through(
        lambda dit, x, text, pooled, at, **how: dit(x, text, 0 * pooled, at, **how)
    ),
    "image template for videos": lambda base: replace(base, encoders=ChangedText(base.encoders, "image")),
    "text repeated for every latent frame": lambda base: replace(
        base, encoders=ChangedText(base.encoders, repeats=5)
    ),
}
IMAGE_FAULTS: dict[str, Fault] = {
    "given frame in the condition channels": through(_image_in_channels),
    "given frame without its mask": through(_without_mask),
}
"""Seen in image to video alone."""
