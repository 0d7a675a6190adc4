"""Block swap: weights of frozen blocks stay in host memory and are prefetched to the device.

Nothing is copied back: the weights are frozen, so the host copy stays valid. A ring of device buffers
holds the block that computes and those that come next. In a training step with gradient checkpointing the
order is up through the blocks and down again; the last ones of the way up still serve the way down.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _disable_current_modes

from modules.host_buffer import HostBuffer, PinnedMemoryError, empty_pinned_cache
from modules.logs import get_logger
from modules.staged_copies import StagedCopies, staging_size

log = get_logger(__name__)

_ALIGNMENT = 64
"""Bytes; every tensor of a packed block starts at a multiple of it."""


class CopyEngine(Protocol):
    """Copies packed blocks to the device, overlapped with computation."""

    def start(self, host: HostBuffer, buffer: Tensor) -> Any:
        """Begin copying `host` into `buffer` once all computation queued so far is done with the buffer.

        Returns a ticket for `wait`.
        """
        ...

    def wait(self, ticket: Any) -> None:
        """Make computation queued after this call wait for the copy."""
        ...


class DirectCopies:
    """Copies synchronously, for devices that execute in program order."""

    def start(self, host: HostBuffer, buffer: Tensor) -> None:
        host.copy_to(buffer)

    def wait(self, ticket: Any) -> None:
        pass


class StreamCopies:
    """Copies on a side stream of a CUDA device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)

    def start(self, host: HostBuffer, buffer: Tensor) -> torch.cuda.Event:
        fence = self.fence()
        copied = [self.start_after(fence, piece, buffer[place]) for place, piece in host.pieces()]
        return copied[-1]  # one stream: the others come before it

    def start_back(self, buffer: Tensor, host: HostBuffer) -> torch.cuda.Event:
        """Begin copying `buffer`, as the computation queued so far leaves it, to `host`."""
        fence = self.fence()
        copied = [self.start_after(fence, buffer[place], piece) for place, piece in host.pieces()]
        return copied[-1]

    def fence(self) -> torch.cuda.Event:
        fence = torch.cuda.Event()
        fence.record(torch.cuda.current_stream(self._device))
        return fence

    def start_after(self, fence: torch.cuda.Event, source: Tensor, target: Tensor) -> torch.cuda.Event:
        with torch.cuda.stream(self._stream):
            self._stream.wait_event(fence)
            target.copy_(source, non_blocking=True)
            copied = torch.cuda.Event()
            copied.record(self._stream)
        return copied

    def wait(self, ticket: torch.cuda.Event) -> None:
        torch.cuda.current_stream(self._device).wait_event(ticket)

    def finish(self, ticket: torch.cuda.Event) -> None:
        ticket.synchronize()

    def synchronize(self) -> None:
        """Return when all copies have been made."""
        self._stream.synchronize()


def copy_engine(device: torch.device, *, pinned: bool, size: int) -> CopyEngine:
    """Return the copy engine for the device and the host memory, for blocks of up to `size` bytes."""
    if device.type != "cuda":
        return DirectCopies()
    copies = StreamCopies(device)
    return copies if pinned else StagedCopies(copies, staging_size(size), pin=True)


@dataclass(frozen=True, slots=True)
class _Part:
    """One frozen tensor of a block and its place in the packed bytes."""

    tensor: Tensor
    start: int
    dtype: torch.dtype
    shape: torch.Size

    def view_in(self, packed: Tensor) -> Tensor:
        size = self.dtype.itemsize * self.shape.numel()
        return packed[self.start : self.start + size].view(self.dtype).view(self.shape)


class _PackedBlock:
    """A block's frozen tensors in one buffer of host memory."""

    def __init__(self, tensors: Iterable[Tensor], *, pin: bool) -> None:
        self._parts: list[_Part] = []
        size = 0
        for tensor in tensors:
            self._parts.append(_Part(tensor, size, tensor.dtype, tensor.shape))
            size += _aligned_size(tensor)
        self.host = HostBuffer(size, pin=pin)
        for part in self._parts:
            self.host.fill(part.start, part.tensor.data)
            part.tensor.data = _nowhere(part)

    def tensors(self) -> Iterator[Tensor]:
        """The tensors that are packed."""
        return (part.tensor for part in self._parts)

    def attach(self, buffer: Tensor) -> None:
        """Let the block compute with the copy in `buffer`."""
        for part in self._parts:
            part.tensor.data = part.view_in(buffer)

    def detach(self) -> None:
        """Leave the block without weights: a use at the wrong time is an error and not a wrong number."""
        for part in self._parts:
            part.tensor.data = _nowhere(part)

    def restore(self, device: torch.device) -> None:
        """Give the block weights of its own again."""
        buffer = torch.empty(self.host.size, dtype=torch.uint8, device=device)
        self.host.copy_to(buffer)
        self.attach(buffer)


def _pack(
    blocks: Sequence[nn.Module], travels: Callable[[str], bool], *, pin: bool
) -> tuple[list[_PackedBlock], bool]:
    """The packed blocks, and whether they are pinned: all of them, or none where that is impossible."""
    done: list[_PackedBlock] = []
    for block in blocks:
        try:
            done.append(_PackedBlock(travelling_tensors(block, travels), pin=pin))
        except PinnedMemoryError as error:
            log.warning(
                "weights stay in pageable host memory, which may be slower: %d of %d modules were pinned, %s",
                len(done),
                len(blocks),
                error,
            )
            pin = False
            for packed in done:
                packed.host.unpin()
            empty_pinned_cache()
            done.append(_PackedBlock(travelling_tensors(block, travels), pin=False))
    return done, pin


