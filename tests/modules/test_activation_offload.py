"""Activation offload without a GPU: a mover that copies late and shows what must not be read yet."""

from __future__ import annotations

import random

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.activation_offload import ActivationOffload


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

    def wait(self, tensor: Tensor) -> None:
        self.waits += 1
        if self.waits != self.forget_wait:
            self._finish(tensor)

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
    offload = ActivationOffload(LateMover(seed), min_bytes=0)
    blocks = layers()
    for _ in range(2):
        assert equal(step(blocks, offload), step(layers(), None))


def test_leaving_out_any_one_wait_is_noticed() -> None:
    counting = LateMover(0, early=0)
    step(layers(), ActivationOffload(counting, min_bytes=0))
    assert counting.waits == 5
    for forgotten in range(1, counting.waits + 1):
        mover = LateMover(0, early=0)
        mover.forget_wait = forgotten
        got = step(layers(), ActivationOffload(mover, min_bytes=0))
        assert not equal(got, step(layers(), None)), forgotten


def test_what_a_failed_pass_left_behind_is_forgotten() -> None:
    offload = ActivationOffload(LateMover(0), min_bytes=0)
    blocks = layers()
    with pytest.raises(RuntimeError, match="stop here"):
        step(blocks, offload, fail_at=3)
    assert offload.count_away() == 0
    assert equal(step(blocks, offload), step(layers(), None))
    assert offload.count_away() == 0
