"""The copies of a CUDA device, on a pretended one that does everything at once: sizes, places and order."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from modules import activation_offload, block_swap, host_buffer
from modules.activation_offload import ActivationOffload, StreamMover
from modules.block_swap import BlockSwap, StreamCopies
from modules.errors import ResourceError
from modules.host_buffer import HostBuffer
from modules.staged_copies import StagedCopies
from tests.modules.test_activation_offload import equal, layers, step
from tests.modules.test_block_swap import make_blocks, sample, swap, train_step

CPU = torch.device("cpu")


class PinnedMemory:
    """`torch.empty` of a system that lends so much page-locked memory; freed blocks stay in torch's cache."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.limit = 2**40
        self.taken = 0
        """Bytes in use or in the cache, which is returned as a whole."""
        self._empty = torch.empty
        self._in_use: list[Any] = []
        patch.setattr(torch, "empty", self.empty)
        patch.setattr(torch.accelerator, "empty_host_cache", self.empty_cache, raising=False)

    def empty(self, *size: Any, pin_memory: bool = False, **named: Any) -> Tensor:
        if not pin_memory:
            return self._empty(*size, **named)
        made = self._empty(*size, **named)
        if self.taken + made.nbytes > self.limit:
            raise torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be ...")
        self.taken += made.nbytes
        self._in_use.append((made.untyped_storage()._weak_ref(), made.nbytes))
        return made

    def empty_cache(self) -> None:
        storage = torch.UntypedStorage
        self._in_use = [(weak, size) for weak, size in self._in_use if not storage._expired(weak)]
        self.taken = sum(size for _, size in self._in_use)


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> PinnedMemory:
    def do_nothing(*_: object) -> None:
        pass

    def stream(*_: object) -> SimpleNamespace:
        return SimpleNamespace(wait_event=do_nothing, wait_stream=do_nothing, synchronize=do_nothing)

    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(
        torch.cuda,
        "Event",
        lambda: SimpleNamespace(record=do_nothing, synchronize=do_nothing),
    )
    monkeypatch.setattr(host_buffer, "SPARE_BYTES", 64)  # several pieces even of small tensors
    return PinnedMemory(monkeypatch)


@pytest.fixture
def warned(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the log warns of."""
    lines: list[str] = []
    for log in (activation_offload.log, block_swap.log):
        monkeypatch.setattr(log, "warning", lambda line, *values: lines.append(line % values))
    return lines


@pytest.mark.parametrize("is_staged", [False, True])
def test_blocks_arrive_whole(is_staged: bool) -> None:
    expected = [train_step(make_blocks()), sample(make_blocks())]
    copies = StreamCopies(CPU)
    blocks = make_blocks()
    swap(blocks, StagedCopies(copies, 128, pin=True) if is_staged else copies)
    for run, wanted in zip((train_step, sample), expected, strict=True):
        assert equal(run(blocks), wanted)


def test_activations_come_back_as_they_went() -> None:
    assert equal(step(layers(), ActivationOffload(StreamMover(CPU), min_bytes=1)), step(layers(), None))
    mover = StreamMover(CPU)
    # A view that is not contiguous, of a size that is no power of two.
    tensor = torch.randn(7, 33).bfloat16().t()
    assert torch.equal(mover.wait(mover.to_device(mover.to_host(tensor), CPU)), tensor)


def test_memory_of_a_tensor_that_left_is_free_in_the_order_of_the_computation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Not once the host sees that the copy is done, by when it has queued many more blocks."""
    waited: list[object] = []
    current = SimpleNamespace(wait_event=waited.append)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda *_: current)
    monkeypatch.setattr(Tensor, "record_stream", pytest.fail)
    mover = StreamMover(CPU)
    first, second = torch.randn(16), torch.randn(16)
    storage = first.untyped_storage()._weak_ref()
    mover.to_host(first)
    del first
    assert not torch.UntypedStorage._expired(storage), "the copy may not have been made"
    assert not waited
    host = mover.to_host(second)
    assert len(waited) == 1
    assert torch.UntypedStorage._expired(storage)
    mover.to_device(host, CPU)
    assert len(waited) == 2


@pytest.mark.parametrize("limit", [0, 100, 128, 300, 500], ids=lambda limit: f"{limit}_bytes")
def test_activations_move_to_pageable_memory_when_no_more_can_be_page_locked(
    limit: int, pinned: PinnedMemory, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five tensors of 128 bytes leave; whatever number of them can be page-locked, gradients are the same."""
    monkeypatch.setattr(activation_offload, "staging_size", lambda size: 48)
    pinned.limit = max(limit, 2 * 48)
    offload = ActivationOffload(StreamMover(CPU), min_bytes=1)
    blocks = layers()
    for _ in range(2):
        assert equal(step(blocks, offload), step(layers(), None))
    (warning,) = warned
    assert "activations now go to pageable host memory" in warning
    assert "no pinned (page-locked) host memory left" in warning
    assert "It is not the GPU's memory that ran out" in warning
    assert pinned.taken == 2 * 48, "what had been pinned was not returned"


def test_freed_page_locked_memory_of_another_size_is_returned_before_any_fallback(
    pinned: PinnedMemory, warned: list[str]
) -> None:
    pinned.limit = 300
    mover = StreamMover(CPU)
    for numbers in (64, 50, 33):  # clips of other sizes; torch keeps freed memory by its size
        tensor = torch.randn(numbers)
        assert torch.equal(mover.wait(mover.to_device(mover.to_host(tensor), CPU)), tensor)
    assert not warned


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_weights_that_cannot_be_page_locked_stream_through_staging_buffers(
    share: float, pinned: PinnedMemory, warned: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(block_swap, "staging_size", lambda size: 64)
    monkeypatch.setattr(block_swap, "copy_engine", _engine_as_for_cuda)
    expected = [train_step(make_blocks()), sample(make_blocks())]
    blocks = make_blocks()
    pinned.limit = max(2 * 64, int(share * sum(p.nbytes for block in blocks for p in block.parameters())))
    stream = BlockSwap(blocks, CPU, travels=lambda name: "modulation" not in name, pin=True)
    (warning,) = warned
    assert "weights stay in pageable host memory" in warning
    assert "no pinned (page-locked) host memory left" in warning
    assert not stream.is_pinned
    assert pinned.taken == 2 * 64
    for run, wanted in zip((train_step, sample), expected, strict=True):
        assert equal(run(blocks), wanted)


def _engine_as_for_cuda(device: torch.device, *, pinned: bool, size: int) -> StreamCopies | StagedCopies:
    copies = StreamCopies(device)
    return copies if pinned else StagedCopies(copies, block_swap.staging_size(size), pin=True)


def test_where_nothing_at_all_can_be_page_locked_the_error_names_host_memory(pinned: PinnedMemory) -> None:
    pinned.limit = 10
    mover = StreamMover(CPU)
    for allocate in (
        lambda: StagedCopies(StreamCopies(CPU), 64, pin=True),
        lambda: HostBuffer(64, pin=True),
        lambda: mover.to_host(torch.zeros(64)),
    ):
        with pytest.raises(ResourceError, match=r"no pinned \(page-locked\) host memory left for") as caught:
            allocate()
        assert caught.value.exit_code == 5


def test_other_errors_of_the_device_are_not_taken_for_a_lack_of_host_memory(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object, **__: object) -> Tensor:
        raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "empty", fail)
    with pytest.raises(torch.AcceleratorError, match="illegal memory access"):
        HostBuffer(64, pin=True)
