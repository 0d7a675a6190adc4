"""Offloads the tensors that autograd saves to host memory between the forward and the backward pass."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import ReferenceType, WeakSet, WeakValueDictionary, ref

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from modules.block_swap import StreamCopies
from modules.byte_sizes import size_text
from modules.host_buffer import HostBuffer, PinnedMemoryError, as_bytes, empty_pinned_cache
from modules.logs import get_logger
from modules.staged_copies import StagedCopies, staging_size

log = get_logger(__name__)


class TensorMover(Protocol):
    """Copies tensors to host memory and back, beside the computation."""

    def to_host(self, tensor: Tensor) -> Any:
        """Start a copy to host memory; the tensor may be freed at once. Returns a handle for `to_device`."""
        ...

    def to_device(self, host: Any, device: torch.device) -> Any:
        """Start the copy back. Returns a handle for `wait`."""
        ...

    def wait(self, ticket: Any) -> Tensor:
        """Return the device tensor, valid for computation queued after this call."""
        ...


class DirectMover:
    """Copies synchronously, for devices that execute in program order."""

    def to_host(self, tensor: Tensor) -> Tensor:
        return tensor.detach().to("cpu", copy=True)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        return host.to(device)

    def wait(self, ticket: Tensor) -> Tensor:
        return ticket


@dataclass(eq=False, slots=True, weakref_slot=True)
class _HostCopy:
    """The bytes of a tensor in host memory."""

    buffer: HostBuffer
    shape: torch.Size
    dtype: torch.dtype


@dataclass(slots=True)
class _Returning:
    """A tensor on its way back."""

    flat: Tensor
    host: _HostCopy
    engine: StreamCopies | StagedCopies
    ticket: Any


class StreamMover:
    """Copies on a side stream of a CUDA device: through pinned memory as far as it is available.

    If the system cannot provide that much pinned memory, all copies move to pageable memory and go through
    two pinned buffers from then on.

    Device memory stays in the order of the computation's stream: a tensor that leaves is held until the next
    one leaves or returns, which waits for its copy. With `Tensor.record_stream` it would be free only once
    the host sees that the copy is done, and the host runs many blocks ahead of the device.
    """

    def __init__(self, device: torch.device) -> None:
        self._streams = StreamCopies(device)
        self._engine: StreamCopies | StagedCopies = self._streams
        """Staged once there was no pinned memory left."""
        self._leaving: tuple[Tensor, Any] | None = None
        self._copies: WeakSet[_HostCopy] = WeakSet()

    def to_host(self, tensor: Tensor) -> _HostCopy:
        self._release()
        flat = as_bytes(tensor)
        host = _HostCopy(self._host_buffer(tensor.nbytes), tensor.shape, tensor.dtype)
        self._copies.add(host)
        self._leaving = flat, self._engine.start_back(flat, host.buffer)
        return host

    def to_device(self, host: _HostCopy, device: torch.device) -> _Returning:
        self._release()
        flat = torch.empty(host.buffer.size, dtype=torch.uint8, device=device)
        return _Returning(flat, host, self._engine, self._engine.start(host.buffer, flat))

    def wait(self, ticket: _Returning) -> Tensor:
        ticket.engine.wait(ticket.ticket)
        return ticket.flat.view(ticket.host.dtype).view(ticket.host.shape)

    def _release(self) -> None:
        """Let the computation queued from now on use the memory of the tensor that left last."""
        if self._leaving is not None:
            self._engine.wait(self._leaving[1])
            self._leaving = None

    def _host_buffer(self, size: int) -> HostBuffer:
        """Room for one tensor; torch's allocator keeps freed pinned memory for the next step."""
        if self._engine is self._streams:
            try:
                return HostBuffer(size, pin=True)
            except PinnedMemoryError as error:
                self._unpin(size, error)
        return HostBuffer(size, pin=False)

    def _unpin(self, size: int, error: PinnedMemoryError) -> None:
        self._streams.synchronize()
        pinned = sum(copy.buffer.size for copy in self._copies)
        log.warning(
            "activations now go to pageable host memory, which may be slower: %s were pinned, %s",
            size_text(pinned),
            error,
        )
        for copy in list(self._copies):
            copy.buffer.unpin()
        empty_pinned_cache()
        self._engine = StagedCopies(self._streams, staging_size(size), pin=True)


