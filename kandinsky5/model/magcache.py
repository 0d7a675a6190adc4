"""MagCache: skips the visual blocks at steps where their residual is known to change little.

Source: kandinskylab/kandinsky-5:kandinsky/magcache_utils.py.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kandinsky5.model.dit import BlockResidual

DEFAULT_THRESHOLD = 0.12
DEFAULT_MAX_SKIPS = 2
DEFAULT_RETENTION = 0.2


_RATIOS_FILE = Path(__file__).with_name("magcache_ratios.json")


def task_ratios(task_name: str) -> list[float] | None:
    """The official ratios of a task, conditional and unconditional in turn from the second step on.

    None for tasks that have none: pretrained, distilled and tiny ones.
    Source: kandinskylab/kandinsky-5:configs/*.yaml.
    """
    return json.loads(_RATIOS_FILE.read_text(encoding="utf-8")).get(task_name)


def resample_nearest(values: Sequence[float], count: int) -> list[float]:
    """Pick `count` of the values by nearest index, ends kept; halves round to even, one value is the last."""
    if count == 1:
        return [values[-1]]
    step = (len(values) - 1) / (count - 1)
    return [values[round(index * step)] for index in range(count)]


def effective_ratios(ratios: Sequence[float], num_steps: int) -> list[float]:
    """The ratio of every model call: [1, 1] + ratios, resampled per branch when made for other lengths."""
    full = [1.0, 1.0, *ratios]
    if len(full) == 2 * num_steps:
        return full
    conditional = resample_nearest(full[0::2], num_steps)
    unconditional = resample_nearest(full[1::2], num_steps)
    return [ratio for pair in zip(conditional, unconditional, strict=True) for ratio in pair]


@dataclass(slots=True)
class _Branch:
    """Accumulators of the conditional or of the unconditional passes."""

    reuse: BlockResidual = field(default_factory=BlockResidual)
    error: float = 0.0
    skips: int = 0
    ratio: float = 1.0

    def reset(self) -> None:
        self.error, self.skips, self.ratio = 0.0, 0, 1.0


class MagCache:
    """Decides per model call whether the visual blocks are skipped; one object per sampled clip.

    Args:
        ratios: residual magnitude ratios of the task from the second step on, conditional and unconditional
            in turn.
        uses_guidance: whether every step makes two calls.
        threshold, max_skips, retention: largest accumulated error, longest run of skips, share of steps at
            the start that are never skipped.
    """

    def __init__(
        self,
        ratios: Sequence[float],
        num_steps: int,
        *,
        uses_guidance: bool,
        threshold: float = DEFAULT_THRESHOLD,
        max_skips: int = DEFAULT_MAX_SKIPS,
        retention: float = DEFAULT_RETENTION,
    ) -> None:
        self.ratios = effective_ratios(ratios, num_steps)
        self.skipped: list[bool] = []
        """The decision for each call."""
        self._stride = 1 if uses_guidance else 2
        self._threshold = threshold
        self._max_skips = max_skips
        self._first_skippable = int(2 * num_steps * retention)
        self._call = 0
        self._branches = (_Branch(), _Branch())

    def next_pass(self) -> BlockResidual:
        """The residual for the next forward pass, marked for use or for recording."""
        if self._call >= len(self.ratios):
            self._call = 0
            self._branches = (_Branch(), _Branch())
        branch = self._branches[self._call % 2]
        branch.reuse.skip = self._may_skip(branch)
        self.skipped.append(branch.reuse.skip)
        self._call += self._stride
        return branch.reuse

    def _may_skip(self, branch: _Branch) -> bool:
        if self._call < self._first_skippable:
            return False
        branch.ratio *= self.ratios[self._call]
        branch.skips += 1
        branch.error += abs(1 - branch.ratio)
        if branch.error < self._threshold and branch.skips <= self._max_skips:
            return True
        branch.reset()
        return False
