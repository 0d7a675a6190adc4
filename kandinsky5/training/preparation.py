"""Prepares a training run before its model is loaded: checks, length, prompts and trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from dataset.cache.cached_dataset import CachedDataset
from dataset.config.config import DatasetConfig
from kandinsky5.configs.train import TrainConfig
from kandinsky5.model.precision import check_vae, check_weight_format
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.training import checks as train_checks
from kandinsky5.training import memory as train_memory
from kandinsky5.training import setup as train_setup
from kandinsky5.training.control import remove_old_word
from kandinsky5.training.dry_build import check_dry_build
from kandinsky5.training.loss.timesteps import rarity_warning
from kandinsky5.training.plan import TrainingLength
from kandinsky5.training.results.hub import HubUploads
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.run_mark import RunMark, mark_run
from kandinsky5.training.results.saved_config import shareable_options, write_config
from kandinsky5.training.results.state import SavedState, how_to_continue, remove_leftover_states
from kandinsky5.training.resume import (
    branch_of,
    check_resumed,
    is_finished,
    resolve_total_steps,
    resumed_state,
    without_replaced_weights,
)
from kandinsky5.training.run_contents import cache_contents, model_contents
from kandinsky5.training.samples import PreparedPrompt, are_missing, encode_requests, read_requests
from kandinsky5.training.tracking.trackers import Tracker, open_trackers
from kandinsky5.training.validation.schedule import was_measured
from modules.files import disk_errors, remove_leftover_files
from modules.interruption import StopRequest
from modules.logs import get_logger, print_report, quiet_logging

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run that has passed all checks."""

    config: TrainConfig
    accelerator: Accelerator
    datasets: DatasetConfig
    data: CachedDataset
    validation_data: CachedDataset | None
    length: TrainingLength
    seed: int
    saved: SavedState | None
    """The state that the run continues."""
    contents: Mapping[str, str]
    """See `TrainingState`."""
    prompts: Sequence[PreparedPrompt]
    """Of this process's samples, encoded."""
    num_prompts: int
    """Of all processes."""
    mark: RunMark
    trackers: Sequence[Tracker]
    uploads: HubUploads | None


def prepare_run(config: TrainConfig, held: ExitStack, stop: StopRequest) -> PreparedRun | None:
    """Check everything that can be checked before the model is loaded; None if the run is already complete.

    Args:
        held: takes what the run holds until its end.
        stop: the stop request that uploads observe.
    Raises:
        UserError: lists the problems that the user can fix.
    """
    saved = resumed_state(config)
    config = without_replaced_weights(config, saved)
    train_checks.check_files(config)
    requests = read_requests(config)
    accelerator = train_setup.build_accelerator(config)
    device, is_main = accelerator.device, accelerator.is_main_process
    _check_device(config, device)
    if is_main:
        _take_output(config, held, is_resuming=saved is not None)
        if config.run.resume is not None and saved is None:
            log.info("--resume %s: no state found, starting at step 0", config.run.resume)
        train_checks.log_notes(config, accelerator.num_processes, device)
    uploads = _open_uploads(config, stop) if is_main else None
    accelerator.wait_for_everyone()
    seed = train_setup.shared_seed(config.run, saved.run.seed if saved else None)
    datasets, data, validation_data = _open_data(config, seed)
    config = train_memory.fit_budget(config, data, accelerator, saved.run.options if saved else {})
    length = _run_length(config, data, accelerator.num_processes, saved)
    branch = branch_of(config, saved)
    contents = {**cache_contents(data), **model_contents(config.model)}
    if saved is not None:
        check_resumed(config, saved, data, length, seed, contents)
        is_validated = validation_data is not None
        if branch == saved.run.branch and _has_all_results(config, saved, length, requests, is_validated):
            log.info("%s: all %d steps are done, nothing to do", saved.folder.name, length.total_steps)
            return None
    _check_dry_build(config, saved, length, device)
    if is_main:
        for warning in train_setup.rate_warnings(config.optimizer, length.total_steps):
            log.warning("%s", warning)
        _describe(config, datasets, data, accelerator)
    if config.run.dry_run:
        return None
    mark = mark_run(config.tracking.log_prefix, saved.run if saved else None, branch)
    trackers: Sequence[Tracker] = ()
    if is_main:
        _write_options(config, seed, length, device, is_resuming=saved is not None)
        # Before a model is loaded: a key or a connection may be missing.
        trackers = open_trackers(config, mark, start_step=saved.run.step if saved else 0)
    return PreparedRun(
        config=config,
        accelerator=accelerator,
        datasets=datasets,
        data=data,
        validation_data=validation_data,
        length=length,
        seed=seed,
        saved=saved,
        contents=contents,
        prompts=_encode_own(config, requests, accelerator),
        num_prompts=len(requests),
        mark=mark,
        trackers=trackers,
        uploads=uploads,
    )


