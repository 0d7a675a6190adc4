"""The run of both caching scripts: reads the datasets, encodes missing caches, updates the index.

Batches are cut from the full sorted list and encoded whole, whatever is cached already: the batch an item is
encoded in, and so its bytes, never depend on what was done before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import torch

from dataset.cache.index import CacheKind, IndexEntry
from dataset.clips import ClipPlan, plan_clips
from dataset.config.config import AnyDatasetConfig, DatasetConfig, load_dataset_config
from dataset.confinement import Confinement
from dataset.sources.items import SourceListing
from dataset.sources.listing import list_items
from kandinsky5.caching.masks import mask_notes
from kandinsky5.caching.report import (
    Outcome,
    cache_folders,
    check_strict,
    combine,
    finish,
    handle_unused,
    write_index,
)
from kandinsky5.configs.caching import CacheLatentsConfig, CacheRunConfig
from modules.devices import pick_device
from modules.interruption import exit_on_signal
from modules.logs import get_logger
from modules.processes import Processes, joined_processes

log = get_logger(__name__)


class CachingJob(Protocol):
    """Creates one kind of cache for all datasets, in one of several processes."""

    @property
    def kind(self) -> CacheKind: ...

    @property
    def outcomes(self) -> Sequence[Outcome]:
        """One per dataset, with the items that are skipped before anything is encoded."""
        ...

    def choose(self) -> None:
        """Find the caches that are missing, and this process's share of the batches that hold one."""
        ...

    def encode(self) -> None:
        """Write the chosen caches; the model is loaded only if there are any."""
        ...

    def entries(self) -> Iterable[IndexEntry]:
        """For each outcome the entry of its dataset in the index of the cache folder."""
        ...


def make_caches(job_for: Callable[[Processes], CachingJob], run: CacheRunConfig) -> None:
    """Run a job; several processes of a launcher share its batches, the first one writes indexes and logs.

    Raises:
        ConfigError, DataError, ModelFileError, ResourceError: each with a remedy; damaged media end the run
        only after everything else is cached.
    """
    with exit_on_signal(), joined_processes() as processes:
        job = job_for(processes)
        check_strict(job.outcomes, run)
        with cache_folders([outcome.dataset for outcome in job.outcomes], processes):
            processes.together(job.choose)  # no process encodes before all have seen what is missing
            processes.together(job.encode)
            combine(job.outcomes, processes)
            if not processes.is_main:
                return
            for outcome, entry in zip(job.outcomes, job.entries(), strict=True):
                write_index(outcome, job.outcomes, job.kind, entry, run)
            handle_unused(job.outcomes, job.kind, run)
        finish(job.outcomes, job.kind, run)


def read_datasets(run: CacheRunConfig) -> DatasetConfig:
    """The dataset file, described in the log."""
    datasets = load_dataset_config(run.dataset_config)
    for note in datasets.notes:
        log.info("%s", note)
    log.info("%s", datasets.describe())
    return datasets


def list_sources(
    dataset: AnyDatasetConfig, datasets: Sequence[AnyDatasetConfig], run: CacheRunConfig
) -> SourceListing:
    """The media and captions of one of the datasets, confined to the dataset file's folder if asked for."""
    confinement = Confinement.to_folder_of(run.dataset_config) if run.confine_paths else None
    listing = list_items(dataset, others=datasets, confinement=confinement)
    for note in listing.notes:
        log.warning("%s", note)
    return listing


def plan_media(dataset: AnyDatasetConfig, listing: SourceListing, config: CacheLatentsConfig) -> ClipPlan:
    """The clips of a dataset, with what was noticed in the log."""
    plan = plan_clips(dataset, listing, nabla_resize=config.nabla_resize, num_workers=config.run.num_workers)
    for note in (*plan.notes, *mask_notes(dataset, listing)):
        log.info("%s", note)
    return plan


def encoding_device(run: CacheRunConfig, processes: Processes) -> torch.device:
    """The device of this process."""
    return pick_device(run.device, processes.index_on_machine if processes.count > 1 else None)
