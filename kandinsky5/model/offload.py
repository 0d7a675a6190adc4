"""Selects the parts of the DiT that stay in host memory and are streamed to the device."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn

from kandinsky5.configs.weights import DEFAULT_RING_SIZE
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import DitParams
from modules.block_swap import BlockSwap, CopyEngine, packed_sizes, spread, travelling_tensors
from modules.byte_sizes import size_text
from modules.host_buffer import page_locked_buffer_size
from modules.host_memory import available_memory
from modules.logs import get_logger

log = get_logger(__name__)

MODULATION_RING = 2
"""Device buffers of one modulation layer each."""
RESIDENT_VISUAL_BLOCKS = 2
"""Visual blocks that are never swapped."""


def split_blocks_to_swap(params: DitParams, count: int) -> tuple[int, int]:
    """Split `count` swapped blocks into text and visual blocks.

    A quarter of them, at most half of the text blocks, are text blocks, as in musubi-tuner.
    """
    text = min(params.num_text_blocks // 2, count // 4)
    return text, count - text


def max_blocks_to_swap(params: DitParams) -> int:
    """The largest `--blocks_to_swap` that the model allows."""
    largest = params.num_text_blocks // 2 + params.num_visual_blocks - RESIDENT_VISUAL_BLOCKS
    most_visual = params.num_visual_blocks - RESIDENT_VISUAL_BLOCKS
    return next((n for n in range(largest, 0, -1) if split_blocks_to_swap(params, n)[1] <= most_visual), 0)


def swapped_blocks(dit: DiffusionTransformer3D, count: int) -> list[nn.Module]:
    """The blocks that `--blocks_to_swap count` streams, in forward order, spread evenly over the depth."""
    num_text, num_visual = split_blocks_to_swap(dit.dit_params, count)
    text, visual = dit.text_blocks(), dit.visual_blocks()
    return [
        *(text[index] for index in spread(num_text, len(text))),
        *(visual[index] for index in spread(num_visual, len(visual))),
    ]


def host_placement(
    params: DitParams, device: torch.device, *, blocks_to_swap: int, modulation_on_host: bool
) -> Callable[[str], torch.device]:
    """The device each weight is loaded to; streamed weights stay in host memory.

    Modulation is an eighth of the model and is read once per step, so with `modulation_on_host` its weights
    come to the device one layer at a time (`stream_weights`).
    """
    if device.type == "meta":  # weights without data lie nowhere
        return lambda _: device
    with torch.device("meta"):
        skeleton = DiffusionTransformer3D(**params.as_kwargs())
    swapped = set(swapped_blocks(skeleton, blocks_to_swap))
    prefixes = tuple(f"{name}." for name, module in skeleton.named_modules() if module in swapped)

    def place(key: str) -> torch.device:
        is_modulation = "modulation" in key
        stays = modulation_on_host if is_modulation else key.startswith(prefixes)
        return torch.device("cpu") if stays else device

    return place


@dataclass(frozen=True, slots=True)
class StreamedGroup:
    """Modules whose weights share one ring of device buffers."""

    what: str
    modules: Sequence[nn.Module]
    ring_size: int
    takes_modulation: bool

    def travels(self, name: str) -> bool:
        """Whether a weight of one of the modules is streamed."""
        return self.takes_modulation or "modulation" not in name

    def tensors(self) -> Iterator[torch.Tensor]:
        """The streamed tensors."""
        for module in self.modules:
            yield from travelling_tensors(module, self.travels)

    def packed_sizes(self) -> list[int]:
        """Bytes of the host copy of each module."""
        return packed_sizes(self.modules, self.travels)


def streamed_groups(
    dit: DiffusionTransformer3D, count: int, *, wants_modulation: bool, ring_size: int
) -> list[StreamedGroup]:
    """The groups streamed with `count` swapped blocks, with or without modulation."""
    groups = []
    if count:
        groups.append(StreamedGroup("blocks", swapped_blocks(dit, count), ring_size, False))
    if wants_modulation:
        layers = dit.modulation_layers()
        groups.append(StreamedGroup("modulation layers", layers, MODULATION_RING, True))
    return groups


def choose_page_locking(groups: Sequence[StreamedGroup], device: torch.device, *, force: bool) -> list[bool]:
    """Whether the host copies of each group are pinned: for CUDA, in half of the available memory.

    Not on Windows, where pinned memory is taken from what the device shares with other programs.
    """
    left = 0 if sys.platform == "win32" else available_memory() // 2
    chosen = []
    for group in groups:
        size = sum(map(page_locked_buffer_size, group.packed_sizes()))
        is_locked = device.type == "cuda" and (force or size < left)
        left -= size if is_locked else 0
        chosen.append(is_locked)
    return chosen


def stream_weights(
    dit: DiffusionTransformer3D,
    count: int,
    device: torch.device,
    *,
    ring_size: int = DEFAULT_RING_SIZE,
    force_pin: bool = False,
    engine: CopyEngine | None = None,
) -> None:
    """Stream the frozen weights of `count` blocks, and modulation that lies on the host; call after LoRA.

    Modulation does not travel with the blocks: it runs before them and once per step, so it has a ring of its
    own. LoRA parameters stay on the device. The host copies are pinned when the device reads them faster
    so and they take less than half of the available memory, or when `force_pin` says so; pageable copies pass
    through two pinned buffers. If the system does not give as much pinned memory, a warning says so
    and the copies are pageable.

    Args:
        ring_size: device buffers for the blocks.
        engine: how copies are made, also where nothing needs to be copied.
    """
    modulation = dit.modulation_layers()
    is_away = any(t.device.type != device.type for layer in modulation for t in layer.parameters())
    wants_modulation = is_away or engine is not None
    groups = streamed_groups(dit, count, wants_modulation=wants_modulation, ring_size=ring_size)
    for group, pin in zip(groups, choose_page_locking(groups, device, force=force_pin), strict=True):
        stream = BlockSwap(
            group.modules,
            device,
            travels=group.travels,
            ring_size=group.ring_size,
            pin=pin,
            engine=engine,
        )
        dit.weight_streams.append(stream)
        log.info(
            "%d %s stream from %s host memory: %s there, %s of buffers on the device",
            len(group.modules),
            group.what,
            "pinned" if stream.is_pinned else "pageable",
            size_text(stream.host_bytes),
            size_text(stream.device_bytes),
        )


@contextmanager
def resident_weights_on_host(
    dit: DiffusionTransformer3D, device: torch.device, *, enabled: bool
) -> Iterator[None]:
    """Within the block the resident weights are in host memory; the model cannot run meanwhile.

    Streamed weights keep their rings of buffers and do not move.
    """
    if not enabled or device.type == "cpu":
        yield
        return
    travelling = {id(tensor) for stream in dit.weight_streams for tensor in stream.tensors()}
    resident = [
        tensor
        for tensor in (*dit.parameters(), *dit.buffers())
        if tensor.device.type == device.type and id(tensor) not in travelling
    ]
    try:
        for tensor in resident:
            tensor.data = tensor.data.to("cpu")
        yield
    finally:
        for tensor in resident:
            tensor.data = tensor.data.to(device)
