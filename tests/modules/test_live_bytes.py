"""Bytes are counted from the birth of a tensor to the end of its last user."""

from __future__ import annotations

import pytest
import torch

from modules.host_memory import page_locked_size
from modules.live_bytes import LiveBytes


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_count_once_and_the_dead_not_at_all(device: str) -> None:
    given = torch.zeros(1000, device=device)
    with LiveBytes() as counted:
        doubled = given * 2
        half = doubled[:500]
        given.view(10, 100)
        assert counted.live == 4000
        del doubled
        assert counted.live == 4000  # its storage lives on in the view
        del half
        assert counted.live == 0
    assert counted.peak == 4000


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_what_autograd_saved_counts_until_the_backward_pass(device: str) -> None:
    weight = torch.zeros(1000, device=device, requires_grad=True)
    with LiveBytes() as counted:
        loss = (weight * weight).exp().sum()
        assert counted.live == 4000 + 4  # the result of exp, and the loss
        loss.backward()
        del loss
        assert weight.grad is not None
        assert counted.live == 4000
        counted.forget(weight.grad)
        assert counted.live == 0


def test_page_locked_memory_is_taken_in_powers_of_two() -> None:
    assert [page_locked_size(size) for size in (0, 1, 64, 65, 2**28 + 1)] == [0, 1, 64, 128, 2**29]
