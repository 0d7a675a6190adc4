"""Copies between pageable host memory and a device through two pinned buffers, by a thread.

A device copies beside the computation only from and to pinned memory, and pinning all of the weights or
activations takes more memory than many machines can spare. While the device works on one buffer the thread
works on the other; what is larger than a buffer goes in parts.
"""

from __future__ import annotations

from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from modules.host_buffer import HostBuffer, host_empty
from modules.host_memory import page_locked_size

STAGING_BUFFERS = 2
_STAGING_BYTES = 2**26
"""Large enough for the full speed of a copy, small beside a block of a large model."""


def staging_size(largest: int) -> int:
    """Bytes of each of the two buffers, for copies of up to `largest` bytes."""
    return min(page_locked_size(largest), _STAGING_BYTES)


class FencedCopies(Protocol):
    """Copies of pinned memory whose three stages can be called separately, from any thread."""

    def fence(self) -> Any:
        """An event after all computation queued so far."""
        ...

    def start_after(self, fence: Any, source: Tensor, target: Tensor) -> Any:
        """Begin copying, to the device or from it, behind the fence; returns a ticket."""
        ...

    def wait(self, ticket: Any) -> None:
        """Make computation queued after this call wait for the copy."""
        ...

    def finish(self, ticket: Any) -> None:
        """Return when the copy has been made: its host memory may then be used again."""
        ...


@dataclass(slots=True)
class _Staging:
    buffer: Tensor
    ticket: Any = None
    """Of the last copy out of it or into it."""


class StagedCopies:
    """A copy engine for pageable memory.

    Args:
        copies: how a pinned buffer is copied to the device.
        size: bytes of each buffer.
        pin: pin the buffers; off where there is no device to copy to.
    Raises:
        PinnedMemoryError: not even the buffers can be pinned.
    """

    def __init__(self, copies: FencedCopies, size: int, *, pin: bool) -> None:
        self._copies = copies
        self._staging = [_Staging(host_empty((size,), torch.uint8, pin=pin)) for _ in range(STAGING_BUFFERS)]
        self._turn = 0
        # One thread: copies are made in the order in which they were asked for.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="staged-copies")

    def start(self, host: HostBuffer, buffer: Tensor) -> Future[list[Any]]:
        """Begin copying `host` into `buffer` once all computation queued so far is done with the buffer."""
        return self._thread.submit(self._copy, self._copies.fence(), host, buffer)

    def start_back(self, buffer: Tensor, host: HostBuffer) -> Future[list[Any]]:
        """Begin copying `buffer`, as the computation queued so far leaves it, to `host`."""
        return self._thread.submit(self._copy_back, self._copies.fence(), buffer, host)

    def wait(self, ticket: Future[list[Any]]) -> None:
        """Make computation queued after this call wait for the copy; its errors are raised here.

        A copy to the host has been made when this returns.
        """
        for part in ticket.result():
            self._copies.wait(part)

    def _copy(self, fence: Any, host: HostBuffer, buffer: Tensor) -> list[Any]:
        size = len(self._staging[0].buffer)
        return [
            self._copy_part(fence, part, target)
            for place, piece in host.pieces()
            for part, target in zip(piece.split(size), buffer[place].split(size), strict=True)
        ]

    def _copy_part(self, fence: Any, host: Tensor, buffer: Tensor) -> Any:
        staging = self._next()
        part = staging.buffer[: host.numel()]
        part.copy_(host)
        staging.ticket = self._copies.start_after(fence, part, buffer)
        return staging.ticket

    def _copy_back(self, fence: Any, buffer: Tensor, host: HostBuffer) -> list[Any]:
        size = len(self._staging[0].buffer)
        arriving: tuple[_Staging, Tensor] | None = None
        for place, piece in host.pieces():
            for part, source in zip(piece.split(size), buffer[place].split(size), strict=True):
                staging = self._next()
                staging.ticket = self._copies.start_after(fence, source, staging.buffer[: part.numel()])
                if arriving is not None:
                    self._put(*arriving)
                arriving = staging, part
        if arriving is not None:
            self._put(*arriving)
        return []

    def _put(self, staging: _Staging, host: Tensor) -> None:
        self._copies.finish(staging.ticket)
        host.copy_(staging.buffer[: host.numel()])

    def _next(self) -> _Staging:
        """The buffer whose turn it is, free again."""
        staging = self._staging[self._turn]
        self._turn = (self._turn + 1) % len(self._staging)
        if staging.ticket is not None:
            self._copies.finish(staging.ticket)
        return staging
