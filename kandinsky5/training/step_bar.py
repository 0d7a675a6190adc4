"""The progress bar of a training: it times steps alone, and the first ones give the time of the rest."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from time import time  # the clock of tqdm

from tqdm import tqdm

STEPS_UNTIL_ESTIMATE = 5
"""Steps that are timed for the estimate, after the first one, which may compile."""


class StepBar:
    """A progress bar that stands still while something else than a step is done."""

    def __init__(self, step: int, total_steps: int) -> None:
        self._bar = tqdm(initial=step, total=total_steps, desc="steps", smoothing=0.05)
        self._start: tuple[int, float] | None = None

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Within the block no time passes for the bar."""
        start = time()
        try:
            yield
        finally:
            seconds = time() - start
            self._bar.start_t += seconds
            self._bar.last_print_t += seconds

    def advance(self, mean_loss: float) -> float | None:
        """Count a step; returns the seconds of the remaining ones, once, when the estimate is due."""
        self._bar.set_postfix(avr_loss=f"{mean_loss:.4f}", refresh=False)
        self._bar.update()
        step, elapsed = self._bar.n, self._bar.format_dict["elapsed"]
        if self._start is None:
            self._start = step, elapsed
        first, before = self._start
        if step - first != STEPS_UNTIL_ESTIMATE:
            return None
        return (self._bar.total - step) * (elapsed - before) / STEPS_UNTIL_ESTIMATE

    def close(self) -> None:
        """Leave the bar as it is."""
        self._bar.close()
