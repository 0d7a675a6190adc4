"""The copies of a CUDA device, on a pretended one that does everything at once: sizes, places and order."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from modules import host_buffer
from modules.activation_offload import ActivationOffload, StreamMover
from modules.block_swap import StreamCopies
from modules.staged_copies import StagedCopies
from tests.modules.test_activation_offload import equal, layers, step
from tests.modules.test_block_swap import make_blocks, sample, swap, train_step

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _pretended_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    def do_nothing(*_: object) -> None:
        pass

    def stream(*_: object) -> SimpleNamespace:
        return SimpleNamespace(wait_event=do_nothing, wait_stream=do_nothing)

    empty = torch.empty
    monkeypatch.setattr(torch.cuda, "Stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    monkeypatch.setattr(torch.cuda, "stream", nullcontext)
    monkeypatch.setattr(
        torch.cuda, "Event", lambda: SimpleNamespace(record=do_nothing, synchronize=do_nothing)
    )
    monkeypatch.setattr(Tensor, "record_stream", do_nothing)
    monkeypatch.setattr(torch, "empty", lambda *size, pin_memory=False, **named: empty(*size, **named))
    monkeypatch.setattr(host_buffer, "_SPARE_BYTES", 64)  # several pieces even of small tensors


@pytest.mark.parametrize("is_staged", [False, True])
def test_blocks_arrive_whole(is_staged: bool) -> None:
    expected = [train_step(make_blocks()), sample(make_blocks())]
    copies = StreamCopies(CPU)
    blocks = make_blocks()
    swap(blocks, StagedCopies(copies, 128, pin=True) if is_staged else copies)
    for run, wanted in zip((train_step, sample), expected, strict=True):
        assert equal(run(blocks), wanted)


def test_activations_come_back_as_they_went() -> None:
    assert equal(step(layers(), ActivationOffload(StreamMover(CPU), min_bytes=0)), step(layers(), None))
    mover = StreamMover(CPU)
    # A view that is not contiguous, of a size that is no power of two.
    tensor = torch.randn(7, 33).bfloat16().t()
    assert torch.equal(mover.to_device(mover.to_host(tensor), CPU), tensor)
