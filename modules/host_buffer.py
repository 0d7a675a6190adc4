"""Host buffers that can be pinned at any size with little rounding overhead."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from modules.byte_sizes import size_text
from modules.errors import ResourceError
from modules.host_memory import available_memory, page_locked_size
from modules.memory_errors import is_memory_error

SPARE_BYTES = 2**20
"""A buffer takes less than this more than what it holds."""


class PinnedMemoryError(ResourceError):
    """The system cannot provide the requested pinned host memory."""


def host_empty(shape: Sequence[int], dtype: torch.dtype, *, pin: bool) -> Tensor:
    """`torch.empty` in host memory, pinned if `pin`.

    Raises:
        PinnedMemoryError: torch's own error for it is a CUDA error that reads as if the GPU were full.
    """
    if not pin:
        return torch.empty(shape, dtype=dtype)
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except (RuntimeError, MemoryError) as error:
        if not _is_pinned_memory_error(error):
            raise
    empty_pinned_cache()  # torch keeps freed memory by its size and does not give it back for another
    try:
        return torch.empty(shape, dtype=dtype, pin_memory=True)
    except (RuntimeError, MemoryError) as error:
        if not _is_pinned_memory_error(error):
            raise
        size = dtype.itemsize * math.prod(shape)
        raise PinnedMemoryError(_pinned_memory_message(size)) from error


def _is_pinned_memory_error(error: BaseException) -> bool:
    """Whether an allocation of pinned memory failed because there is none."""
    return "out of memory" in str(error) or is_memory_error(error)


def _pinned_memory_message(size: int) -> str:
    available = available_memory()
    known = f"; {size_text(available)} of host memory are available" if available else ""
    return (
        f"no pinned (page-locked) host memory left for {size_text(size)}{known}. It is not the GPU's memory "
        "that ran out. Close other programs; under WSL 2, which lends little of it, use Windows itself or a "
        "plain Linux; in a container, raise its memory limit"
    )


def empty_pinned_cache() -> None:
    """Return pinned memory cached by torch to the system."""
    if hasattr(torch.accelerator, "empty_host_cache"):
        torch.accelerator.empty_host_cache()
    elif hasattr(torch._C, "_host_emptyCache"):  # CUDA builds before torch 2.11
        torch._C._host_emptyCache()


class HostBuffer:
    """Bytes of host memory.

    torch allocates a power of two for every pinned tensor, up to twice its size. The memory is therefore in
    pieces, each a power of two.

    Args:
        size: bytes.
        pin: pin the memory.
    Raises:
        PinnedMemoryError: there is not enough pinned memory.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        lengths = _piece_lengths(size)
        pieces = [host_empty((length,), torch.uint8, pin=pin) for length in lengths]
        self._pieces = [*pieces[:-1], pieces[-1][: size - sum(lengths[:-1])]]
        self.size = size

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The memory in order, each part with its place in the whole."""
        start = 0
        for piece in self._pieces:
            yield slice(start, start + len(piece)), piece
            start += len(piece)

    def fill(self, start: int, given: Tensor) -> None:
        """Copy the bytes of a tensor, which may be on any device, to the place that begins at `start`."""
        flat = as_bytes(given)
        for place, piece in self.pieces():
            first, last = max(place.start, start), min(place.stop, start + len(flat))
            if first < last:
                piece[first - place.start : last - place.start].copy_(flat[first - start : last - start])

    def unpin(self) -> None:
        """Move the contents to pageable memory; no copy may be under way."""
        for index in range(len(self._pieces)):
            self._pieces[index] = torch.empty(len(self._pieces[index]), dtype=torch.uint8).copy_(
                self._pieces[index]
            )
        empty_pinned_cache()

    def copy_to(self, buffer: Tensor) -> None:
        """Copy all of it into [size] bytes on any device."""
        for place, piece in self.pieces():
            buffer[place].copy_(piece)


def as_bytes(tensor: Tensor) -> Tensor:
    """Any tensor -> its bytes, [tensor.nbytes] uint8; a copy only if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def page_locked_buffer_size(size: int) -> int:
    """Bytes of pinned memory that a buffer takes."""
    return sum(_piece_lengths(size))


def _piece_lengths(size: int) -> list[int]:
    """Powers of two, the largest first, that hold `size` bytes together."""
    if size <= SPARE_BYTES:
        return [page_locked_size(size)]
    units = -(-size // SPARE_BYTES)
    bits = range(units.bit_length() - 1, -1, -1)
    return [SPARE_BYTES << bit for bit in bits if units >> bit & 1]
