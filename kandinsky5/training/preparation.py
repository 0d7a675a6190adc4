"""What happens before a training run loads its model: checks, the run's length, its prompts and trackers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator

from dataset.cache.cached_dataset import CachedDataset
from dataset.config.config import DatasetConfig
from kandinsky5.configs.train import TrainConfig
from kandinsky5.model.precision import check_fast_products, check_vae
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.training import checks as train_checks
from kandinsky5.training import memory as train_memory
from kandinsky5.training import setup as train_setup
from kandinsky5.training.control import remove_old_word
from kandinsky5.training.loss.timesteps import rarity_warning
from kandinsky5.training.machine_notes import machine_notes
from kandinsky5.training.plan import RunLength
from kandinsky5.training.rehearsal import rehearse
from kandinsky5.training.results.hub import HubUploads
from kandinsky5.training.results.names import RESUME_HINT, OutputNames
from kandinsky5.training.results.run_mark import RunMark, mark_run
from kandinsky5.training.results.saved_config import shareable_options, write_config
from kandinsky5.training.results.state import SavedState, remove_stray_states
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
from modules.files import disk_errors, remove_strays
from modules.interruption import StopRequest
from modules.logs import get_logger, print_report, unsaid

log = get_logger(__name__)


@dataclass(frozen=True, kw_only=True, slots=True)
class PreparedRun:
    """A run that has passed all checks."""

    config: TrainConfig
    accelerator: Accelerator
    datasets: DatasetConfig
    data: CachedDataset
    validation_data: CachedDataset | None
    length: RunLength
    seed: int
    saved: SavedState | None
    """Where it goes on from."""
    contents: Mapping[str, str]
    """See `RunState`."""
    prompts: Sequence[PreparedPrompt]
    """Of this process's samples, encoded."""
    num_prompts: int
    """Of all processes."""
    mark: RunMark
    trackers: Sequence[Tracker]
    uploads: HubUploads | None


def prepare_run(config: TrainConfig, held: ExitStack, stop: StopRequest) -> PreparedRun | None:
    """Check everything; None if there is nothing to train.

    Args:
        held: takes what the run holds until its end.
        stop: what uploads heed.
    """
    saved = resumed_state(config)
    config = without_replaced_weights(config, saved)
    train_checks.check_files(config)
    requests = read_requests(config)
    accelerator = train_setup.build_accelerator(config)
    check_fast_products(config.model, accelerator.device)
    if config.samples.sample_prompts is not None:
        check_vae(config.samples.vae_dtype, accelerator.device)
    is_main, is_dry = accelerator.is_main_process, config.run.dry_run
    if is_main:
        _take_output(config, held)
        for note in (*config.notes, *machine_notes(config, accelerator.num_processes, accelerator.device)):
            log.info("%s", note)
    wants_uploads = config.hub.huggingface_repo_id is not None and is_main and not is_dry
    uploads = HubUploads(config.hub, stop) if wants_uploads else None
    accelerator.wait_for_everyone()
    seed = train_setup.shared_seed(config.run, saved.run.seed if saved else None)
    datasets, data, validation_data = _open_data(config, seed)
    config = train_memory.fit_budget(config, data, accelerator)
    length = _run_length(config, data, accelerator.num_processes, saved)
    branch = branch_of(config, saved)
    contents = {**cache_contents(data), **model_contents(config.model)}
    if saved is not None:
        check_resumed(config, saved, data, length, seed, contents)
        is_measured = validation_data is None or was_measured(config.saving, length.total_steps)
        if branch == saved.run.branch and is_measured and _has_all_files(config, saved, length, requests):
            log.info("%s: all %d steps are done, nothing to do", saved.folder.name, length.total_steps)
            return None
    _rehearse(config, saved, length, accelerator.device)
    if is_main:
        _describe(config, datasets, data)
    if is_dry:
        if is_main:
            print_report(train_memory.dry_run_report(config, data, accelerator))
        return None
    mark = mark_run(config.tracking.log_prefix, saved.run if saved else None, branch)
    trackers: list[Tracker] = []
    if is_main:
        _write_options(config, seed, length, accelerator.device)
        # Before a model is loaded: a key or a connection may be missing.
        trackers = open_trackers(config, mark, start_step=saved.run.step if saved else 0)
    own = list(enumerate(requests))[accelerator.process_index :: accelerator.num_processes]
    prompts = encode_requests(config, own, accelerator.device)
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
        prompts=prompts,
        num_prompts=len(requests),
        mark=mark,
        trackers=trackers,
        uploads=uploads,
    )


