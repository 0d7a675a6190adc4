"""Activation offload without a GPU: a mover that copies late and shows what must not be read yet."""

from __future__ import annotations

import random
from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.activation_offload import ActivationOffload, DirectMover


class LateMover:
    """Copies arrive at random times: to the host at the latest before they return, back when waited for.

    Until then the target is not a number throughout. Nothing arrives because something else was waited for.
    """

    def __init__(self, seed: int, *, early: float = 0.3) -> None:
        self._random = random.Random(seed)
        self._early = early
        self._pending: list[tuple[Tensor, Tensor]] = []
        """Targets and sources of the copies that have not been made."""
        self.waits = 0
        self.forget_wait: int | None = None
        """The number of a wait to leave out."""

    def to_host(self, tensor: Tensor) -> Tensor:
        # The clone stands for memory that a stream keeps until its copy is done.
        return self._copy(tensor.detach().clone())

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        return self._copy(host)

    def wait(self, ticket: Tensor) -> Tensor:
        self.waits += 1
        if self.waits != self.forget_wait:
            self._finish(ticket)
        return ticket

    def _copy(self, source: Tensor) -> Tensor:
        target = torch.full_like(source, torch.nan)
        self._pending.append((target, source))
        if self._random.random() < self._early:
            self._finish(target)
        return target

    def _finish(self, target: Tensor) -> None:
        for index, (pending, source) in enumerate(self._pending):
            if pending is target:
                del self._pending[index]
                self._finish(source)  # it may be on its way itself
                target.copy_(source)
                return


def layers() -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(5)]


def step(
    blocks: list[nn.Module], offload: ActivationOffload | None, fail_at: int | None = None
) -> list[Tensor]:
    x = torch.randn(4, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
    given = x
    for index, block in enumerate(blocks):
        block.zero_grad()
        if index == fail_at:
            raise RuntimeError("stop here")
        if offload is None:
            x = checkpoint(block, x, use_reentrant=False)
        else:
            with offload.hooks():
                x = checkpoint(block, x, use_reentrant=False)
    x.square().sum().backward()
    parameters = [parameter for block in blocks for parameter in block.parameters()]
    return [x.detach(), *(t.grad for t in (given, *parameters) if t.grad is not None)]


def equal(ours: list[Tensor], others: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))


@pytest.mark.parametrize("seed", range(5))
def test_copies_that_come_late_change_no_gradient(seed: int) -> None:
    offload = ActivationOffload(LateMover(seed), min_bytes=1)
    blocks = layers()
    for _ in range(2):
        assert equal(step(blocks, offload), step(layers(), None))


def test_leaving_out_any_one_wait_is_noticed() -> None:
    counting = LateMover(0, early=0)
    step(layers(), ActivationOffload(counting, min_bytes=1))
    assert counting.waits == 5
    for forgotten in range(1, counting.waits + 1):
        mover = LateMover(0, early=0)
        mover.forget_wait = forgotten
        got = step(layers(), ActivationOffload(mover, min_bytes=1))
        assert not equal(got, step(layers(), None)), forgotten


def test_what_a_failed_pass_left_behind_is_forgotten() -> None:
    offload = ActivationOffload(LateMover(0), min_bytes=1)
    blocks = layers()
    with pytest.raises(RuntimeError, match="stop here"):
        step(blocks, offload, fail_at=3)
    assert offload.count_away() == 0
    assert equal(step(blocks, offload), step(layers(), None))
    assert offload.count_away() == 0


class RecordingMover(DirectMover):
    """Notes in which order tensors leave, begin to return and are waited for, by their number."""

    def __init__(self) -> None:
        self.events: list[tuple[str, int]] = []
        self._left: list[Tensor] = []

    def number(self, host: Tensor) -> int:
        return next(index for index, left in enumerate(self._left) if left is host)

    def to_host(self, tensor: Tensor) -> Tensor:
        host = super().to_host(tensor)
        self._left.append(host)
        self.events.append(("leaves", self.number(host)))
        return host

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:  # type: ignore[override]
        self.events.append(("returns", self.number(host)))
        return host

    def wait(self, ticket: Tensor) -> Tensor:
        self.events.append(("waited for", self.number(ticket)))
        return ticket


def attending_step(
    offload: ActivationOffload | None,
    *,
    events: list[tuple[str, int]] | None = None,
    change_text: bool = False,
) -> list[Tensor]:
    """Five blocks that take the same second tensor, as large as the first."""
    torch.manual_seed(0)
    weight = torch.randn(8, 8, requires_grad=True)
    visual, text = torch.randn(2, 4, 8).unbind(0)
    visual, text = (tensor @ weight for tensor in (visual, text))

    def block(visual: Tensor, text: Tensor) -> Tensor:
        if events is not None:
            events.append(("computes", 0))
        return torch.tanh(visual @ weight + text)

    for number in range(5):
        if change_text and number == 2:
            with torch.no_grad():
                text.add_(1.0)
        with nullcontext() if offload is None else offload.hooks():
            visual = checkpoint(block, visual, text, use_reentrant=False)
    visual.square().sum().backward()
    assert weight.grad is not None
    return [weight.grad]


def test_the_next_large_tensor_is_fetched_ahead_and_what_all_blocks_share_travels_once() -> None:
    mover = RecordingMover()
    offload = ActivationOffload(mover, min_bytes=1)
    assert equal(attending_step(offload, events=mover.events), attending_step(None))
    # 0 and 1 are the first block's visual input and the text, 2 to 5 the later visual inputs.
    assert [number for what, number in mover.events if what == "leaves"] == [0, 1, 2, 3, 4, 5]
    assert [number for what, number in mover.events if what == "waited for"] == [5, 1, 4, 3, 2, 0]
    for number in (4, 3, 2, 0):
        begun, needed = mover.events.index(("returns", number)), mover.events.index(("waited for", number))
        assert ("computes", 0) in mover.events[begun:needed], f"{number} comes when it is needed, not ahead"
    assert offload.count_away() == 0


@pytest.mark.parametrize("seed", range(3))
def test_late_copies_of_a_shared_tensor_change_no_gradient(seed: int) -> None:
    offload = ActivationOffload(LateMover(seed), min_bytes=1)
    for _ in range(2):
        assert equal(attending_step(offload), attending_step(None))


def test_a_shared_tensor_that_changed_in_between_travels_again() -> None:
    mover = RecordingMover()
    attending_step(ActivationOffload(mover, min_bytes=1), change_text=True)
    assert [what for what, _ in mover.events].count("leaves") == 7


def test_a_fetch_that_a_failed_backward_pass_left_under_way_ends_before_its_memory_is_used_again() -> None:
    mover = RecordingMover()
    offload = ActivationOffload(mover, min_bytes=1)
    blocks = layers()
    blocks[2].register_full_backward_hook(_fail)
    with pytest.raises(RuntimeError, match="stop in the backward pass"):
        step(blocks, offload)
    begun = {number for what, number in mover.events if what == "returns"}
    step(layers(), offload)
    arrived = {number for what, number in mover.events if what == "waited for"}
    assert begun <= arrived


def _fail(*_: object) -> None:
    raise RuntimeError("stop in the backward pass")
