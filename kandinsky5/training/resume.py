"""Continues a run: checks that the state fits it, and restores the state."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch.optim.lr_scheduler import LRScheduler

from dataset.cache.cached_dataset import CachedDataset
from kandinsky5.configs.train import DEFAULT_TRAIN_STEPS, OptimizerConfig, SavingConfig, TrainConfig
from kandinsky5.training.plan import TrainingLength, data_order_hash
from kandinsky5.training.results.hub import fetch_state
from kandinsky5.training.results.names import ResultNames, effect_path
from kandinsky5.training.results.saved_config import shareable_options
from kandinsky5.training.results.state import (
    SavedState,
    TrainingState,
    find_state,
    list_states,
    read_mark,
    read_state,
)
from kandinsky5.training.run_contents import CACHES, MODELS, changed
from kandinsky5.training.setup import build_schedule
from modules.errors import ConfigError, ModelFileError
from modules.logs import get_logger
from modules.optimizer_kinds import takes_relative_steps
from modules.optimizers import describe_optimizer, is_same_optimizer
from networks.lora import Adapter, LoRAAdapter, LoRANetwork
from networks.weight_average import WeightAverage

log = get_logger(__name__)

_NOT_COMPARED = (
    *("max_train_", "learning_rate", "seed", "gradient_accumulation_steps", "ema_decay"),
    "optimizer_",
    *("output_", "save_", "overwrite", "resume", "allow_", "strict", "on_nan", "traceback", "config_file"),
    *("log_", "logging_", "wandb_", "huggingface_", "metadata_", "no_metadata", "training_comment"),
    *("sample_", "validat", "vae", "text_encoder_", "prompt_templates", "fp8_llm", "quantized_qwen"),
    *("offload_dit_during_sampling", "scheduler_scale"),
    *("max_data_loader_", "persistent_", "use_pinned_", "block", "gradient_checkpointing", "ddp_"),
    "vram_budget",
    *("disable_numpy_memmap", "no_weight_check", "dataset_config", "show_timesteps", "lora_format"),
    *("keep_cache", "split_attn", "img_in_", "guidance_scale", "no_vae_load", "fp8_scaled"),
    *("no_probe", "dry_run", "async_upload", "lora_allow_partial"),
    # The state's weights take the place of those.
    *("network_weights", "dim_from_weights"),
)
"""Beginnings of options that change no number of a run, or that are compared in a way of their own."""


def library_versions() -> dict[str, str]:
    """Versions of libraries that affect rounding."""
    return {"python": platform.python_version(), "torch": torch.__version__}


def resumed_state(config: TrainConfig) -> SavedState | None:
    """Read and verify the state that `--resume` selects."""
    resume, hub = config.run.resume, config.hub
    if resume is None:
        return None
    if hub.resume_from_huggingface:
        return read_state(fetch_state(resume, hub.huggingface_token))
    path = find_state(config.saving.output_dir, config.saving.output_name, resume)
    return None if path is None else read_state(path)


def without_replaced_weights(config: TrainConfig, saved: SavedState | None) -> TrainConfig:
    """The options with the weights of the state in place of `--network_weights`, which may be gone.

    Raises:
        ModelFileError: it is gone, ranks are to be taken from it, and the state is of an earlier version,
            which did not record them.
    """
    weights = config.network.network_weights
    if saved is None or weights is None:
        return config
    if config.network.dim_from_weights and saved.run.lora_settings:
        return replace(config, network=replace(config.network, network_weights=saved.lora_path))
    if weights.exists():
        return config
    if config.network.dim_from_weights:
        raise ModelFileError(
            f"--network_weights {weights}: no such LoRA file, and --dim_from_weights takes ranks from it. "
            "A LoRA that this run has saved has the same: name that one"
        )
    log.info("resuming: --network_weights %s is gone and not needed: the state has its own weights", weights)
    return replace(config, network=replace(config.network, network_weights=None))


def is_finished(saving: SavingConfig, saved: SavedState, total_steps: int) -> bool:
    """Whether a state is the last one of its run and the final files are there."""
    names = ResultNames(saving.output_dir, saving.output_name)
    wants_state = saving.save_state or saving.save_state_on_train_end
    # The final LoRA is written before the last step's state; a final state may be that of a shorter run.
    last = read_mark(names.final_state)
    has_state = not wants_state or (last is not None and last.place >= (saved.run.branch, total_steps))
    has_files = names.final_lora.is_file() and effect_path(names.final_lora).is_file() and has_state
    return saved.run.step >= total_steps and has_files


def branch_of(config: TrainConfig, saved: SavedState | None) -> int:
    """The branch of the run: a new one if it goes back to an earlier state than the newest."""
    if saved is None:
        return 0
    if config.run.resume == "auto":
        return saved.run.branch
    states = list_states(config.saving.output_dir, config.saving.output_name)
    places = [mark.place for _, mark in states if mark is not None]
    here = (saved.run.branch, saved.run.step)
    return max(places)[0] + 1 if places and max(places) > here else saved.run.branch


def resolve_total_steps(requested: int | None, saved: SavedState | None) -> int:
    """A resumed run ends where the first one would have, unless a number is given.

    Args:
        requested: steps by `--max_train_steps` or `--max_train_epochs`; None without them.
    Raises:
        ConfigError: the run is past the end that is given.
    """
    if saved is None:
        return DEFAULT_TRAIN_STEPS if requested is None else requested
    original = saved.run.total_steps
    if requested is None:
        return original
    if requested < saved.run.step:
        raise ConfigError(
            f"--resume {saved.folder.name}: is at step {saved.run.step} already, and the run is to end at "
            f"step {requested} by --max_train_steps or --max_train_epochs. Resume an earlier state."
        )
    if requested != original:
        log.info(
            "resuming: the end moves from step %d to %d and the learning-rate schedule with it",
            original, requested,
        )  # fmt: skip
    return requested


def check_resumed(
    config: TrainConfig,
    saved: SavedState,
    data: CachedDataset,
    length: TrainingLength,
    seed: int,
    contents: Mapping[str, str],
) -> None:
    """Refuse changes that would make it another run, and log other changes.

    Raises:
        ConfigError: all differences at once.
    """
    before = saved.run
    pairs = [
        ("--output_name", before.output_name, config.saving.output_name),
        ("--task", before.task, config.model.task.name),
    ]
    if not config.data.allow_changed_data:
        accumulation = length.gradient_accumulation_steps
        pairs += [
            ("--seed", before.seed, seed),
            ("--gradient_accumulation_steps", before.gradient_accumulation_steps, accumulation),
            ("the number of processes", before.num_processes, length.num_processes),
            ("the number of steps per epoch", before.steps_per_epoch, length.steps_per_epoch),
        ]
    problems = [
        f"--resume {saved.folder.name}: {what} was {old}, is {new}" for what, old, new in pairs if old != new
    ]
    new_caches = changed(before.contents, contents, CACHES)
    if not config.data.allow_changed_data and not problems:
        what = ""
        if before.data_order != data_order_hash(data):
            what = "the dataset or its batch sizes have changed"
        elif new_caches:
            what = f"{' and '.join(new_caches)} have been cached again from other inputs"
        if what:
            problems.append(
                f"--resume {saved.folder.name}: {what}. "
                "--allow_changed_data continues anyway, but the run is then not exact."
            )
    problems += _epoch_problems(config, before, length)
    if _was_not_rotated(before) and config.model.rotates_weights:
        problems.append(
            f"--resume {saved.folder.name}: an earlier version began this run, when --int8_fast did not "
            "rotate weights before rounding; the same options now give other weights. Add "
            "--no_int8_rotation to go on exactly, or begin a run with the LoRA of this one: --network_weights"
        )
    if problems:
        raise ConfigError(problems)
    _log_changes(config, saved, contents, length)


def _was_not_rotated(before: TrainingState) -> bool:
    """Whether a run multiplied in int8 before there was a rotation."""
    options = before.options
    return before.weights == "" and bool(options.get("int8_base") and options.get("int8_fast"))


def _epoch_problems(config: TrainConfig, before: TrainingState, length: TrainingLength) -> list[str]:
    """Other data may have fewer or more steps per epoch: the new numbers must not fall on old files."""
    every = config.saving.save_every_n_epochs
    if every is None or before.steps_per_epoch == length.steps_per_epoch:
        return []
    names = ResultNames(config.saving.output_dir, config.saving.output_name)
    first = before.step // length.steps_per_epoch + 1
    last = (length.total_steps - 1) // length.steps_per_epoch  # what ends with the run has the final names
    epochs = [epoch for epoch in range(first, last + 1) if epoch % every == 0]
    paths = [path for epoch in epochs for path in (names.lora("epoch", epoch), names.state("epoch", epoch))]
    existing = [path.name for path in paths if path.exists()]
    if not existing:
        return []
    return [
        f"--allow_changed_data: an epoch had {before.steps_per_epoch} steps and now has "
        f"{length.steps_per_epoch}, so the next one would be number {first} and {existing[0]} of the earlier "
        "part would be overwritten. Move such files away, or save by --save_every_n_steps instead of "
        "--save_every_n_epochs."
    ]


def _log_changes(
    config: TrainConfig, saved: SavedState, contents: Mapping[str, str], length: TrainingLength
) -> None:
    before = saved.run
    if before.learning_rate != config.optimizer.learning_rate and config.optimizer.lr_scheduler_type:
        log.warning(
            "resuming: --lr_scheduler_type continues from its own rate; the new --learning_rate is not used"
        )
    elif before.learning_rate != config.optimizer.learning_rate:
        log.info(
            "resuming: --learning_rate changes from %g to %g",
            before.learning_rate,
            config.optimizer.learning_rate,
        )
    for line in _changes(before.options, shareable_options(config)):
        log.warning("resuming: %s", line)
    for option in changed(before.contents, contents, MODELS):
        log.warning(
            "resuming: the input of %s has changed; the run continues with it and is not exact", option
        )
    if before.library_versions != library_versions():
        log.info(
            "resuming: the run was started with %s, now %s: rounding may differ",
            _versions(before.library_versions), _versions(library_versions()),
        )  # fmt: skip
    log.info("resuming %s at step %d of %d", saved.folder.name, before.step, length.total_steps)


def _changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each option that has changed and is used with its new value."""
    # Options that are not given are missing there.
    names = [name for name in sorted({**before, **now}) if not name.startswith(_NOT_COMPARED)]
    pairs = [(name, before.get(name), now.get(name)) for name in names]
    return [
        f"--{name} changes from {old} to {new}; the run continues with it and is not exact"
        for name, old, new in pairs
        if old != new
    ]


