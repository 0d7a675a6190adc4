"""The bar of a training times steps alone, and the first steps give the time of the rest."""

from __future__ import annotations

from pathlib import Path

import pytest
import tqdm.std

from kandinsky5.training import step_bar, training_log
from kandinsky5.training.step_bar import STEPS_UNTIL_ESTIMATE, StepBar
from tests.kandinsky5.training.training_runs import train

pytestmark = pytest.mark.fast


def test_only_steps_take_time_and_the_first_gives_no_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(step_bar, "time", lambda: now[0])
    monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
    bar = StepBar(10, 10 + 1 + STEPS_UNTIL_ESTIMATE + 30)
    estimates = []
    for seconds in (500.0, *[2.0] * STEPS_UNTIL_ESTIMATE, 2.0):  # the first step compiles
        now[0] += seconds
        estimates.append(bar.advance(0.5))
        with bar.paused():
            now[0] += 100.0
    bar.close()
    assert estimates == [*[None] * STEPS_UNTIL_ESTIMATE, 60.0, None]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ((), "a LoRA at the end"),
        (
            ("--save_every_n_steps", 4, "--save_every_n_epochs", 1),
            "a LoRA every 4 steps and every epoch and at the end",
        ),
    ],
)
def test_a_long_run_logs_the_time_of_the_rest_and_when_it_saves(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[object, ...],
    expected: str,
) -> None:
    monkeypatch.setattr(training_log, "SHORTEST_ESTIMATE", 0.0)
    train(dit, dataset, tmp_path, "--max_train_steps", 7, *words)
    (line,) = [line for line in said.messages if "remaining" in line]
    assert line.startswith("about 0 s for the remaining 1 step (0.")
    assert line.endswith(expected)
