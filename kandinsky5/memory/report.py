"""Formats the plan of a run as text: the table of `--dry_run`, and the line of `--vram_budget`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from kandinsky5.memory.bases import describe_error
from kandinsky5.memory.budget import CONTEXT_BYTES, FRAGMENTATION, Choice, with_reserve
from kandinsky5.memory.plan import NABLA_DENSITY, MemoryPlan, MemoryUsage, Options
from modules.byte_sizes import GIB, ByteUnit, size_text, unit_for
from modules.dtypes import dtype_name
from modules.host_memory import available_memory, total_memory
from modules.logs import format_table

_SHOWN_PARTS = 3


def plan_report(
    plans: Sequence[MemoryPlan],
    device: torch.device,
    dtype: torch.dtype,
    *,
    uses_nabla: bool,
    remarks: Sequence[str] = (),
) -> str:
    """One row per plan, the parts of the largest, and the assumptions.

    Args:
        remarks: lines of the script.
    """
    largest = max(plans, key=lambda plan: plan.peak)
    highest = max(max(plan.peak, plan.decoding.device_bytes) for plan in plans)
    unit = unit_for(highest)
    columns: dict[str, list[Any]] = {
        "size": [plan.shape.size for plan in plans],
        "clips": [plan.shape.clips for plan in plans],
        "tokens": [plan.video_tokens for plan in plans],
        "activations": [unit.number(plan.usage.device["activations"]) for plan in plans],
        "device": [unit.number(plan.peak) for plan in plans],
        "host": [unit.number(plan.usage.host_bytes) for plan in plans],
        "PFLOP": [f"{plan.flops / 1e15:.3f}" for plan in plans],
    }
    if any(plan.decoding.device for plan in plans):
        columns["passes"] = [plan.passes for plan in plans]
        columns["decoding"] = [unit.number(plan.decoding.device_bytes) for plan in plans]
    return "\n".join([
        f"Plan for {device.type}, {dtype_name(dtype)}; memory in {unit.name}, captions at their longest "
        f"({largest.shape.text_tokens} tokens)",
        format_table(tuple(columns), list(zip(*columns.values(), strict=True))),
        "",
        f"Largest: {largest.label}",
        _usage_table(largest.usage, unit),
        f"predicted peak: {size_text(highest)} on the device, "
        f"{size_text(with_reserve(highest))} with reserve",
        *_assumptions(largest, device, uses_nabla=uses_nabla),
        *remarks,
    ])


def budget_report(choice: Choice[Options], budget: int) -> str:
    """The options that `--vram_budget` added and why, for the log."""
    plan = choice.plan
    added = " ".join(choice.added) or "nothing to add"
    sizes = f"{size_text(plan.peak)} planned, {size_text(with_reserve(plan.peak))} with reserve"
    line = (
        f"--vram_budget {budget / GIB:g}: {added} (largest {plan.label}: {sizes}; "
        f"{size_text(plan.usage.host_bytes)} of host memory)"
    )
    error = describe_error(choice.options)
    if error:
        line += f"; {error}"
    decoding = plan.decoding.device_bytes
    if with_reserve(decoding) > budget:
        line += (
            f"; decoding whole frames takes {size_text(decoding)}: frames are decoded in tiles when memory "
            "runs out, or with --vae_tiling"
        )
    return line


def _usage_table(usage: MemoryUsage, unit: ByteUnit) -> str:
    """Every part with the memory it is in."""
    kinds = (("device", usage.device), ("host, pageable", usage.pageable), ("host, pinned", usage.pinned))
    rows = [
        (where, part, unit.number(size)) for where, parts in kinds for part, size in parts.items() if size > 0
    ]
    return format_table(("memory", "part", unit.name), rows)


def _assumptions(plan: MemoryPlan, device: torch.device, *, uses_nabla: bool) -> list[str]:
    lines = [
        "Not in the numbers: the CUDA context and library workspaces (assumed to take "
        f"{CONTEXT_BYTES / GIB:g} GiB) and fragmentation (assumed to take {FRAGMENTATION:.0%})."
    ]
    if uses_nabla:
        lines.append(
            f"NABLA is assumed to keep {NABLA_DENSITY:.0%} of all block pairs; the log of a run reports the "
            "share."
        )
    if device.type != "cuda":
        lines.append(
            "On this device nothing is pinned, and device and host memory are one; --vram_budget plans for a "
            "card."
        )
    shortage = host_memory_shortage(plan.usage)
    if shortage is not None:
        lines.append(shortage)
    return lines


def host_memory_shortage(usage: MemoryUsage) -> str | None:
    """A warning, if a plan takes more host memory than is available now."""
    available = available_memory()
    if not available or usage.host_bytes <= available:
        return None
    parts = sorted((*usage.pageable.items(), *usage.pinned.items()), key=lambda part: -part[1])
    largest = ", ".join(f"{name} {size_text(size)}" for name, size in parts[:_SHOWN_PARTS] if size)
    return (
        f"Host memory: {size_text(usage.host_bytes)} are planned ({largest}), {size_text(available)} of "
        f"{size_text(total_memory())} are available. The run may run out of memory or swap to disk: "
        "close other programs, or use a smaller --blocks_to_swap, --fp8_base, or no "
        "--gradient_checkpointing_cpu_offload."
    )
