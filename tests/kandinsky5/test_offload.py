"""Streaming the DiT's blocks changes no number; the limits are those of the model."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kandinsky5.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.offload import max_blocks_to_swap, split_blocks_to_swap, swap_blocks
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TINY_PARAMS, DitParams
from networks.lora_kandinsky import create_network
from tests.modules.test_block_swap import LateCopies
from tests.tiny import tiny_dit


@pytest.mark.parametrize(
    ("params", "largest", "split"),
    [(PRO_PARAMS, 60, (2, 58)), (LITE_PARAMS, 31, (1, 30)), (TINY_PARAMS, 2, (0, 2))],
    ids=["Pro", "Lite", "tiny"],
)
def test_the_largest_number_of_swapped_blocks(
    params: DitParams, largest: int, split: tuple[int, int]
) -> None:
    assert max_blocks_to_swap(params) == largest
    assert split_blocks_to_swap(params, largest) == split


def lora_step(count: int) -> list[Tensor]:
    """Output and LoRA gradients of one checkpointed step with `count` swapped blocks."""
    dit = tiny_dit(num_visual_blocks=6)
    network = create_network(
        dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=0
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    dit.gradient_checkpointing = True
    if count:
        swap_blocks(dit, count, torch.device("cpu"), engine=LateCopies(0))
    generator = torch.Generator().manual_seed(0)
    text = TextConditioning(torch.randn(5, 64, generator=generator), torch.randn(32, generator=generator))
    velocity = VelocityModel(dit, (1.0, 2.0, 2.0))(
        torch.randn(1, 16, 2, 8, 8, generator=generator),
        torch.tensor([0.4]),
        pad_text([text], device="cpu", dtype=torch.float32),
    )
    velocity.square().mean().backward()
    return [velocity.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def test_a_lora_step_is_bit_equal_with_and_without_swapped_blocks() -> None:
    resident, swapped = lora_step(0), lora_step(4)
    assert len(resident) == len(swapped) > 100
    assert all(torch.equal(a, b) for a, b in zip(resident, swapped, strict=True))
