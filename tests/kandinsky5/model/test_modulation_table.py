"""Modulation computed once per sampling run gives what computing it in every pass gives."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from torch import Tensor

from kandinsky5.model.conditioning import TextBatch, VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.modulation_table import ModulationTable
from kandinsky5.sampling.sampler import GuidedVelocity, euler_sample, sigma_schedule
from tests.tiny import tiny_dit

STEPS = 3
CPU = torch.device("cpu")


def caption(seed: int) -> TextBatch:
    generator = torch.Generator().manual_seed(seed)
    return TextBatch(
        torch.randn(1, 5, 64, generator=generator), torch.randn(1, 32, generator=generator), None
    )


@torch.no_grad()
def sample(dit: DiffusionTransformer3D, guidance: float, *, uses_table: bool) -> Tensor:
    texts = [caption(0), caption(1)] if guidance != 1.0 else [caption(0)]
    schedule = sigma_schedule(STEPS, 10.0)
    table = None
    if uses_table:
        table = ModulationTable(dit, schedule[:-1], [text.pooled_text_embed for text in texts], CPU)
    velocity = GuidedVelocity(
        VelocityModel(dit, (1.0, 2.0, 2.0)),
        texts[0],
        texts[1] if len(texts) > 1 else None,
        guidance,
        modulation=table,
    )
    noise = torch.randn(1, 16, 2, 4, 4, generator=torch.Generator().manual_seed(2))
    return euler_sample(velocity, noise, schedule)


@pytest.mark.parametrize("guidance", [1.0, 4.0])
def test_the_latents_are_those_of_modulation_in_every_pass(guidance: float) -> None:
    dit = tiny_dit()
    torch.testing.assert_close(
        sample(dit, guidance, uses_table=True), sample(dit, guidance, uses_table=False), rtol=1e-5, atol=1e-5
    )


def test_every_layer_is_read_once_per_run() -> None:
    dit = tiny_dit()
    calls: Counter[str] = Counter()
    for name, layer in dit.named_modules():
        if layer in dit.modulation_layers():
            layer.register_forward_hook(lambda *_, name=name: calls.update([name]))
    sample(dit, 4.0, uses_table=True)
    assert set(calls.values()) == {1}
    assert len(calls) == len(dit.modulation_layers())
    sample(dit, 4.0, uses_table=False)
    assert set(calls.values()) == {1 + 2 * STEPS}


def test_nothing_is_given_after_a_pass_that_failed() -> None:
    dit = tiny_dit()
    table = ModulationTable(dit, sigma_schedule(STEPS, 10.0)[:-1], [caption(0).pooled_text_embed], CPU)

    def fail() -> None:
        with table.next_pass():
            assert all(layer.given is not None for layer in dit.modulation_layers())
            raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        fail()
    assert all(layer.given is None for layer in dit.modulation_layers())
