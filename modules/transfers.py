"""Copies of small host tensors to a device that never make the program wait."""

from __future__ import annotations

import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device, for the computation queued from now on.

    A copy from pageable memory first waits for all that the device has to do, so what goes to a CUDA device
    is page-locked; torch's allocator keeps that memory until the copy is made, and then for the next one.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
