"""When MagCache skips and what it reuses; the official decisions are checked by the goldens."""

from __future__ import annotations

import pytest
import torch

from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.model.magcache import MagCache, effective_ratios, task_ratios
from kandinsky5.sampling.sampler import GuidedVelocity, euler_sample, sigma_schedule
from kandinsky5.tasks import TASKS
from tests.tiny import tiny_dit


def test_official_ratios_cover_fifty_steps_of_known_tasks() -> None:
    with_ratios = [name for name in TASKS if task_ratios(name) is not None]
    assert len(with_ratios) == 11
    for name in with_ratios:
        ratios = task_ratios(name)
        assert ratios is not None
        assert len(effective_ratios(ratios, 50)) == 100


@pytest.mark.parametrize("uses_guidance", [True, False])
def test_ratios_of_one_never_leave_the_blocks_out_more_than_twice_in_a_row(uses_guidance: bool) -> None:
    cache = MagCache([1.0] * 98, 50, uses_guidance=uses_guidance)
    calls = 100 if uses_guidance else 50
    skipped = [cache.next_pass().skip for _ in range(calls)]
    branch = skipped[::2] if uses_guidance else skipped
    assert branch[:10] == [False] * 10  # the first fifth always runs
    assert branch[10:16] == [True, True, False] * 2


def test_skipped_passes_do_not_run_the_visual_blocks() -> None:
    dit = tiny_dit()
    runs = []
    dit.visual_transformer_blocks[0].register_forward_pre_hook(lambda *_: runs.append(1))
    generator = torch.Generator().manual_seed(0)
    caption = TextConditioning(torch.randn(4, 64, generator=generator), torch.randn(32, generator=generator))
    text = pad_text([caption], device="cpu", dtype=torch.float32)
    cache = MagCache([1.0] * 18, 10, uses_guidance=True)
    velocity = GuidedVelocity(VelocityModel(dit, (1.0, 2.0, 2.0)), text, text, 5.0, magcache=cache)
    noise = torch.randn(1, 16, 2, 4, 4, generator=generator)
    with torch.no_grad():
        euler_sample(velocity, noise, sigma_schedule(10, 10.0))
    assert len(cache.skipped) == 20
    assert len(runs) == 20 - sum(cache.skipped) < 20
