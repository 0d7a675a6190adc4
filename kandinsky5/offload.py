"""Which parts of the DiT live in host memory, and how many may."""

from __future__ import annotations

import torch
from torch import nn

from kandinsky5.dit import DiffusionTransformer3D
from kandinsky5.tasks import DitParams
from modules.block_swap import BlockSwap, CopyEngine, spread

RESIDENT_VISUAL_BLOCKS = 2
"""Visual blocks that are never swapped."""


def split_blocks_to_swap(params: DitParams, count: int) -> tuple[int, int]:
    """How many text and how many visual blocks are swapped when `count` are asked for.

    A quarter of them, at most half of the text blocks, are text blocks, as in musubi-tuner.
    """
    text = min(params.num_text_blocks // 2, count // 4)
    return text, count - text


def max_blocks_to_swap(params: DitParams) -> int:
    """The largest `--blocks_to_swap` that the model allows."""
    largest = params.num_text_blocks // 2 + params.num_visual_blocks - RESIDENT_VISUAL_BLOCKS
    most_visual = params.num_visual_blocks - RESIDENT_VISUAL_BLOCKS
    return next(n for n in range(largest, -1, -1) if split_blocks_to_swap(params, n)[1] <= most_visual)


def swapped_blocks(dit: DiffusionTransformer3D, count: int) -> list[nn.Module]:
    """The blocks that `--blocks_to_swap count` streams, in forward order, spread evenly over the depth."""
    num_text, num_visual = split_blocks_to_swap(dit.dit_params, count)
    text, visual = dit.text_blocks(), dit.visual_blocks()
    return [
        *(text[index] for index in spread(num_text, len(text))),
        *(visual[index] for index in spread(num_visual, len(visual))),
    ]


def swap_blocks(
    dit: DiffusionTransformer3D,
    count: int,
    device: torch.device,
    *,
    ring_size: int = 2,
    pin: bool = False,
    engine: CopyEngine | None = None,
) -> BlockSwap:
    """Stream the frozen weights of `count` blocks from host memory; call after LoRA has been injected.

    Modulation stays where it is: it runs before the blocks, and LoRA parameters require gradients.
    """
    return BlockSwap(
        swapped_blocks(dit, count),
        device,
        travels=lambda name: "modulation" not in name,
        ring_size=ring_size,
        pin=pin,
        engine=engine,
    )
