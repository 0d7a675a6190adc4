"""The metadata of a trained LoRA file: kohya's `ss_*` keys and the model spec, and nothing private.

Key names: kohya-ss/musubi-tuner. Model spec: https://github.com/Stability-AI/ModelSpec
Folders and files appear by their own name only; no user, host, token or caption is written.
"""

from __future__ import annotations

import datetime
import json
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dataset.config.config import AnyDatasetConfig, DatasetConfig
from kandinsky5.configs.train import NetworkConfig, OptimizerConfig, TrainConfig
from modules.optimizer_kinds import is_schedule_free, takes_relative_steps
from networks.lora import LoRANetwork

MINIMUM_KEYS = (
    "ss_output_name",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)
_DATASET_KEYS = (
    "caption_extension",
    "caption_lines",
    "caption_dropout_rate",
    "is_prior",
    "num_repeats",
    "enable_bucket",
    "bucket_no_upscale",
    "frame_extraction",
    "frame_stride",
    "frame_sample",
    "target_frames",
    "max_frames",
    "source_fps",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraFacts:
    """Facts of a run for the metadata beyond its configuration."""

    session_id: str
    started_at: float
    """Seconds since 1970."""
    seed: int
    num_items: int
    num_batches: int
    num_epochs: int
    total_steps: int
    warmup_steps: int
    optimizer: str
    """Module.Class(arguments)."""
    mixed_precision: str


def lora_metadata(
    config: TrainConfig,
    datasets: DatasetConfig,
    facts: LoraFacts,
    network: LoRANetwork,
    *,
    step: int,
    epoch: int,
) -> dict[str, str]:
    """The metadata of a file saved after `step` optimizer steps; save_lora adds the hashes of its tensors."""
    values = {
        **_run_values(facts, step=step, epoch=epoch),
        **_option_values(config),
        **_rate_values(config.optimizer, facts),
        **_network_values(config.network, network),
        "ss_datasets": json.dumps([_dataset_entry(dataset) for dataset in datasets.datasets]),
    }
    if config.metadata.no_metadata:
        values = {key: values[key] for key in MINIMUM_KEYS}
    return {
        **{key: _text(value) for key, value in values.items()},
        **_model_spec(config, datasets, facts),
    }


def _run_values(facts: LoraFacts, *, step: int, epoch: int) -> dict[str, Any]:
    return {
        "ss_session_id": facts.session_id,
        "ss_training_started_at": facts.started_at,
        "ss_training_finished_at": time.time(),
        "ss_num_train_items": facts.num_items,
        "ss_num_batches_per_epoch": facts.num_batches,
        "ss_num_epochs": facts.num_epochs,
        "ss_epoch": epoch,
        "ss_steps": step,
        "ss_max_train_steps": facts.total_steps,
        "ss_seed": facts.seed,
        "ss_optimizer": facts.optimizer,
        "ss_mixed_precision": facts.mixed_precision,
        "ss_full_fp16": False,
        "ss_full_bf16": False,
    }


def _option_values(config: TrainConfig) -> dict[str, Any]:
    model = config.model
    timesteps = {
        f"ss_{key}": value
        for key, value in asdict(config.timesteps).items()
        if key not in ("preserve_distribution_shape", "num_timestep_buckets")
    }
    return {
        **timesteps,
        "ss_output_name": config.saving.output_name,
        "ss_max_grad_norm": config.optimizer.max_grad_norm,
        "ss_gradient_checkpointing": model.gradient_checkpointing,
        "ss_gradient_checkpointing_cpu_offload": model.gradient_checkpointing_cpu_offload,
        "ss_gradient_accumulation_steps": config.run.gradient_accumulation_steps,
        "ss_base_model_version": "kandinsky5",
        "ss_training_comment": config.metadata.training_comment,
        "ss_fp8_base": model.fp8_base,
        "ss_int8_base": model.int8_base,
        "ss_int8_rotated": model.rotates_weights,
        "ss_nf4_base": model.nf4_base,
        "ss_guidance_scale": config.options.get("guidance_scale", 1.0),
        "ss_sd_model_name": model.dit.name,
        "ss_vae_name": Path(model.vae).name if model.vae else None,
        "ss_task": model.task.name,
        "ss_scheduler_scale": model.scheduler_scale,
        "ss_i2v_mode": config.conditioning.i2v_mode if model.task.is_i2v else None,
        "ss_masked_loss": config.loss.masked_loss,
        "ss_prior_loss_weight": config.loss.prior_loss_weight,
        "ss_attention": model.attention if model.nabla is None else "nabla",
    }


def _rate_values(config: OptimizerConfig, facts: LoraFacts) -> dict[str, Any]:
    """Learning rate and schedule in effect; None for what the optimizer does not use."""
    rate, schedule, warmup = config.learning_rate, config.lr_scheduler, facts.warmup_steps
    if is_schedule_free(config.optimizer_type):
        schedule, warmup = None, 0
    elif takes_relative_steps(config.optimizer_type, config.optimizer_args):
        rate, schedule, warmup = None, "adafactor", 0
    elif config.lr_scheduler_type:
        schedule, warmup = config.lr_scheduler_type, 0
    elif schedule == "piecewise_constant":
        warmup = 0
    return {"ss_learning_rate": rate, "ss_lr_scheduler": schedule, "ss_lr_warmup_steps": warmup}


def _network_values(config: NetworkConfig, network: LoRANetwork) -> dict[str, Any]:
    adapters = network.adapters.values()
    return {
        "ss_network_module": config.network_module,
        "ss_network_dim": _common(adapter.rank for adapter in adapters),
        "ss_network_alpha": _common(adapter.alpha for adapter in adapters),
        "ss_network_dropout": config.network_dropout,
        "ss_network_args": json.dumps(dict(config.network_args)),
    }


def _common(values: Iterable[float]) -> float | str:
    """The value of all layers, or kohya's word for layers that differ."""
    found = set(values)
    return found.pop() if len(found) == 1 else "Dynamic"


def _dataset_entry(dataset: AnyDatasetConfig) -> dict[str, Any]:
    values = asdict(dataset)
    entry = {key: values[key] for key in _DATASET_KEYS if key in values}
    folder = {
        f"{dataset.content}_directory": dataset.directory,
        f"{dataset.content}_jsonl_file": dataset.jsonl_file,
    }
    return {
        "resolution": list(dataset.resolution),
        "batch_size_per_device": dataset.batch_size,
        "has_control": False,
        **entry,
        **{key: path.name for key, path in folder.items() if path is not None},
    }


def _model_spec(config: TrainConfig, datasets: DatasetConfig, facts: LoraFacts) -> dict[str, str]:
    given = config.metadata
    width, height = given.metadata_reso or datasets.datasets[0].resolution
    now = datetime.datetime.fromtimestamp(facts.started_at, tz=datetime.UTC).replace(
        microsecond=0, tzinfo=None
    )
    spec: dict[str, str | None] = {
        "sai_model_spec": "1.0.0",
        "architecture": f"{given.metadata_arch or 'Kandinsky-5'}/lora",
        "implementation": "https://github.com/kandinskylab/kandinsky-5",
        "title": given.metadata_title or config.saving.output_name,
        "resolution": f"{width}x{height}",
        "date": now.isoformat(),
        "author": given.metadata_author,
        "description": given.metadata_description,
        "license": given.metadata_license,
        "tags": given.metadata_tags,
    }
    low, high = config.timesteps.min_timestep, config.timesteps.max_timestep
    if (low, high) != (0.0, 1000.0):
        spec["timestep_range"] = f"{low:g},{high:g}"
    return {f"modelspec.{key}": value for key, value in spec.items() if value is not None}


def _text(value: Any) -> str:
    """How kohya's tools write a value: None and booleans as Python does."""
    return value if isinstance(value, str) else str(value)
