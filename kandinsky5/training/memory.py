"""The memory plan in a training run: `--vram_budget` and `--dry_run`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator

from dataset.cache.cached_dataset import CachedDataset
from kandinsky5.configs.train import TrainConfig
from kandinsky5.memory.bases import base_for, with_base_of
from kandinsky5.memory.budget import CHOSEN_OPTIONS, added_options, choose
from kandinsky5.memory.plan import TrainingPlanner, batches_of
from kandinsky5.memory.report import budget_report, host_memory_shortage, plan_report
from kandinsky5.training import setup as train_setup
from modules.byte_sizes import GIB
from modules.logs import get_logger

log = get_logger(__name__)


def planner_for(config: TrainConfig, accelerator: Accelerator) -> TrainingPlanner:
    """The planner of a run: for its device, or with `--vram_budget` for a CUDA card on any machine."""
    device = accelerator.device if config.run.vram_budget is None else torch.device("cuda")
    dtype = train_setup.training_dtype(config.model, device)
    return TrainingPlanner(config, device, dtype, num_processes=accelerator.num_processes)


def fit_budget(
    config: TrainConfig, data: CachedDataset, accelerator: Accelerator, earlier: Mapping[str, Any]
) -> TrainConfig:
    """The config with the options that `--vram_budget` adds; unchanged without that option.

    Args:
        earlier: the options of the run that is resumed; the base that was chosen for it stays.

    Raises:
        ConfigError: nothing fits.
    """
    if config.run.vram_budget is None:
        return config
    budget = int(config.run.vram_budget * GIB)
    given = config.model
    if earlier.get("vram_budget") is not None:
        config = replace(config, model=with_base_of(given, earlier))
    planner = planner_for(config, accelerator)
    base = base_for(accelerator.device)
    choice = choose(planner, batches_of(data, planner.text_tokens)[0], budget, base)
    choice = replace(choice, added=added_options(given, choice.options))
    if accelerator.is_main_process:
        log.info("%s", budget_report(choice, budget))
    chosen = {name: getattr(choice.options, name) for name in CHOSEN_OPTIONS}
    return replace(config, model=choice.options, options={**config.options, **chosen})


def memory_record(planner: TrainingPlanner, data: CachedDataset, device: torch.device) -> dict[str, Any]:
    """The plan of the largest batch, for metrics.jsonl; only a GPU reports a peak to compare it with."""
    if device.type != "cuda":
        return {"device": device.type}
    plan = planner.plan(planner.given, batches_of(data, planner.text_tokens)[0])
    return {
        "device": torch.cuda.get_device_name(device),
        "batch": plan.label,
        "planned_bytes": plan.peak,
        "parts": {name: size for name, size in plan.usage.device.items() if size > 0},
    }


def warn_of_host_memory(planner: TrainingPlanner, data: CachedDataset, device: torch.device) -> None:
    """Warn, before anything is loaded, if the largest batch requires more host memory than is available.

    Only where a GPU computes: what a run keeps in host memory, and not on the device, is what options choose.
    """
    model = planner.given
    is_using_host = (
        model.blocks_to_swap or model.modulation_on_host or model.gradient_checkpointing_cpu_offload
    )
    if device.type != "cuda" or not is_using_host:
        return
    usage = planner.plan(model, batches_of(data, planner.text_tokens)[0]).usage
    shortage = host_memory_shortage(usage)
    if shortage is not None:
        log.warning("%s", shortage)


def dry_run_report(config: TrainConfig, data: CachedDataset, accelerator: Accelerator) -> str:
    """What `--dry_run` prints: the plan of every kind of batch."""
    planner = planner_for(config, accelerator)
    plans = [planner.plan(config.model, batch) for batch in batches_of(data, planner.text_tokens)]
    uses_nabla = config.model.nabla is not None
    return plan_report(plans, planner.device, planner.dtype, uses_nabla=uses_nabla)