def _check_device(config: TrainConfig, device: torch.device) -> None:
    check_weight_format(config.model, device)
    if config.samples.sample_prompts is not None:
        check_vae(config.samples.vae_dtype, device)


def _open_uploads(config: TrainConfig, stop: StopRequest) -> HubUploads | None:
    is_used = config.hub.huggingface_repo_id is not None and not config.run.dry_run
    return HubUploads(config.hub, stop) if is_used else None


def _take_output(config: TrainConfig, held: ExitStack, *, is_resuming: bool) -> None:
    """Lock the output folder for this run; a dry run only checks that it could be written."""
    if config.run.dry_run:
        train_checks.check_output_unwritten(config, is_resuming=is_resuming)
        return
    train_checks.prepare_output(config, held, is_resuming=is_resuming)
    remove_old_word(ResultNames(config.saving.output_dir, config.saving.output_name))
    remove_leftover_files(config.saving.output_dir)
    remove_leftover_states(config.saving.output_dir)


def _open_data(config: TrainConfig, seed: int) -> tuple[DatasetConfig, CachedDataset, CachedDataset | None]:
    """The caches to train on and to validate on, both of sizes that the model takes."""
    datasets, data = train_setup.open_datasets(config, seed)
    data, validation_data = train_setup.open_validation(config, data)
    for part in (data, validation_data):
        if part is not None:
            train_checks.check_sizes(config, part)
    return datasets, data, validation_data


def _has_all_results(
    config: TrainConfig,
    saved: SavedState,
    length: TrainingLength,
    requests: Sequence[VideoRequest],
    is_validated: bool,
) -> bool:
    """Whether the run has ended, with its final files, its last samples and its last validation."""
    steps = length.total_steps
    epoch, rest = divmod(steps, length.steps_per_epoch)
    lacks_samples = are_missing(config, steps, None if rest else epoch, len(requests))
    lacks_validation = is_validated and not was_measured(config.saving, steps)
    return is_finished(config.saving, saved, steps) and not lacks_samples and not lacks_validation


def _check_dry_build(
    config: TrainConfig, saved: SavedState | None, length: TrainingLength, device: torch.device
) -> None:
    """Build without data what is trained; a plan for a card takes no trial step on a machine without one."""
    is_dry_run = config.run.dry_run
    is_for_other_machine = is_dry_run and config.run.vram_budget is not None and device.type != "cuda"
    with nullcontext() if is_dry_run else quiet_logging():
        check_dry_build(config, saved, length.total_steps, None if is_for_other_machine else device)


def _encode_own(
    config: TrainConfig, requests: Sequence[VideoRequest], accelerator: Accelerator
) -> list[PreparedPrompt]:
    """The encoded prompts of this process: processes take turns."""
    own = list(enumerate(requests))[accelerator.process_index :: accelerator.num_processes]
    return encode_requests(config, own, accelerator.device)


def _describe(
    config: TrainConfig, datasets: DatasetConfig, data: CachedDataset, accelerator: Accelerator
) -> None:
    """Log what is about to be trained, and in a dry run print the memory plan."""
    rarity = rarity_warning(config.timesteps, {item.shape[1:] for item in data.items})
    if rarity is not None:
        log.warning("%s", rarity)
    train_checks.log_datasets(datasets, data)
    log.info("%s", train_checks.describe_model(config.model))
    if config.run.dry_run:
        print_report(train_memory.dry_run_report(config, data, accelerator))


def _write_options(
    config: TrainConfig, seed: int, length: TrainingLength, device: torch.device, *, is_resuming: bool
) -> None:
    """Replace what `--overwrite` allows, and leave the options of the run in its folder."""
    train_checks.remove_replaced(config, is_resuming=is_resuming)
    if config.tracking.log_config:
        log.info("options: %s", shareable_options(config))
    resolved = {"seed": seed, **train_setup.resolved_precision(config.model, device)}
    if config.run.max_train_epochs is None:
        resolved["max_train_steps"] = length.total_steps
    settings = ResultNames(config.saving.output_dir, config.saving.output_name).config
    with disk_errors(settings, how_to_continue(config.saving.output_dir, config.saving.output_name)):
        write_config(settings, config, resolved)


def _run_length(
    config: TrainConfig, data: CachedDataset, num_processes: int, saved: SavedState | None
) -> TrainingLength:
    batches = len(data.epoch_batches(1))
    per_step = config.run.gradient_accumulation_steps * num_processes
    epochs = config.run.max_train_epochs
    requested = config.run.max_train_steps if epochs is None else epochs * -(-batches // per_step)
    return TrainingLength(
        batches_per_epoch=batches,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        num_processes=num_processes,
        total_steps=resolve_total_steps(requested, saved),
    )
