"""Processes that a launcher started for one job: sharing work and agreeing on the outcome.

Values travel over gloo, on the CPU, whatever the processes compute on.
"""

from __future__ import annotations

import datetime
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch.distributed as dist

from modules.errors import ResourceError, UserError
from modules.logs import only_warnings

T = TypeVar("T")

_WORDS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
"""What torchrun and accelerate tell the processes they start."""
_PATIENCE = datetime.timedelta(days=7)
"""One process may have much more to do than another, and none of them is stuck."""

_CRASHED = UserError.exit_code
"""Of a process that ends with a traceback."""


@dataclass(frozen=True, slots=True)
class Processes:
    """The rank of this process and the number of processes."""

    index: int = 0
    count: int = 1
    index_on_machine: int = 0

    @property
    def is_main(self) -> bool:
        """Whether this is the main process, which logs and writes for all."""
        return self.index == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Which of the items are this process's: every `count`-th, so that large and small ones mix."""
        return items[self.index :: self.count]

    def gather(self, value: T) -> list[T]:
        """Gather the values of all processes, in rank order; waits for all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def together(self, action: Callable[[], T]) -> T:
        """Run an action in all processes; when one fails all end, with the exit code of the failure.

        Raises:
            Exception: here, whatever the action raised; other errors than a UserError have code 1.
            SystemExit: in the other processes; the failing one logs the reason.
        """
        try:
            result = action()
        except Exception as error:  # of any kind: the others wait for this answer
            self.gather(error.exit_code if isinstance(error, UserError) else _CRASHED)
            raise
        codes = self.gather(0)
        if any(codes):
            raise SystemExit(max(codes))
        return result


@contextmanager
def joined_processes() -> Iterator[Processes]:
    """Join the processes that the launcher started, if there was one; all but the first log warnings only.

    Raises:
        ResourceError: the launcher announced several processes and did not say how they find each other.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield Processes()
        return
    missing = [word for word in _WORDS if word not in os.environ]
    if missing:
        raise ResourceError(
            f"{count} processes were announced (WORLD_SIZE) without {', '.join(missing)}. Start with:\n"
            f"  accelerate launch --multi_gpu --num_processes {count} --num_machines 1 ..."
        )
    dist.init_process_group("gloo", timeout=_PATIENCE)
    processes = Processes(dist.get_rank(), count, int(os.environ.get("LOCAL_RANK", "0")))
    try:
        with only_warnings(not processes.is_main):
            yield processes
    finally:
        dist.destroy_process_group()
