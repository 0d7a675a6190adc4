"""Block swap without a GPU: an engine that copies late and spoils what may not be read any more."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.block_swap import BlockSwap, CopyEngine, DirectCopies, spread
from modules.host_buffer import HostBuffer


class LateCopies:
    """Spoils the buffer at once; the copy arrives at a random time, at the latest when it is waited for."""

    def __init__(self, seed: int, *, early: float = 0.5) -> None:
        self._random = random.Random(seed)
        self._early = early
        self.starts = 0
        self.waits = 0
        self.forget_wait: int | None = None
        """The number of a wait to leave out."""

    def start(self, host: HostBuffer, buffer: Tensor) -> Callable[[], object]:
        self.starts += 1
        buffer.fill_(0xFF)  # not a number in every float format
        if self._random.random() < self._early:
            host.copy_to(buffer)
            return lambda: None
        return lambda: host.copy_to(buffer)

    def wait(self, ticket: Callable[[], object]) -> None:
        self.waits += 1
        if self.waits != self.forget_wait:
            ticket()


class Block(nn.Module):
    """A frozen layer and a trainable one."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        self.norm = nn.LayerNorm(width).requires_grad_(False)
        self.trained = nn.Linear(width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.tanh(self.frozen(self.norm(x))) + self.trained(x)


def make_blocks(count: int = 6) -> list[Block]:
    torch.manual_seed(0)
    return [Block(8) for _ in range(count)]


def train_step(blocks: list[Block]) -> list[Tensor]:
    given = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
    x = given
    for block in blocks:
        x = checkpoint(block, x, use_reentrant=False)
    x.square().sum().backward()
    gradients = [given.grad, *(block.trained.weight.grad for block in blocks)]
    for block in blocks:
        block.trained.weight.grad = None
    return [x.detach(), *(gradient for gradient in gradients if gradient is not None)]


@torch.no_grad()
def sample(blocks: list[Block]) -> list[Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for block in blocks:
            x = block(x)
    return [x]


def swap(blocks: list[Block], engine: CopyEngine, ring_size: int = 2) -> BlockSwap:
    chosen = [blocks[index] for index in spread(4, len(blocks))]
    return BlockSwap(chosen, torch.device("cpu"), travels=lambda _: True, ring_size=ring_size, engine=engine)


@pytest.mark.parametrize("ring_size", [1, 2, 3, 4])
@pytest.mark.parametrize("seed", range(3))
def test_training_and_sampling_in_any_order_equal_resident_blocks(seed: int, ring_size: int) -> None:
    expected = [train_step(make_blocks()), sample(make_blocks())]
    blocks = make_blocks()
    swap(blocks, LateCopies(seed), ring_size)
    for kind in (0, 1, 1, 0, 0, 1):
        got = (train_step, sample)[kind](blocks)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[kind], strict=True))


def test_leaving_out_any_one_wait_is_noticed() -> None:
    """Each wait guards something: without it the spoilt buffer reaches the result."""
    expected = train_step(make_blocks())
    counting = LateCopies(0, early=0)
    blocks = make_blocks()
    swap(blocks, counting)
    train_step(blocks)
    for forgotten in range(1, counting.waits + 1):
        engine = LateCopies(0, early=0)
        engine.forget_wait = forgotten
        blocks = make_blocks()
        swap(blocks, engine)
        got = train_step(blocks)
        assert not all(torch.equal(a, b) for a, b in zip(got, expected, strict=True)), forgotten


def test_an_error_in_the_middle_of_a_pass_leaves_the_ring_usable() -> None:
    expected = train_step(make_blocks())
    blocks = make_blocks()
    swap(blocks, LateCopies(0))

    def fail(*_: object) -> None:
        raise RuntimeError("stop here")

    for run in (train_step, sample):
        hook = blocks[3].register_forward_pre_hook(fail)
        with pytest.raises(RuntimeError, match="stop here"):
            run(blocks)
        hook.remove()
        assert all(torch.equal(a, b) for a, b in zip(train_step(blocks), expected, strict=True))


def test_a_training_step_copies_every_block_up_and_down_but_the_turning_ones_once() -> None:
    blocks = make_blocks()
    engine = LateCopies(0)
    swap(blocks, engine)
    train_step(blocks)
    first = engine.starts
    assert first == 4 + 2  # four on the way up; the last two are still there on the way down
    train_step(blocks)
    assert engine.starts == first + 2 + 2  # and the first two for the next step


def test_a_block_without_its_weights_cannot_be_used() -> None:
    blocks = make_blocks()
    swap(blocks, DirectCopies())
    with pytest.raises(RuntimeError):
        blocks[0].frozen(torch.zeros(1, 8))


def test_removing_the_swap_restores_the_weights_and_sizes_are_reported() -> None:
    blocks = make_blocks()
    before = [block.frozen.weight.clone() for block in blocks]
    swapper = swap(blocks, DirectCopies())
    assert swapper.host_bytes == 2 * swapper.device_bytes
    train_step(blocks)
    swapper.remove()
    assert all(
        torch.equal(a, b) for a, b in zip((block.frozen.weight for block in blocks), before, strict=True)
    )
