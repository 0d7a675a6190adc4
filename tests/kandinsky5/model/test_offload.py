"""What streams and what is kept, and the limits of the model; `test_equal_gradients` compares numbers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from kandinsky5.model import offload
from kandinsky5.model.offload import (
    choose_page_locking,
    max_blocks_to_swap,
    split_blocks_to_swap,
    stream_weights,
    streamed_groups,
)
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TINY_PARAMS, DitParams
from modules.activation_offload import ActivationOffload, DirectMover
from modules.flops import FlopCounter
from modules.host_memory import page_locked_size
from tests.kandinsky5.training.lora_steps import LoraModel
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
    model = LoraModel()
    with FlopCounter() as recomputed:
        model.step()
    model.dit.kept_attention_blocks = 3
    with FlopCounter() as kept:
        model.step()
    assert kept.total < recomputed.total


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
    model = LoraModel()
    model.dit.activation_offload = ActivationOffload(mover, min_bytes=2 * 16 * 128 * 4)
    model.step()  # the text is smaller; the first block's input needs no gradient
    assert mover.left == mover.returned == 5


def test_page_locked_copies_of_all_groups_share_half_of_the_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    dit = tiny_dit(num_visual_blocks=6)
    groups = streamed_groups(dit, 4, wants_modulation=True, ring_size=2)
    sizes = [sum(map(page_locked_size, group.packed_sizes())) for group in groups]
    cuda = torch.device("cuda")
    for available, wanted in (
        (2 * sum(sizes) + 2, [True, True]),
        (2 * sum(sizes), [True, False]),
        (2 * sizes[0], [False, sizes[1] < sizes[0]]),
        (0, [False, False]),
    ):
        monkeypatch.setattr(offload, "available_memory", lambda found=available: found)
        assert choose_page_locking(groups, cuda, force=False) == wanted
        assert choose_page_locking(groups, cuda, force=True) == [True, True]
        assert choose_page_locking(groups, torch.device("cpu"), force=True) == [False, False]