def _take_output(config: TrainConfig, held: ExitStack) -> None:
    """Make the output folder this run's own, or in a dry run see that it could be."""
    is_resuming = config.run.resume is not None
    if config.run.dry_run:
        train_checks.check_output_unwritten(config, is_resuming=is_resuming)
        return
    train_checks.prepare_output(config, held, is_resuming=is_resuming)
    remove_old_word(OutputNames(config.saving.output_dir, config.saving.output_name))
    remove_strays(config.saving.output_dir)
    remove_stray_states(config.saving.output_dir)


def _open_data(config: TrainConfig, seed: int) -> tuple[DatasetConfig, CachedDataset, CachedDataset | None]:
    """What is trained on and what is measured, of sizes that the model takes."""
    datasets, data = train_setup.open_datasets(config, seed)
    data, validation_data = train_setup.open_validation(config, data)
    for part in (data, validation_data):
        if part is not None:
            train_checks.check_sizes(config, part)
    return datasets, data, validation_data


def _has_all_files(
    config: TrainConfig, saved: SavedState, length: RunLength, requests: Sequence[VideoRequest]
) -> bool:
    """Whether the run has ended, with its last samples."""
    epoch, rest = divmod(length.total_steps, length.steps_per_epoch)
    lacks_samples = are_missing(config, length.total_steps, None if rest else epoch, len(requests))
    return is_finished(config.saving, saved, length.total_steps) and not lacks_samples


def _rehearse(config: TrainConfig, saved: SavedState | None, length: RunLength, device: torch.device) -> None:
    """Build without data what is trained; a plan for a card need not step on a machine without one."""
    is_dry = config.run.dry_run
    is_elsewhere = is_dry and config.run.vram_budget is not None and device.type != "cuda"
    with nullcontext() if is_dry else unsaid():
        rehearse(config, saved, length.total_steps, None if is_elsewhere else device)


def _describe(config: TrainConfig, datasets: DatasetConfig, data: CachedDataset) -> None:
    rarity = rarity_warning(config.timesteps, {item.shape[1:] for item in data.items})
    if rarity is not None:
        log.warning("%s", rarity)
    train_checks.log_datasets(datasets, data)
    log.info("%s", train_checks.describe_model(config.model))


def _write_options(config: TrainConfig, seed: int, length: RunLength, device: torch.device) -> None:
    """Replace what `--overwrite` allows, and leave the options of the run in its folder."""
    train_checks.remove_replaced(config, is_resuming=config.run.resume is not None)
    if config.tracking.log_config:
        log.info("options: %s", shareable_options(config))
    resolved = {"seed": seed, **train_setup.resolved_precision(config.model, device)}
    if config.run.max_train_epochs is None:
        resolved["max_train_steps"] = length.total_steps
    settings = OutputNames(config.saving.output_dir, config.saving.output_name).config
    with disk_errors(settings, RESUME_HINT):
        write_config(settings, config, resolved)


def _run_length(
    config: TrainConfig, data: CachedDataset, num_processes: int, saved: SavedState | None
) -> RunLength:
    batches = len(data.epoch_batches(1))
    per_step = config.run.gradient_accumulation_steps * num_processes
    epochs = config.run.max_train_epochs
    asked = config.run.max_train_steps if epochs is None else epochs * -(-batches // per_step)
    return RunLength(
        batches_per_epoch=batches,
        gradient_accumulation_steps=config.run.gradient_accumulation_steps,
        num_processes=num_processes,
        total_steps=resolve_total_steps(asked, saved),
    )
