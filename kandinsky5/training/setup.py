"""Assembles a training run: processes, datasets, the frozen model, the LoRA, optimizer and schedule."""

from __future__ import annotations

import datetime
import os
import secrets
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, broadcast_object_list
from torch.optim.lr_scheduler import LRScheduler

from dataset.cache.cached_dataset import CachedDataset
from dataset.cache.fit import MatchOptions
from dataset.cache.held_out import hold_out
from dataset.config.config import DatasetConfig, load_dataset_config
from kandinsky5.configs.compilation import NO_BACKEND
from kandinsky5.configs.train import (
    ModelConfig,
    OptimizerConfig,
    RunConfig,
    TrainConfig,
)
from modules.dtypes import dtype_from_word
from modules.errors import ConfigError, DataError, ResourceError
from modules.logs import get_logger
from modules.lr_schedules import ScheduleSettings, build_lr_schedule
from modules.messages import counted
from modules.optimizer_kinds import is_schedule_free, takes_relative_steps
from modules.optimizers import build_optimizer
from networks.lora import LoRANetwork
from networks.lora_types import parse_network_args

log = get_logger(__name__)


def build_accelerator(config: TrainConfig) -> Accelerator:
    """The processes of the run. The model computes in its own dtype, so accelerate's mixed precision is off.

    Raises:
        ResourceError: the launcher started several processes that do not see each other.
        ConfigError: the launcher has a compile option.
    """
    run = config.run
    network = config.network
    settings = parse_network_args(network.network_args, network_module=network.network_module)
    handlers: list[Any] = [
        DistributedDataParallelKwargs(
            gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
            static_graph=run.ddp_static_graph,
            find_unused_parameters=settings.module_dropout > 0,
        )
    ]
    if run.ddp_timeout is not None:
        handlers.append(InitProcessGroupKwargs(timeout=datetime.timedelta(minutes=run.ddp_timeout)))
    launched_with = os.environ.get("ACCELERATE_DYNAMO_BACKEND", NO_BACKEND)
    if launched_with.lower() != NO_BACKEND:
        raise ConfigError(
            f"accelerate was started with --dynamo_backend {launched_with}, which would compile the LoRA "
            "instead of the model: give the option to the training script, after its name"
        )
    # Without a device accelerate requires `cpu`: else it starts processes that do not know of each other.
    accelerator = Accelerator(
        cpu=not torch.accelerator.is_available(), mixed_precision="no", kwargs_handlers=handlers
    )
    expected = int(os.environ.get("WORLD_SIZE", "1"))
    if accelerator.num_processes != expected:
        raise ResourceError(
            f"{expected} processes were started, but {accelerator.num_processes} take part. Start with:\n"
            f"  accelerate launch --multi_gpu --num_processes {expected} --num_machines 1 ..."
        )
    return accelerator


def training_dtype(model: ModelConfig, device: torch.device) -> torch.dtype:
    """The dtype the model computes in: as given, else as accelerate was started, else bf16 on a GPU.

    Raises:
        ConfigError: accelerate was started with fp16, which cannot hold the activations.
    """
    if model.dit_dtype is not None:
        return dtype_from_word(model.dit_dtype)
    # What `accelerate launch --mixed_precision` hands to its processes.
    word = model.mixed_precision or os.environ.get("ACCELERATE_MIXED_PRECISION", "no")
    if word == "bf16" or (model.mixed_precision is None and word == "no" and device.type != "cpu"):
        return torch.bfloat16
    if word == "no":
        return torch.float32
    raise ConfigError(f"accelerate was started with {word}: add --mixed_precision bf16, or no for float32")


def resolved_precision(model: ModelConfig, device: torch.device) -> dict[str, str]:
    """The option that gives `training_dtype` again wherever a run is started; none if `--dit_dtype` does."""
    if model.dit_dtype is not None:
        return {}
    return {"mixed_precision": "bf16" if training_dtype(model, device) == torch.bfloat16 else "no"}


def shared_seed(run: RunConfig, resumed: int | None) -> int:
    """The run's seed, equal on all processes: given, resumed, or random."""
    if run.seed is not None:
        return run.seed
    if resumed is not None:
        return resumed
    return broadcast_object_list([secrets.randbelow(2**31)])[0]


def open_datasets(config: TrainConfig, seed: int) -> tuple[DatasetConfig, CachedDataset]:
    """The caches to train on; every header is read.

    Raises:
        ConfigError, CacheError, DataError: see `dataset`.
    """
    datasets = load_dataset_config(
        config.data.dataset_config, caption_dropout_rate=config.data.caption_dropout_rate
    )
    _check_prior(config, datasets)
    options = replace(
        _match_options(config),
        use_masks=config.loss.masked_loss,
        use_prior=config.loss.prior_loss_weight > 0,
    )
    buckets = config.timesteps.num_timestep_buckets
    data = CachedDataset(datasets, options, seed=seed, num_timestep_buckets=buckets)
    if not _is_learning(data):
        raise DataError(
            f"{config.data.dataset_config}: only datasets with is_prior have items that can be used, so "
            f"there is nothing to learn:\n{data.summary_table()}"
        )
    return datasets, data


def _is_learning(data: CachedDataset) -> bool:
    """Whether some of the items have more than the prior term."""
    return not all(data.config.datasets[item.dataset_index].is_prior for item in data.items)


