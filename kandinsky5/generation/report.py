"""The plan of a generation as a table."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky5.generation.plan import GenerationPlanner, largest_request
from kandinsky5.memory.report import NOT_COUNTED, held_table, predicted_peak
from kandinsky5.memory.roofline import NABLA_DENSITY, card_of, floor_seconds
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.text.files import encoder_bytes
from modules.byte_sizes import size_text, unit_for
from modules.dtypes import dtype_name
from modules.logs import format_table


def generation_report(planner: GenerationPlanner, requests: Sequence[VideoRequest]) -> str:
    """Every request's tokens, passes, peaks and work; the largest one's parts; and what is not counted."""
    config = planner.config
    card = card_of(planner.device)
    can_tell_seconds = card is not None and not config.dit.int8_fast
    plans = [planner.plan(config.dit, request) for request in requests]
    largest_peak = max(max(plan.peak, plan.decoding.device_bytes) for plan in plans)
    unit = unit_for(largest_peak)
    rows = []
    for number, (request, plan) in enumerate(zip(requests, plans, strict=True), start=1):
        seconds = "unknown"
        if card is not None and can_tell_seconds:
            once = floor_seconds(plan.work, card, fp8_products=config.dit.fp8_fast)
            seconds = f"{once * plan.passes:.1f}"
        rows.append((
            number,
            f"{request.width}x{request.height}x{request.num_frames}",
            plan.tokens,
            plan.passes,
            unit.number(plan.peak),
            unit.number(plan.decoding.device_bytes),
            f"{plan.work.total * plan.passes / 1e15:.2f}",
            seconds,
        ))
    largest = planner.plan(config.dit, largest_request(requests))
    headers = ("prompt", "size", "tokens", "passes", "sampling", "decoding", "PFLOP", "floor s")
    request = largest.request
    return "\n".join([
        f"Plan for {planner.device.type}, {dtype_name(planner.dtype)}; device memory in {unit.name}, "
        f"captions at their longest ({config.task.qwen_max_length} tokens)",
        format_table(headers, rows),
        "",
        f"Largest: {request.width}x{request.height}x{request.num_frames}",
        held_table(largest.sampling, unit),
        predicted_peak(largest_peak),
        *_remarks(planner),
    ])


def _remarks(planner: GenerationPlanner) -> list[str]:
    config = planner.config
    remarks = [
        NOT_COUNTED,
        "Stages follow each other and free their models. Passes that MagCache skips are counted as run.",
        "Decoding is for whole frames"
        + (f" in tiles of {config.vae.tile_px} pixels" if config.vae.tile_px else "")
        + "; when memory runs out it starts again in smaller tiles.",
    ]
    sizes = [
        encoder_bytes(config.models.text_encoder_qwen, "qwen"),
        encoder_bytes(config.models.text_encoder_clip, "clip"),
    ]
    known = [size for size in sizes if size is not None]
    where = "host" if config.text.text_encoder_cpu else "device"
    if len(known) == len(sizes):
        remarks.append(
            f"Text encoders, before the DiT: {size_text(sum(known))} of weights in their files, to the "
            f"{where}. --fp8_llm and --quantized_qwen make them smaller; what encoding takes is not counted."
        )
    else:
        remarks.append("The text encoders are not here yet, and not counted.")
    if config.dit.nabla is not None:
        remarks.append(
            f"NABLA is taken to keep {NABLA_DENSITY:.0%} of all block pairs; a run's log tells it."
        )
    return remarks