def _nowhere(part: _Part) -> Tensor:
    return torch.empty(0, dtype=part.dtype)


@dataclass(slots=True)
class _Slot:
    """One device buffer of the ring."""

    buffer: Tensor
    position: int | None = None
    """Index of the swapped block in the buffer."""
    ticket: Any = None


class BlockSwap:
    """Streams the frozen weights of some blocks through a ring of device buffers.

    Args:
        blocks: the swapped blocks in the order in which they run forward. Their parameters that require no
            gradient and for which `travels(name)` holds are packed; all others stay where they are.
        device: where the blocks compute.
        ring_size: device buffers; with two or more the next fills while one computes.
        pin: pinned host memory, which a device reads faster and beside the computation; pageable memory
            passes through two pinned buffers.
        engine: how copies are made.
    """

    def __init__(
        self,
        blocks: Sequence[nn.Module],
        device: torch.device,
        *,
        travels: Callable[[str], bool],
        ring_size: int = 2,
        pin: bool = False,
        engine: CopyEngine | None = None,
    ) -> None:
        if ring_size < 1:
            raise ValueError("the ring requires at least one buffer")
        self._device = device
        self._packed, self.is_pinned = _pack(blocks, travels, pin=pin)
        largest = max(packed.host.size for packed in self._packed)
        self._engine = engine or copy_engine(device, pinned=self.is_pinned, size=largest)
        self._slots = [
            _Slot(torch.empty(largest, dtype=torch.uint8, device=device))
            for _ in range(min(ring_size, len(blocks)))
        ]
        self._last: int | None = None
        self._hooks = [
            block.register_forward_pre_hook(self._starter(position)) for position, block in enumerate(blocks)
        ]

    def tensors(self) -> Iterator[Tensor]:
        """The parameters and buffers that are streamed."""
        for packed in self._packed:
            yield from packed.tensors()

    @property
    def host_bytes(self) -> int:
        """Host memory that holds the swapped weights."""
        return sum(packed.host.size for packed in self._packed)

    @property
    def device_bytes(self) -> int:
        """Device memory of the ring."""
        return sum(slot.buffer.numel() for slot in self._slots)

    def remove(self) -> None:
        """Restore every block's own weights on the device and stop streaming."""
        for hook in self._hooks:
            hook.remove()
        for packed in self._packed:
            packed.restore(self._device)
        self._slots.clear()

    def _starter(self, position: int) -> Callable[..., None]:
        def start(*_: object) -> None:
            # Selective checkpointing compares the operators of a block with those of its recompute; what is
            # copied differs between the two and is none of its business.
            with _disable_current_modes():
                self._start(position)

        return start

    def _start(self, position: int) -> None:
        """Called before a block runs, on the way up and again for its recompute on the way down."""
        wanted = self._wanted(position)
        for ahead in wanted:
            if all(slot.position != ahead for slot in self._slots):
                self._fetch(ahead, keep=wanted)
        slot = next(slot for slot in self._slots if slot.position == position)
        if slot.ticket is not None:
            self._engine.wait(slot.ticket)
            slot.ticket = None
        self._packed[position].attach(slot.buffer)
        self._last = position

    def _wanted(self, position: int) -> list[int]:
        """This block and those that come after it, as many as the ring holds."""
        count, reach = len(self._packed), len(self._slots)
        if not torch.is_grad_enabled():  # sampling passes through the blocks again and again
            return [(position + step) % count for step in range(reach)]
        if self._last is not None and position <= self._last:  # the recompute, on the way down
            return list(range(position, max(position - reach, -1), -1))
        return list(range(position, min(position + reach, count)))

    def _fetch(self, position: int, keep: Sequence[int]) -> None:
        slot = next(slot for slot in self._slots if slot.position not in keep)
        if slot.position is not None:
            if slot.ticket is not None:
                self._engine.wait(slot.ticket)  # fetched but never used
            self._packed[slot.position].detach()
        slot.position = position
        host = self._packed[position].host
        slot.ticket = self._engine.start(host, slot.buffer[: host.size])


def packed_sizes(blocks: Iterable[nn.Module], travels: Callable[[str], bool]) -> list[int]:
    """Bytes of each block in host memory, before anything is packed; a ring's buffers take the largest."""
    return [sum(_aligned_size(tensor) for tensor in travelling_tensors(block, travels)) for block in blocks]


def _aligned_size(tensor: Tensor) -> int:
    return -(-tensor.numel() * tensor.dtype.itemsize // _ALIGNMENT) * _ALIGNMENT


def travelling_tensors(block: nn.Module, travels: Callable[[str], bool]) -> Iterator[Tensor]:
    """The frozen parameters and the buffers of a block that stream."""
    for name, parameter in block.named_parameters():
        if not parameter.requires_grad and travels(name):
            yield parameter
    for name, buffer in block.named_buffers():
        if travels(name):
            yield buffer


def spread(count: int, total: int) -> list[int]:
    """`count` of `total` indices, evenly spaced: resident blocks compute while swapped ones are copied."""
    return [index * total // count for index in range(count)]
