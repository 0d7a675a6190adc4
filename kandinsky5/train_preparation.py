"""What happens before a training run loads its model: checks, the run's length, its prompts and trackers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from accelerate import Accelerator

from dataset.cached_dataset import CachedDataset
from dataset.config import DatasetConfig
from kandinsky5 import train_checks, train_memory, train_setup
from kandinsky5.configs.train import TrainConfig
from kandinsky5.devices import check_fast_products
from kandinsky5.hub import HubUploads
from kandinsky5.machine_notes import machine_notes
from kandinsky5.saved_config import shareable_options, write_config
from kandinsky5.saving import OutputNames
from kandinsky5.timesteps import rarity_warning
from kandinsky5.trackers import Tracker, open_trackers
from kandinsky5.train_output import disk_errors
from kandinsky5.train_plan import RunLength
from kandinsky5.train_rehearsal import rehearse
from kandinsky5.train_resume import (
    branch_of,
    check_resumed,
    is_finished,
    resolve_total_steps,
    resumed_state,
)
from kandinsky5.train_samples import PreparedPrompt, are_missing, encode_requests, read_requests
from kandinsky5.train_setup import RunMark
from kandinsky5.training_state import SavedState, remove_stray_states
from kandinsky5.validation_checks import was_measured
from modules.files import remove_strays
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
    saving = config.saving
    saved = resumed_state(config)
    train_checks.check_files(config)
    requests = read_requests(config)
    accelerator = train_setup.build_accelerator(config)
    check_fast_products(config.model, accelerator.device)
    is_resuming, is_dry = config.run.resume is not None, config.run.dry_run
    if is_dry:
        train_checks.check_output_unwritten(config, is_resuming=is_resuming)
    elif accelerator.is_main_process:
        train_checks.prepare_output(config, held, is_resuming=is_resuming)
        remove_strays(saving.output_dir)
        remove_stray_states(saving.output_dir)
    if accelerator.is_main_process:
        idle_here = machine_notes(config, accelerator.num_processes, accelerator.device)
        for note in (*config.notes, *idle_here):
            log.info("%s", note)
    wants_uploads = config.hub.huggingface_repo_id is not None and accelerator.is_main_process and not is_dry
    uploads = HubUploads(config.hub, stop) if wants_uploads else None
    accelerator.wait_for_everyone()
    seed = train_setup.shared_seed(config.run, saved.run.seed if saved else None)
    datasets, data = train_setup.open_datasets(config, seed)
    data, validation_data = train_setup.open_validation(config, data)
    for measured in (data, validation_data):
        if measured is not None:
            train_checks.check_sizes(config, measured)
    rarity = rarity_warning(config.timesteps, {item.shape[1:] for item in data.items})
    if rarity is not None and accelerator.is_main_process:
        log.warning("%s", rarity)
    config = train_memory.fit_budget(config, data, accelerator)
    length = _run_length(config, data, accelerator.num_processes, saved)
    branch = branch_of(config, saved)
    if saved is not None:
        check_resumed(config, saved, data, length, seed)
        is_measured = validation_data is None or was_measured(saving, length.total_steps)
        is_done = branch == saved.run.branch and is_finished(saving, saved, length.total_steps)
        epoch, rest = divmod(length.total_steps, length.steps_per_epoch)
        lacks_samples = are_missing(config, length.total_steps, None if rest else epoch, len(requests))
        if is_done and is_measured and not lacks_samples:
            log.info("%s: all %d steps are done, nothing to do", saved.folder.name, length.total_steps)
            return None
    is_elsewhere = is_dry and config.run.vram_budget is not None and accelerator.device.type != "cuda"
    with nullcontext() if is_dry else unsaid():
        rehearse(config, saved, length.total_steps, None if is_elsewhere else accelerator.device)
    if accelerator.is_main_process:
        train_checks.log_datasets(datasets, data)
        log.info("%s", train_checks.describe_model(config.model))
    if is_dry:
        if accelerator.is_main_process:
            print_report(train_memory.dry_run_report(config, data, accelerator))
        return None
    if accelerator.is_main_process:
        train_checks.remove_replaced(config, is_resuming=is_resuming)
        if config.tracking.log_config:
            log.info("options: %s", shareable_options(config))
        resolved = {"seed": seed, **train_setup.resolved_precision(config.model, accelerator.device)}
        if config.run.max_train_epochs is None:
            resolved["max_train_steps"] = length.total_steps
        settings = OutputNames(saving.output_dir, saving.output_name).config
        with disk_errors(settings):
            write_config(settings, config, resolved)
    mark = train_setup.mark_run(config.tracking.log_prefix, saved.run if saved else None, branch)
    trackers: list[Tracker] = []
    if accelerator.is_main_process:  # before a model is loaded: a key or a connection may be missing
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
        prompts=prompts,
        num_prompts=len(requests),
        mark=mark,
        trackers=trackers,
        uploads=uploads,
    )


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
