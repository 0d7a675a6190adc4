"""Plans in words and tables."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from kandinsky5.configs.train import ModelConfig
from kandinsky5.memory.budget import CONTEXT_BYTES, FRAGMENTATION, Choice, with_reserve
from kandinsky5.memory.plan import Held, MemoryPlan
from kandinsky5.memory.roofline import NABLA_DENSITY, Card, floor_seconds
from modules.byte_sizes import GIB, ByteUnit, size_text, unit_for
from modules.dtypes import dtype_name
from modules.host_memory import available_memory, total_memory
from modules.logs import format_table

_SHOWN_PARTS = 3
NOT_COUNTED = (
    f"Not in the numbers: the CUDA context and library workspaces (taken as {CONTEXT_BYTES / GIB:g} GiB) and "
    f"fragmentation (taken as {FRAGMENTATION:.0%})."
)


def training_report(
    plans: Sequence[MemoryPlan],
    model: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    card: Card | None,
) -> str:
    """The plan of every bucket, the largest one's parts, and what is assumed."""
    largest = max(plans, key=lambda plan: plan.peak)
    unit = unit_for(largest.peak)
    rows = [
        (
            plan.batch.size,
            plan.batch.clips,
            plan.video_tokens,
            unit.number(plan.held.device["activations"]),
            unit.number(plan.peak),
            unit.number(plan.held.host_bytes),
            f"{plan.work.total / 1e15:.3f}",
            _seconds(plan, card, model),
        )
        for plan in plans
    ]
    headers = ("bucket", "clips", "tokens", "activations", "device", "host", "PFLOP", "floor s/batch")
    return "\n".join([
        f"Plan for {device.type}, {dtype_name(dtype)}; memory in {unit.name}, work per batch, captions at "
        f"their longest ({largest.batch.text_tokens} tokens)",
        format_table(headers, rows),
        "",
        f"Largest: {largest.batch.clips} x {largest.batch.size}",
        held_table(largest.held, unit),
        predicted_peak(largest.peak),
        *_remarks(largest, model, device, card),
    ])


def predicted_peak(peak: int) -> str:
    """The line that sums a plan up."""
    return f"predicted peak: {size_text(peak)} on the device, {size_text(with_reserve(peak))} with reserve"


def held_table(held: Held, unit: ByteUnit) -> str:
    """Every part with the memory it is in."""
    kinds = (
        ("device", held.device),
        ("host, pageable", held.pageable),
        ("host, page-locked", held.page_locked),
    )
    rows = [
        (where, part, unit.number(size)) for where, parts in kinds for part, size in parts.items() if size > 0
    ]
    return format_table(("memory", "part", unit.name), rows)


def budget_report(choice: Choice, budget: int) -> str:
    """What `--vram_budget` chose and why, for the log."""
    added = " ".join(choice.added) or "nothing to add"
    return (
        f"--vram_budget {budget / GIB:g}: {added} (largest batch {choice.plan.batch.clips} x "
        f"{choice.plan.batch.size}: {size_text(choice.plan.peak)} planned, "
        f"{size_text(with_reserve(choice.plan.peak))} with reserve; "
        f"{size_text(choice.plan.held.host_bytes)} of host memory)"
    )


def _seconds(plan: MemoryPlan, card: Card | None, model: ModelConfig) -> str:
    if card is None or model.int8_fast:
        return "unknown"
    return f"{floor_seconds(plan.work, card, fp8_products=model.fp8_fast):.3f}"


def _remarks(plan: MemoryPlan, model: ModelConfig, device: torch.device, card: Card | None) -> list[str]:
    remarks = [NOT_COUNTED]
    if model.nabla is not None:
        remarks.append(
            f"NABLA is taken to keep {NABLA_DENSITY:.0%} of all block pairs; a run's log tells the share."
        )
    if card is None:
        remarks.append("No floor in seconds: the speed of this device is not known to the program.")
    elif model.int8_fast:
        remarks.append("No floor in seconds: the card's speed in int8 is not known to the program.")
    else:
        remarks.append(
            f"Floor: matrix products and attention alone, at {card.bf16 / 1e12:g} TFLOP/s ({card.source})."
        )
    if device.type != "cuda":
        remarks.append(
            "On this device nothing is page-locked, and device and host memory are one; --vram_budget plans "
            "for a card."
        )
    shortage = host_memory_shortage(plan.held)
    if shortage is not None:
        remarks.append(shortage)
    return remarks


def host_memory_shortage(held: Held) -> str | None:
    """A warning, if a plan takes more host memory than there is now."""
    available = available_memory()
    if not available or held.host_bytes <= available:
        return None
    parts = sorted((*held.pageable.items(), *held.page_locked.items()), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in parts[:_SHOWN_PARTS] if size)
    return (
        f"Host memory: {size_text(held.host_bytes)} are planned ({largest}), {size_text(available)} of "
        f"{size_text(total_memory())} are available. The run may end without memory or swap to the disk: "
        "close other programs, or use a smaller --blocks_to_swap, --fp8_base, or no "
        "--gradient_checkpointing_cpu_offload."
    )
