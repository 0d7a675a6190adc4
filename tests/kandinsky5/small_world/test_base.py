"""The shipped base shows what its prompts say; a wrong sign, scale or timestep shows in error or clips."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky5.small_world.world import draw
from kandinsky5.tasks import SMALL_BASE_FOLDER, DitParams, get_task
from tests.kandinsky5.small_world.base_kit import (
    PROMPTS,
    SmallBase,
    sample,
    shares,
    small_base,
    velocity_error,
)

SEEDS = (0,)
MEGABYTE = 2**20

LEAST_SHAPE = LEAST_COLOUR = LEAST_MOTION = 0.9
"""Of 200 clips, ten prompts and twenty seeds, all were right when the base was made."""
LEAST_FIRST_FRAME_PSNR = 24.0
"""In dB; the VAE alone keeps 29."""


def test_the_base_is_complete_and_small() -> None:
    task = get_task("k5-small-i2v")
    assert task.is_i2v
    for path in (task.dit_path, task.vae_path, task.text_encoder_qwen_path, task.text_encoder_clip_path):
        assert path.exists()
    files = [path for path in SMALL_BASE_FOLDER.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 12 * MEGABYTE


def test_the_base_shows_what_is_asked_for() -> None:
    scenes = [scene for scene in PROMPTS for _ in SEEDS]
    got = shares(scenes, sample(small_base(), scenes, SEEDS * len(PROMPTS)))
    assert got.colour >= LEAST_COLOUR
    assert got.shape >= LEAST_SHAPE
    assert got.motion >= LEAST_MOTION


def test_image_to_video_keeps_the_first_frame_and_moves_it_as_asked() -> None:
    true = draw(PROMPTS, torch.Generator().manual_seed(0))
    clips = sample(small_base(), PROMPTS, range(len(PROMPTS)), images=true[:, :, [0, -1]])
    assert psnr(clips[:, :, 0], true[:, :, 0]) > LEAST_FIRST_FRAME_PSNR
    got = shares(PROMPTS, clips)
    assert got.colour >= LEAST_COLOUR
    assert got.motion >= LEAST_MOTION


def psnr(pixels: Tensor, true: Tensor) -> float:
    """In dB, for pixels in [-1, 1]."""
    return float(10 * torch.log10(4 / (pixels - true).square().mean()))


def negative_velocity(base: SmallBase) -> SmallBase:
    return replace(base, dit=Changed(base.dit, lambda dit, x, *rest, **how: -dit(x, *rest, **how)))


def timestep_in_units_of_sigma(base: SmallBase) -> SmallBase:
    return replace(
        base,
        dit=Changed(base.dit, lambda dit, x, text, pooled, at, **how: dit(x, text, pooled, at / 1000, **how)),
    )


def earlier_timestep(base: SmallBase) -> SmallBase:
    """A tenth too low throughout."""
    return replace(
        base,
        dit=Changed(base.dit, lambda dit, x, text, pooled, at, **how: dit(x, text, pooled, 0.9 * at, **how)),
    )


def no_pooled_text(base: SmallBase) -> SmallBase:
    return replace(
        base,
        dit=Changed(base.dit, lambda dit, x, text, pooled, at, **how: dit(x, text, 0 * pooled, at, **how)),
    )


def rows_and_columns_exchanged(base: SmallBase) -> SmallBase:
    """As patches cut in the wrong order would."""

    def run(dit: Any, x: Tensor, *rest: Any, **how: Any) -> Tensor:
        return dit(x.transpose(2, 3), *rest, **how).transpose(2, 3)

    return replace(base, dit=Changed(base.dit, run))


def mask_set_for_no_frame(base: SmallBase) -> SmallBase:
    """Text to video with the mask channel of a given first frame."""

    def run(dit: Any, x: Tensor, *rest: Any, **how: Any) -> Tensor:
        marked = x.clone()
        marked[:, 0, ..., -1] = 1
        return dit(marked, *rest, **how)

    return replace(base, dit=Changed(base.dit, run))


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


SEEN_BY_THE_JUDGE = (negative_velocity, timestep_in_units_of_sigma, rows_and_columns_exchanged)
FAULTS = (*SEEN_BY_THE_JUDGE, earlier_timestep, mask_set_for_no_frame, no_pooled_text)
"""The base makes up for the last three: its clips are right all the same, and only its error grows."""


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_the_input_or_the_output_of_the_model_raises_its_error(
    fault: Callable[[SmallBase], SmallBase],
) -> None:
    """On drawn clips the base has its least error: the same noise, with the right and the wrong model."""
    assert velocity_error(fault(small_base())) > 1.1 * velocity_error(small_base())


@pytest.mark.slow
@pytest.mark.parametrize("fault", SEEN_BY_THE_JUDGE)
def test_a_fault_in_the_input_or_the_output_of_the_model_lowers_the_score(
    fault: Callable[[SmallBase], SmallBase],
) -> None:
    """Each alone: the right and the wrong model sample the same prompts from the same noise."""
    scenes = [scene for scene in PROMPTS for _ in SEEDS]
    seeds = SEEDS * len(PROMPTS)
    right = shares(scenes, sample(small_base(), scenes, seeds))
    wrong = shares(scenes, sample(fault(small_base()), scenes, seeds))
    assert wrong.all_three <= right.all_three - 0.2, (right, wrong)
