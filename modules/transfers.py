"""Asynchronous copies of small host tensors to a device."""

from __future__ import annotations

import torch
from torch import Tensor

from modules.host_buffer import host_empty


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return the tensor on the device, valid for computation queued after this call.

    A copy from pageable memory first waits for all that the device has to do, so tensors for a CUDA device
    are pinned; torch's allocator keeps that memory until the copy is made, and then for the next one.

    Raises:
        PinnedMemoryError: there is none left, not even for a small tensor.
    """
    device = torch.device(device)
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = host_empty(tensor.shape, tensor.dtype, pin=True).copy_(tensor)
    return tensor.to(device, non_blocking=True)
