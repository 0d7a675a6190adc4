"""Pageable weights by way of two staging buffers, with copies that leave late and arrive late."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from modules.host_buffer import HostBuffer
from modules.staged_copies import StagedCopies
from tests.modules.test_block_swap import make_blocks, sample, swap, train_step

Ticket = Callable[[], None]


class LateFencedCopies:
    """Spoils the target at once and reads the source as late as the rules allow."""

    def __init__(self, seed: int) -> None:
        self._random = random.Random(seed)
        self.forgets_to_finish = False
        self.fences = 0

    def fence(self) -> int:
        self.fences += 1
        return self.fences

    def start_after(self, fence: int, source: Tensor, target: Tensor) -> Ticket:
        assert fence <= self.fences
        target.fill_(0xFF)  # not a number in every float format
        lock = threading.Lock()
        is_done = False

        def arrive() -> None:
            nonlocal is_done
            with lock:
                if not is_done:
                    target.copy_(source)
                is_done = True

        if self._random.random() < 0.3:
            arrive()
        return arrive

    def wait(self, ticket: Ticket) -> None:
        ticket()

    def finish(self, ticket: Ticket) -> None:
        if not self.forgets_to_finish:
            ticket()


def staged(copies: LateFencedCopies, size: int = 10_000) -> StagedCopies:
    return StagedCopies(copies, size, pin=False)


@pytest.mark.parametrize("ring_size", [1, 2, 4])
@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [10_000, 100], ids=["whole", "in_parts"])
def test_training_and_sampling_equal_resident_blocks(size: int, seed: int, ring_size: int) -> None:
    expected = [train_step(make_blocks()), sample(make_blocks())]
    blocks = make_blocks()
    swap(blocks, staged(LateFencedCopies(seed), size), ring_size)
    for kind in (0, 1, 1, 0):
        got = (train_step, sample)[kind](blocks)
        assert all(torch.equal(a, b) for a, b in zip(got, expected[kind], strict=True))


def test_filling_a_staging_buffer_before_it_has_left_is_noticed() -> None:
    expected = sample(make_blocks())
    copies = LateFencedCopies(1)
    copies.forgets_to_finish = True
    blocks = make_blocks()
    swap(blocks, staged(copies), ring_size=4)
    assert not torch.equal(sample(blocks)[0], expected[0])


def test_a_copy_that_fails_is_an_error_where_it_is_waited_for() -> None:
    engine = staged(LateFencedCopies(0))
    ticket = engine.start(HostBuffer(200, pin=False), torch.zeros(100, dtype=torch.uint8))
    with pytest.raises(RuntimeError, match="must match the size"):
        engine.wait(ticket)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("size", [10_000, 100, 7], ids=["whole", "in_parts", "in_many_parts"])
def test_what_goes_to_the_host_has_arrived_when_it_is_waited_for(size: int, seed: int) -> None:
    engine = staged(LateFencedCopies(seed), size)
    tensors = [torch.randint(0, 255, (count,), dtype=torch.uint8) for count in (700, 99, 1)]
    hosts = [HostBuffer(len(tensor), pin=False) for tensor in tensors]
    for tensor, host in zip(tensors, hosts, strict=True):
        engine.wait(engine.start_back(tensor, host))
        tensor_before = tensor.clone()
        tensor.zero_()  # the computation may use its memory again
        returned = torch.empty_like(tensor)
        engine.wait(engine.start(host, returned))
        assert torch.equal(returned, tensor_before)
