"""Host memory that can be page-locked at any size with next to nothing left over."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from modules.host_memory import page_locked_size

_SPARE_BYTES = 2**20
"""A buffer takes less than this more than what it holds."""


class HostBuffer:
    """Bytes of host memory.

    torch takes a power of two for every page-locked tensor, up to twice its size. The memory is therefore in
    pieces, each a power of two.

    Args:
        size: bytes.
        pin: page-lock the memory.
    """

    def __init__(self, size: int, *, pin: bool) -> None:
        lengths = _piece_lengths(size)
        pieces = [torch.empty(length, dtype=torch.uint8, pin_memory=pin) for length in lengths]
        self._pieces = [*pieces[:-1], pieces[-1][: size - sum(lengths[:-1])]]
        self.size = size

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """The memory in order, each part with its place in the whole."""
        start = 0
        for piece in self._pieces:
            yield slice(start, start + len(piece)), piece
            start += len(piece)

    def fill(self, start: int, given: Tensor) -> None:
        """Copy the bytes of a tensor, which may lie on any device, to the place that begins at `start`."""
        flat = as_bytes(given)
        for place, piece in self.pieces():
            first, last = max(place.start, start), min(place.stop, start + len(flat))
            if first < last:
                piece[first - place.start : last - place.start].copy_(flat[first - start : last - start])

    def copy_to(self, buffer: Tensor) -> None:
        """Copy all of it into [size] bytes on any device."""
        for place, piece in self.pieces():
            buffer[place].copy_(piece)


def as_bytes(tensor: Tensor) -> Tensor:
    """Any tensor -> its bytes, [tensor.nbytes] uint8; a copy only if it is not contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


def page_locked_buffer_size(size: int) -> int:
    """Bytes of page-locked memory that a buffer takes."""
    return sum(_piece_lengths(size))


def _piece_lengths(size: int) -> list[int]:
    """Powers of two, the largest first, that hold `size` bytes together."""
    if size <= _SPARE_BYTES:
        return [page_locked_size(size)]
    units = -(-size // _SPARE_BYTES)
    bits = range(units.bit_length() - 1, -1, -1)
    return [_SPARE_BYTES << bit for bit in bits if units >> bit & 1]
