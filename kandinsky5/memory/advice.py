"""Out-of-memory messages: the sizes of the step, and the options that would help most."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch

from dataset.geometry import pixel_size
from kandinsky5.configs.train import ModelConfig
from kandinsky5.memory.activations import BatchShape
from kandinsky5.memory.bases import base_for, with_base
from kandinsky5.memory.plan import TrainingPlanner
from kandinsky5.model.offload import max_blocks_to_swap
from modules.byte_sizes import size_text
from modules.errors import ResourceError

_SHOWN = 3


def out_of_memory_message(
    planner: TrainingPlanner, batch: BatchShape, where: str, error: torch.OutOfMemoryError
) -> str:
    """Message for a training step that ran out of device memory.

    Args:
        batch: the largest that was being computed.
        where: "step 12", or what else ran.
    """
    plan = planner.plan(planner.given, batch)
    width, height = pixel_size(batch.latent_height, batch.latent_width)
    lines = [
        f"out of device memory in {where}: {str(error).splitlines()[0]}",
        f"The batch: {batch.clips} clip(s) of {batch.pixel_frames} frames, {width} x {height} "
        f"pixels, {plan.video_tokens} video tokens each; planned peak "
        f"{size_text(plan.peak)}.",
    ]
    helpers = helping_options(planner, batch)
    if helpers:
        lines.append("What helps most:")
        lines += [f"  {words}: {size_text(saved)} less" for words, saved in helpers]
    lines.append("Fewer frames or a smaller resolution in the dataset file help in any case.")
    return "\n".join(lines)


@contextmanager
def memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Turn an out-of-memory error within the block into a message.

    Args:
        advice: the options to use.
    Raises:
        ResourceError: instead of torch.OutOfMemoryError.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"device memory ran out while {doing}: use {advice}") from error


def out_of_memory_while_loading(error: torch.OutOfMemoryError) -> str:
    """Message for a training whose model did not fit."""
    return (
        f"out of device memory while the model was loaded: {str(error).splitlines()[0]}\n"
        "What helps: --fp8_base, or --blocks_to_swap N with --gradient_checkpointing. --vram_budget GB "
        "chooses for you, and --dry_run shows what is needed."
    )


def helping_options(planner: TrainingPlanner, batch: BatchShape) -> list[tuple[str, int]]:
    """The three unused options that reduce the peak of a step the most, with the savings in bytes."""
    given = planner.given
    peak = planner.plan(given, batch).peak
    found = [
        (words, peak - planner.plan(model, batch).peak)
        for words, model in _unused_options(given, planner.device)
    ]
    if batch.clips > 1:
        alone = planner.plan(given, replace(batch, clips=1))
        found.append(("batch_size = 1 in the dataset file", peak - alone.peak))
    helping = sorted((pair for pair in found if pair[1] > 0), key=lambda pair: -pair[1])
    return helping[:_SHOWN]


def _unused_options(given: ModelConfig, device: torch.device) -> Iterator[tuple[str, ModelConfig]]:
    """(words of the command line, the model's settings with them)."""
    needed = "" if given.gradient_checkpointing else "--gradient_checkpointing "
    checkpointed = replace(given, gradient_checkpointing=True)
    if needed:
        yield needed.strip(), checkpointed
    if not given.is_quantised:
        base = base_for(device)
        yield " ".join(f"--{name}" for name in base), with_base(given, base)
    if not given.gradient_checkpointing_cpu_offload:
        words = f"{needed}--gradient_checkpointing_cpu_offload"
        yield words, replace(checkpointed, gradient_checkpointing_cpu_offload=True)
    most = max_blocks_to_swap(given.dit_params)
    if given.blocks_to_swap < most:
        yield f"{needed}--blocks_to_swap {most}", replace(checkpointed, blocks_to_swap=most)
    if given.gradient_checkpointing_keep_attention:
        words = "leaving out --gradient_checkpointing_keep_attention"
        yield words, replace(given, gradient_checkpointing_keep_attention=0)
    if given.blocks_to_swap and given.block_swap_ring_size > 1:
        yield "--block_swap_ring_size 1", replace(given, block_swap_ring_size=1)