def _check_prior(config: TrainConfig, datasets: DatasetConfig) -> None:
    marked = [dataset.index for dataset in datasets.datasets if dataset.is_prior]
    with_caption = [d.index for d in datasets.datasets if d.prior_caption is not None]
    is_on = config.loss.prior_loss_weight > 0
    path = config.data.dataset_config
    if marked and not is_on:
        raise ConfigError(
            f"{path}: dataset {marked[0]} has is_prior, which needs --prior_loss_weight above 0"
        )
    if len(marked) == len(datasets.datasets):
        raise ConfigError(f"{path}: all datasets have is_prior, so there is nothing to learn")
    if with_caption and (marked or not is_on):
        why = (
            "with is_prior only the datasets marked so have the term" if is_on else "add --prior_loss_weight"
        )
        log.info("dataset %s: prior_caption has no effect: %s", ", ".join(map(str, with_caption)), why)
    if is_on:
        held = [f"dataset {index}: its own captions" for index in marked] or [
            f"dataset {d.index}: {d.prior_caption or 'the empty caption'!r}" for d in datasets.datasets
        ]
        weight = config.loss.prior_loss_weight
        log.info("--prior_loss_weight %g holds the LoRA to the base model on %s", weight, "; ".join(held))


def open_validation(config: TrainConfig, data: CachedDataset) -> tuple[CachedDataset, CachedDataset | None]:
    """Split `data` into training and validation, or open a separate validation dataset.

    Raises:
        ConfigError, CacheError, DataError: see `dataset`.
    """
    path, share = config.data.validation_dataset_config, config.data.validation_split
    if share is not None:
        trained, measured = hold_out(data, share)
        if not _is_learning(trained):
            raise ConfigError(
                f"--validation_split {share:g} holds out every clip that is learned and leaves those with "
                "is_prior alone: give a smaller share, or --validation_dataset_config"
            )
        return trained, measured
    if path is None:
        return data, None
    datasets = load_dataset_config(path, caption_dropout_rate=0.0)
    return data, CachedDataset(datasets, _match_options(config), seed=0)


def _match_options(config: TrainConfig) -> MatchOptions:
    """What training and validation data have in common."""
    task = config.model.task
    return MatchOptions(
        allow_missing=config.data.allow_missing,
        allow_upstream_text_cache=config.data.allow_upstream_text_cache,
        strict=config.data.strict,
        needs_image_latents=task.is_i2v,
        text_limits=(task.qwen_max_length, task.clip_max_length),
    )


def optimizer_for(config: OptimizerConfig, network: LoRANetwork) -> torch.optim.Optimizer:
    """The optimizer of a network's parameters.

    Raises:
        ConfigError, ResourceError: see `build_optimizer`.
    """
    groups = network.parameter_groups(config.learning_rate)
    return build_optimizer(config.optimizer_type, groups, config.learning_rate, config.optimizer_args)


LARGEST_USUAL_RATE = 1e-2
"""For optimizers that scale their steps, such as Adam's family."""


def schedule_settings(config: OptimizerConfig, total_steps: int) -> ScheduleSettings:
    """The schedule in optimizer steps; shares are taken of the whole run."""

    def steps(value: int | float) -> int:
        return value if isinstance(value, int) else int(value * total_steps)

    return ScheduleSettings(
        name=config.lr_scheduler,
        total_steps=total_steps,
        warmup_steps=steps(config.lr_warmup_steps),
        decay_steps=steps(config.lr_decay_steps),
        num_cycles=config.lr_scheduler_num_cycles,
        power=config.lr_scheduler_power,
        timescale=config.lr_scheduler_timescale,
        min_lr_ratio=config.lr_scheduler_min_lr_ratio,
        arguments=config.lr_scheduler_args,
    )


def rate_warnings(config: OptimizerConfig, total_steps: int) -> Iterator[str]:
    """What is unusual about learning rate and warm-up of a run of so many steps."""
    name, rate = config.optimizer_type.lower(), config.learning_rate
    takes_small_rates = any(part in name for part in ("adam", "lion")) and "dadapt" not in name
    if takes_small_rates and rate > LARGEST_USUAL_RATE:
        yield (
            f"--learning_rate {rate:g} is far above what {config.optimizer_type} takes: 1e-4 is usual for a "
            "LoRA"
        )
    warmup = schedule_settings(config, total_steps).warmup_steps
    if warmup >= total_steps:
        yield (
            f"--lr_warmup_steps {warmup}: the run ends after {counted(total_steps, 'step')}, within the "
            "warm-up, and never reaches --learning_rate; --lr_warmup_steps 5% is usual"
        )


def build_schedule(
    config: OptimizerConfig, optimizer: torch.optim.Optimizer, total_steps: int, steps_done: int
) -> LRScheduler | None:
    """The schedule at `steps_done`; None for optimizers that need none."""
    if is_schedule_free(config.optimizer_type):
        return None
    sets_own_rate = takes_relative_steps(config.optimizer_type, config.optimizer_args)
    return build_lr_schedule(
        optimizer,
        schedule_settings(config, total_steps),
        steps_done=steps_done,
        class_name=config.lr_scheduler_type,
        adafactor_initial_lr=config.learning_rate if sets_own_rate else None,
    )


def has_schedule_state(config: OptimizerConfig) -> bool:
    """Whether the schedule is more than a function of the step, and so belongs in the state."""
    return bool(config.lr_scheduler_type)