def _versions(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items()) or "unknown versions"


def resume_average(
    saved: SavedState | None, network: LoRANetwork, decay: float | None
) -> WeightAverage | None:
    """The average of `--ema_decay`, continued from a state that has one; None without the option.

    Call it once the network holds the state's weights and is on its device.
    """
    before = None if saved is None else saved.run.ema_decay
    if saved is not None and before != decay:
        log.info(
            "resuming: --ema_decay changes from %s to %s%s",
            before, decay, "; the average starts from the weights of the state" if before is None else "",
        )  # fmt: skip
    if decay is None:
        return None
    return WeightAverage(network, decay, None if saved is None else saved.average)


def network_identity(network: LoRANetwork) -> dict[str, Any]:
    """Layers, ranks and alphas of a network, short enough for a JSON file."""
    rows = [
        f"{path} {adapter.rank} {adapter.alpha:g}{_other_shapes(adapter)}"
        for path, adapter in sorted(network.adapters.items())
    ]
    first = next(iter(network.adapters.values()))
    return {
        "layers": len(rows),
        "rank": first.rank,
        "alpha": first.alpha,
        "sha256": hashlib.sha256("\n".join(rows).encode("utf-8")).hexdigest(),
    }


def _other_shapes(adapter: Adapter) -> str:
    """What rank and alpha leave open in an adapter that is no plain LoRA."""
    if isinstance(adapter, LoRAAdapter):
        return ""
    return "".join(f" {name} {list(parameter.shape)}" for name, parameter in adapter.named_parameters())


