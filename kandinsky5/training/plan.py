"""Which batches make which optimizer step: arithmetic on the step number alone, so a run resumes anywhere.

An optimizer step takes `gradient_accumulation_steps * num_processes` consecutive batches in the epoch's
order. Steps never cross the end of an epoch: its last one takes what is left. Every clip of a step weighs the
same, whatever batch it came in, so neither short batches nor the number of processes change the average.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Sampler

from dataset.cache.cached_dataset import BatchPlan, CachedBatch, CachedDataset
from modules.errors import ResourceError
from modules.interruption import ignore_signals


@dataclass(frozen=True, kw_only=True, slots=True)
class RunLength:
    """How steps, epochs and batches relate. Steps and epochs are counted from 0 here."""

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
    """All that one process does for one optimizer step."""

    step: int
    epoch: int
    micro_batches: tuple[MicroBatch, ...]
    num_items: int
    """Clips of the step over all processes."""


class PlanSequence:
    """The steps of a run for one process, in order, from any step on."""

    def __init__(self, data: CachedDataset, length: RunLength, process_index: int) -> None:
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


class _RunOrder(Sampler[BatchPlan]):
    def __init__(self, plans: PlanSequence, start: int, count: int) -> None:
        self._plans, self._start, self._count = plans, start, count

    def __iter__(self) -> Iterator[BatchPlan]:
        for plan in self._plans.steps(self._start):
            for micro_batch in plan.micro_batches:
                yield micro_batch.plan

    def __len__(self) -> int:
        return self._count


def batch_loader(
    data: CachedDataset, length: RunLength, process_index: int, *, start_step: int, num_workers: int
) -> Iterator[CachedBatch]:
    """The batches of all steps from `start_step` on: one loader for the whole run.

    Nothing is read to be skipped, and the loader's processes live through the ends of epochs.
    """
    plans = PlanSequence(data, length, process_index)
    rounds = length.gradient_accumulation_steps * (length.total_steps - start_step)
    loader = DataLoader(
        data,
        batch_size=None,
        sampler=_RunOrder(plans, start_step, rounds),
        num_workers=min(num_workers, os.cpu_count() or 1),
        # Its own generator: the loader would otherwise move the global one.
        generator=torch.Generator().manual_seed(0),
        worker_init_fn=_start_reader,
    )
    return iter(loader)


def _start_reader(_number: int) -> None:
    # A signal to the whole process group must leave the batches that finish the present step.
    ignore_signals()


def reader_problem(error: Exception) -> ResourceError | None:
    """What to say if a process of `batch_loader` was killed; None for every other error.

    torch raises it from a signal handler, so it may surface anywhere in the main process, and what it
    interrupts, such as the writing of a file, may raise an error of its own over it.
    """
    found: BaseException | None = error
    while found is not None and "DataLoader worker" not in str(found):
        found = found.__cause__ or found.__context__
    if found is None:
        return None
    return ResourceError(
        f"a process that reads caches ended unexpectedly: {found}\n"
        "If memory was short, use fewer: --max_data_loader_n_workers 1. Go on with --resume auto."
    )


def data_order_hash(data: CachedDataset) -> str:
    """Names the order of the first epoch and what its captions are drawn from.

    Another dataset, batch size, seed, dropout rate or number of captions gives another.
    """
    digest = hashlib.sha256("".join(f"{rule}\n" for rule in data.caption_rules).encode("utf-8"))
    for batch in data.epoch_batches(1):
        digest.update("\n".join([*batch.item_keys, ""]).encode("utf-8") + b"\n")
    return digest.hexdigest()