def tensor_mover(device: torch.device) -> TensorMover:
    """Return the mover for the device."""
    return StreamMover(device) if device.type == "cuda" else DirectMover()


@dataclass(eq=False, slots=True, weakref_slot=True)
class _Offloaded:
    """One tensor that is away, which several nodes of the graph may have saved."""

    index: int
    host: Any
    device: torch.device
    source: ReferenceType[Tensor]
    version: int
    uses: int = 1
    """Times that the backward pass will ask for it."""
    returning: Any = None
    tensor: Tensor | None = None
    """On the device again, until its last use."""

    def is_same(self, tensor: Tensor) -> bool:
        """Whether a tensor is the one that is away, unchanged."""
        return self.source() is tensor and self.version == tensor._version


class ActivationOffload:
    """Offloads large saved tensors to host memory and prefetches each one ahead of its use.

    A tensor saved by many blocks, such as the text, is copied once each way.

    Args:
        min_bytes: smaller tensors stay where they are.
    """

    def __init__(self, mover: TensorMover, *, min_bytes: int) -> None:
        self._mover = mover
        self._min_bytes = min_bytes
        # Weak: what a failed pass has saved goes with its graph.
        self._away: WeakValueDictionary[int, _Offloaded] = WeakValueDictionary()
        self._ahead: _Offloaded | None = None
        """On its way back before it is asked for: its memory may not be released before it has arrived."""
        self._count = 0

    def hooks(self) -> AbstractContextManager[None]:
        """Context for the part of the forward pass whose saved tensors are offloaded."""
        return saved_tensors_hooks(self._pack, self._unpack)

    def count_away(self) -> int:
        """Number of tensors currently in host memory."""
        return len(self._away)

    def _pack(self, tensor: Tensor) -> Tensor | _Offloaded:
        if not tensor.requires_grad or tensor.numel() * tensor.element_size() < self._min_bytes:
            return tensor
        self._settle()
        for entry in self._waiting():
            if entry.is_same(tensor):
                entry.uses += 1
                return entry
        host = self._mover.to_host(tensor)
        entry = _Offloaded(self._count, host, tensor.device, ref(tensor), tensor._version)
        self._away[self._count] = entry
        self._count += 1
        return entry

    def _unpack(self, saved: Tensor | _Offloaded) -> Tensor:
        if isinstance(saved, Tensor):
            return saved
        if saved.tensor is None:
            self._return(saved)
            saved.tensor, saved.returning = self._mover.wait(saved.returning), None
            if self._ahead is saved:
                self._ahead = None
        tensor = saved.tensor
        saved.uses -= 1
        if saved.uses <= 0:
            saved.tensor = None
            self._away.pop(saved.index, None)
        if self._ahead is None:
            self._fetch_before(saved.index)
        return tensor

    def _fetch_before(self, index: int) -> None:
        """Begin the return of what the backward pass, which goes in the opposite order, asks for next."""
        for entry in self._waiting():
            if entry.index < index and entry.tensor is None:
                self._return(entry)
                self._ahead = entry
                return

    def _waiting(self) -> Iterable[_Offloaded]:
        """What is away, the last first."""
        entries = list(self._away.values())
        return sorted(entries, key=lambda entry: -entry.index)

    def _return(self, entry: _Offloaded) -> None:
        if entry.returning is None:
            entry.returning = self._mover.to_device(entry.host, entry.device)

    def _settle(self) -> None:
        """Wait for what a pass that failed had begun to fetch."""
        if self._ahead is not None:
            self._mover.wait(self._ahead.returning)
            self._ahead = None