def restore(
    saved: SavedState | None,
    config: OptimizerConfig,
    network: LoRANetwork,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
) -> LRScheduler | None:
    """Restore network and optimizer from a state; returns the schedule at its step.

    Raises:
        ConfigError: LoRA or optimizer differ from the state's.
    """
    if saved is None:
        return build_schedule(config, optimizer, total_steps, 0)
    identity = network_identity(network)
    if identity != saved.run.network:
        old, new = saved.run.network, identity
        raise ConfigError(
            f"--resume {saved.folder.name}: its LoRA has {old['layers']} layers of rank {old['rank']} and "
            f"alpha {old['alpha']:g}, this run's {new['layers']} of rank {new['rank']} and "
            f"alpha {new['alpha']:g}. "
            "Give the options of the first run."
        )
    described = describe_optimizer(optimizer, config.optimizer_args)
    if not is_same_optimizer(described, saved.run.optimizer):
        raise ConfigError(
            f"--resume {saved.folder.name}: its optimizer was {saved.run.optimizer}, "
            f"this run's is {described}"
        )
    if len(saved.optimizer.get("param_groups", ())) != len(optimizer.param_groups):
        raise ConfigError(
            f"--resume {saved.folder.name}: its optimizer had {len(saved.optimizer.get('param_groups', ()))} "
            f"groups of parameters, this run's has {len(optimizer.param_groups)}: loraplus_lr_ratio of "
            "--network_args was added or left out. Give the options of the first run."
        )
    rates = [group["lr"] for group in optimizer.param_groups]
    try:
        network.load_state_dict(dict(saved.lora))
        optimizer.load_state_dict(saved.optimizer)
    except (RuntimeError, ValueError, KeyError) as error:
        raise ModelFileError(f"{saved.folder}: its tensors do not fit its state.json") from error
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule = build_schedule(config, optimizer, total_steps, saved.run.step)
    if takes_relative_steps(config.optimizer_type, config.optimizer_args):
        # Such a schedule only reports the optimizer's own rates, and has none to report before a gradient.
        for group, old in zip(optimizer.param_groups, saved.optimizer["param_groups"], strict=True):
            group["lr"] = old["lr"]
    if schedule is not None and saved.scheduler is not None:
        schedule.load_state_dict(saved.scheduler)
        # Such schedules multiply the rate they find, which is therefore part of where they stand.
        for group, rate in zip(optimizer.param_groups, schedule.get_last_lr(), strict=True):
            group["lr"] = rate
    return schedule
