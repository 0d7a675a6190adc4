"""Small tensors on their way to a device."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules import transfers
from modules.transfers import send


def test_what_goes_to_a_cuda_device_is_page_locked_first(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []

    def host_empty(shape: torch.Size, dtype: torch.dtype, *, pin: bool) -> Tensor:
        calls.append("pin" if pin else "")
        return torch.zeros(shape, dtype=dtype)

    def to(tensor: Tensor, device: torch.device, *, non_blocking: bool) -> Tensor:
        calls.append((device.type, non_blocking))
        return tensor

    monkeypatch.setattr(transfers, "host_empty", host_empty)
    monkeypatch.setattr(Tensor, "to", to)
    assert send(torch.ones(2), "cuda").tolist() == [1, 1]
    assert calls == ["pin", ("cuda", True)]
    calls.clear()
    send(torch.zeros(2), torch.device("cpu"))
    assert calls == [("cpu", True)]
