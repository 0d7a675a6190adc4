"""Keeps what autograd saves in host memory between the forward and the backward pass."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from modules.host_buffer import HostBuffer, as_bytes


class TensorMover(Protocol):
    """Copies tensors to host memory and back, beside the computation."""

    def to_host(self, tensor: Tensor) -> Any:
        """Begin a copy to host memory; the tensor may be released at once. Returns what `to_device` takes."""
        ...

    def to_device(self, host: Any, device: torch.device) -> Tensor:
        """Begin the copy back."""
        ...

    def wait(self, tensor: Tensor) -> None:
        """Let the computation queued from now on see a tensor that is on its way back."""
        ...


class DirectMover:
    """Copies at once, for devices that compute in the order of the program."""

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        return host.to(device)

    def wait(self, tensor: Tensor) -> None:
        pass


@dataclass(frozen=True, slots=True)
class _HostCopy:
    """A tensor in page-locked memory."""

    buffer: HostBuffer
    shape: torch.Size
    dtype: torch.dtype


class StreamMover:
    """Copies through page-locked memory on a side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def to_host(self, tensor: Tensor) -> _HostCopy:
        # torch's allocator keeps freed page-locked memory for the next step.
        host = _HostCopy(HostBuffer(tensor.nbytes, pin=True), tensor.shape, tensor.dtype)
        flat = as_bytes(tensor)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for place, piece in host.buffer.pieces():
                piece.copy_(flat[place], non_blocking=True)
        flat.record_stream(self._stream)
        return host

    def to_device(self, host: _HostCopy, device: torch.device) -> Tensor:
        with torch.cuda.stream(self._stream):
            flat = torch.empty(host.buffer.size, dtype=torch.uint8, device=device)
            for place, piece in host.buffer.pieces():
                flat[place].copy_(piece, non_blocking=True)
        return flat.view(host.dtype).view(host.shape)

    def wait(self, tensor: Tensor) -> None:
        current = torch.cuda.current_stream(self._device)
        current.wait_stream(self._stream)
        tensor.record_stream(current)


def tensor_mover(device: torch.device) -> TensorMover:
    """The mover that fits the device."""
    return StreamMover(device) if device.type == "cuda" else DirectMover()


@dataclass(slots=True, weakref_slot=True)
class _Offloaded:
    """One saved tensor that is away."""

    index: int
    host: Any
    device: torch.device
    returning: Tensor | None = None


class ActivationOffload:
    """Sends large saved tensors to host memory and brings each back one ahead of its use.

    Args:
        min_bytes: smaller tensors stay where they are.
    """

    def __init__(self, mover: TensorMover, *, min_bytes: int) -> None:
        self._mover = mover
        self._min_bytes = min_bytes
        # Weak: what a failed pass has saved goes with its graph.
        self._away: WeakValueDictionary[int, _Offloaded] = WeakValueDictionary()
        self._count = 0

    def hooks(self) -> AbstractContextManager[None]:
        """Around the part of the forward pass whose saved tensors go to the host."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def count_away(self) -> int:
        """How many tensors wait in host memory."""
        return len(self._away)

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not tensor.requires_grad or tensor.numel() * tensor.element_size() < self._min_bytes:
            return tensor
        entry = _Offloaded(self._count, self._mover.to_host(tensor), tensor.device)
        self._away[self._count] = entry
        self._count += 1
        return entry

    def _unpack(self, saved: Tensor | _Offloaded) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        self._return(saved)
        assert saved.returning is not None
        self._mover.wait(saved.returning)
        tensor, saved.returning = saved.returning, None
        self._away.pop(saved.index, None)
        following = self._away.get(saved.index - 1)  # the backward pass asks in the opposite order
        if following is not None:
            self._return(following)
        return tensor

    def _return(self, entry: _Offloaded) -> None:
        if entry.returning is None:
            entry.returning = self._mover.to_device(entry.host, entry.device)
