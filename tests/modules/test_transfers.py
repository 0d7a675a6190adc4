"""Small tensors on their way to a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.transfers import send


def test_what_goes_to_a_cuda_device_is_page_locked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def pin(tensor: Tensor) -> Tensor:
        calls.append("pin")
        return tensor

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    send(torch.zeros(2), "cuda")
    assert calls == ["pin", ("cuda", True)]
    calls.clear()
    send(torch.zeros(2), torch.device("cpu"))
    assert calls == [("cpu", True)]
