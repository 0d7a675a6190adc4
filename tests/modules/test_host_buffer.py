"""Host memory in pieces."""

from __future__ import annotations

import pytest
import torch

from modules import host_buffer
from modules.host_buffer import HostBuffer, as_bytes, page_locked_buffer_size
from modules.host_memory import page_locked_size

MIB = 2**20


@pytest.mark.parametrize("size", [0, 1, 64, 65, MIB - 1, MIB, MIB + 1, 3 * MIB, 257 * MIB + 77, 2**33 - 1])
def test_page_locked_memory_is_hardly_larger_than_what_it_holds(size: int) -> None:
    taken = page_locked_buffer_size(size)
    assert size <= taken < size + MIB
    assert taken <= page_locked_size(size) or size > MIB
    lengths = host_buffer._piece_lengths(size)
    assert sum(map(page_locked_size, lengths)) == taken  # torch adds nothing


@pytest.mark.parametrize("spare", [16, 64, MIB])
def test_what_is_filled_in_comes_out_in_one_piece(spare: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_buffer, "SPARE_BYTES", spare)
    first, second = torch.randn(7, 5), torch.randn(3, 4).to(torch.float8_e4m3fn)
    # A view that is not contiguous, a single number, and nothing at all.
    third, fourth, fifth = torch.arange(40.0).view(5, 8).t(), torch.tensor(3.0), torch.empty(0)
    given = (first, second, third, fourth, fifth)
    buffer = HostBuffer(sum(tensor.nbytes for tensor in given), pin=False)
    pieces = list(buffer.pieces())
    assert len(pieces) == len(host_buffer._piece_lengths(buffer.size))
    start = 0
    for tensor in given:
        buffer.fill(start, tensor)
        start += tensor.nbytes
    out = torch.zeros(buffer.size, dtype=torch.uint8)
    buffer.copy_to(out)
    assert torch.equal(out, torch.cat([as_bytes(tensor) for tensor in given]))
    assert torch.equal(torch.cat([piece for _, piece in pieces]), out)
