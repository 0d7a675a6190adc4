"""Maps optimizer steps to batches by arithmetic on the step number alone, so a run resumes at any step.

An optimizer step takes `gradient_accumulation_steps * num_processes` consecutive batches in the epoch's
order. Steps never cross the end of an epoch: its last one takes what is left. Every clip of a step weighs the
same, whatever batch it came in, so neither short batches nor the number of processes change the average.
"""

from __future__ import annotations

import hashlib
import os
from collections import deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from dataset.cache.cached_dataset import BatchPlan, CachedBatch, CachedDataset

_READ_AHEAD = 2
"""Batches that every reading thread may have ready."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingLength:
    """The relation of steps, epochs and batches. Steps and epochs are counted from 0 here."""

    batches_per_epoch: int
    gradient_accumulation_steps: int
    num_processes: int
    total_steps: int

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.batches_per_epoch // self.batches_per_step)

    @property
    def batches_per_step(self) -> int:
        """Over all processes; the last step of an epoch may have fewer."""
        return self.gradient_accumulation_steps * self.num_processes

    @property
    def num_epochs(self) -> int:
        """Epochs begun."""
        return -(-self.total_steps // self.steps_per_epoch)


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """One forward and backward pass of one process."""

    plan: BatchPlan
    position: int
    """Number of the batch within the step, over all processes."""
    is_filler: bool
    """Repeats another batch at weight 0, because processes must keep in step."""
    is_last: bool
    """Of this process in this step: gradients are exchanged after it."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """The work of one process for one optimizer step."""

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    num_items: int
    """Clips of the step over all processes."""


class PlanSequence:
    """The steps of a run for one process, in order, from any step on."""

    def __init__(self, data: CachedDataset, length: TrainingLength, process_index: int) -> None:
        self._data = data
        self._length = length
        self._process_index = process_index
        self._epoch = -1
        self._batches: Sequence[BatchPlan] = ()

    def step(self, step: int) -> StepPlan:
        """The plan of one step, a pure function of the dataset's seed and `step`."""
        epoch, index = divmod(step, self._length.steps_per_epoch)
        if epoch != self._epoch:
            self._batches = self._data.epoch_batches(epoch + 1)
            self._epoch = epoch
        start = index * self._length.batches_per_step
        group = self._batches[start : start + self._length.batches_per_step]
        rounds = -(-len(group) // self._length.num_processes)
        micro_batches = []
        for number in range(rounds):
            position = number * self._length.num_processes + self._process_index
            chosen = min(position, len(group) - 1)
            micro_batches.append(
                MicroBatch(group[chosen], position, position >= len(group), number == rounds - 1)
            )
        return StepPlan(step, epoch, tuple(micro_batches), sum(len(batch.item_keys) for batch in group))

    def steps(self, start: int) -> Iterator[StepPlan]:
        """From step `start` to the end of the run."""
        return (self.step(step) for step in range(start, self._length.total_steps))


def batch_loader(
    data: CachedDataset, length: TrainingLength, process_index: int, *, start_step: int, num_workers: int
) -> Generator[CachedBatch, None, None]:
    """The batches of all steps from `start_step` on, in order; close it to stop reading ahead.

    Threads read, because a read is file access and copies of memory, neither of which holds Python's lock:
    processes would hand over every batch through /dev/shm, which containers keep small.

    Args:
        num_workers: threads that read ahead; 0 reads each batch when it is asked for.
    Raises:
        CacheError: see `CachedDataset.load_batch`; raised in the place of the batch.
    """
    plans = (
        micro_batch.plan
        for step in PlanSequence(data, length, process_index).steps(start_step)
        for micro_batch in step.micro_batches
    )
    if num_workers == 0:
        yield from map(data.load_batch, plans)
        return
    num_threads = min(num_workers, os.cpu_count() or 1)
    pool = ThreadPoolExecutor(num_threads, thread_name_prefix="read-caches")
    coming: deque[Future[CachedBatch]] = deque()
    try:
        for plan in plans:
            coming.append(pool.submit(data.load_batch, plan))
            if len(coming) > _READ_AHEAD * num_threads:
                yield coming.popleft().result()
        while coming:
            yield coming.popleft().result()
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def data_order_hash(data: CachedDataset) -> str:
    """Hash of the order of the first epoch and of its captions.

    Another dataset, batch size, seed, dropout rate or number of captions gives another.
    """
    digest = hashlib.sha256("".join(f"{rule}\n" for rule in data.caption_rules).encode("utf-8"))
    for batch in data.epoch_batches(1):
        digest.update("\n".join([*batch.item_keys, ""]).encode("utf-8") + b"\n")
    return digest.hexdigest()
