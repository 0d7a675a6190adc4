"""Streaming the DiT's blocks changes no number; the limits are those of the model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kandinsky5.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.dit import DiffusionTransformer3D
from kandinsky5.offload import max_blocks_to_swap, split_blocks_to_swap, stream_weights
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TINY_PARAMS, DitParams
from modules.activation_offload import ActivationOffload, DirectMover
from networks.lora_kandinsky import create_network
from tests.flops import count_flops
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


def lora_step(prepare: Callable[[DiffusionTransformer3D], object] | None = None) -> list[Tensor]:
    """Output and LoRA gradients of one checkpointed step of a model that `prepare` has changed."""
    dit = tiny_dit(num_visual_blocks=6)
    network = create_network(
        dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=0
    )
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    dit.gradient_checkpointing = True
    if prepare is not None:
        prepare(dit)
    generator = torch.Generator().manual_seed(0)
    text = TextConditioning(torch.randn(5, 64, generator=generator), torch.randn(32, generator=generator))
    velocity = VelocityModel(dit, (1.0, 2.0, 2.0))(
        torch.randn(1, 16, 2, 8, 8, generator=generator),
        torch.tensor([0.4]),
        pad_text([text], device="cpu", dtype=torch.float32),
    )
    velocity.square().mean().backward()
    return [velocity.detach(), *(p.grad for p in network.parameters() if p.grad is not None)]


def stream_blocks(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 4, torch.device("cpu"), engine=LateCopies(0))


def stream_modulation(dit: DiffusionTransformer3D) -> None:
    stream_weights(dit, 0, torch.device("cpu"), engine=LateCopies(0))


def no_checkpointing(dit: DiffusionTransformer3D) -> None:
    dit.gradient_checkpointing = False


def keep_attention(dit: DiffusionTransformer3D) -> None:
    dit.kept_attention_blocks = 3


def offload_activations(dit: DiffusionTransformer3D) -> None:
    dit.activation_offload = ActivationOffload(DirectMover(), min_bytes=0)


@pytest.mark.parametrize(
    "prepare", [no_checkpointing, keep_attention, offload_activations, stream_blocks, stream_modulation]
)
def test_a_lora_step_is_bit_equal_however_its_memory_is_kept(
    prepare: Callable[[DiffusionTransformer3D], None],
) -> None:
    plain, prepared = lora_step(), lora_step(prepare)
    assert len(plain) == len(prepared) > 100
    assert all(torch.equal(a, b) for a, b in zip(plain, prepared, strict=True))


def test_blocks_and_modulation_travel_each_in_a_ring_of_their_own() -> None:
    dit = tiny_dit(num_visual_blocks=6)
    names = {id(tensor): name for name, tensor in dit.named_parameters()}
    stream_weights(dit, 4, torch.device("cpu"), engine=LateCopies(0))
    blocks, modulation = ({names[id(tensor)] for tensor in stream.tensors()} for stream in dit.weight_streams)
    assert modulation == {name for name in names.values() if "modulation" in name}
    assert not blocks & modulation
    largest = max(tensor.numel() for name, tensor in tiny_dit().named_parameters() if "modulation" in name)
    assert dit.weight_streams[1].device_bytes >= 2 * 4 * largest


def test_weights_that_lie_on_the_device_do_not_travel() -> None:
    dit = tiny_dit()
    stream_weights(dit, 0, torch.device("cpu"))
    assert not dit.weight_streams


def test_kept_attention_is_not_computed_again() -> None:
    with count_flops() as recomputed:
        lora_step()
    with count_flops() as kept:
        lora_step(keep_attention)
    assert kept.get_total_flops() < recomputed.get_total_flops()


class CountingMover(DirectMover):
    """Counts what leaves and returns."""

    def __init__(self) -> None:
        self.left = self.returned = 0

    def to_host(self, tensor: Tensor) -> Tensor:
        self.left += 1
        return super().to_host(tensor)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        self.returned += 1
        return super().to_device(host, device)


def test_every_block_input_leaves_and_returns_once() -> None:
    mover = CountingMover()

    def prepare(dit: DiffusionTransformer3D) -> None:
        dit.activation_offload = ActivationOffload(mover, min_bytes=2 * 16 * 128 * 4)

    lora_step(prepare)  # the text is smaller; the first block's input needs no gradient
    assert mover.left == mover.returned == 5
