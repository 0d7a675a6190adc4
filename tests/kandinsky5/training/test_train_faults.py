"""Whatever fails while a run saves, and whenever it is killed: the last good state is there to go on from."""

from __future__ import annotations

import os
import random
import shutil
import signal
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.training import trainer as training
from kandinsky5.training.results.state import find_state, read_state, remove_leftover_states
from modules.files import remove_leftover_files
from modules.tensor_files import read_tensors
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.step_record import assert_same_results, hash_of, state_hashes
from tests.kandinsky5.training.training_runs import train, write_dataset, write_dit

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks")

STEPS = 4
STATES = ("state", "step00000003-state", "step00000004-state")
"""What stays of the states with `--save_last_n_steps 1`."""
SAVING = (
    *("--save_state", "--save_every_n_steps", 1, "--save_last_n_steps", 1, "--ema_decay", 0.8),
    *("--network_args", "include_patterns=['visual.*self_attention.*']"),
    *("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"),
)


@dataclass(frozen=True)
class Files:
    """What all runs read, and an uninterrupted run that kept every state."""

    dit: Path
    data: Path
    whole: Path

    def train(self, output: Path, *words: object, steps: int = STEPS) -> None:
        train(self.dit, self.data, output, *SAVING, "--max_train_steps", steps, *words)

    def state(self, step: int) -> dict[str, str]:
        return state_hashes(read_state(self.whole / f"lora-step{step:08d}-state"))

    def loras(self) -> dict[str, str]:
        """File name -> hash of its tensors."""
        return {path.name: lora_hash(path) for path in self.whole.glob("*.safetensors")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("faults")
    files = Files(write_dit(folder), write_dataset(folder / "data"), folder / "whole")
    files.train(files.whole, "--save_last_n_steps", 99)
    return files


def lora_hash(path: Path) -> str:
    return hash_of(read_tensors(path)[0])


def results(folder: Path) -> list[str]:
    """Names of what a run leaves; the reports are made last of all and may be cut off."""
    return sorted(p.name for p in folder.iterdir() if not p.name.endswith(("_effect.txt", "_report.html")))


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".k5"))


def assert_last_good_state_is_there(output: Path, files: Files, steps: tuple[int, ...], *, note: str) -> None:
    """What `--resume auto` finds is whole and of one step; so are all files; leftovers go."""
    found = find_state(output, "lora", "auto")
    assert found is not None, note
    state = read_state(found)
    assert state.run.step in steps, note
    assert state_hashes(state) == files.state(state.run.step), note
    known = files.loras()
    ends = {"lora.safetensors", "lora-ema.safetensors"}
    for path in output.glob("*.safetensors"):
        expected = {known[path.name]}
        if path.name in ends:  # of the shorter run before
            expected.add(known[path.name.replace("lora", "lora-step00000002", 1)])
        assert lora_hash(path) in expected, f"{note}: {path.name}"
    remove_leftover_files(output)
    remove_leftover_states(output)
    assert leftovers(output) == [], note


class EveryOperation:
    """Repeats what a trainer does after a step, once for each operation on the disk, which then fails."""

    def __init__(
        self, files: Files, output: Path, fault: fault_kit.Fault, every: int, resumed_every: int
    ) -> None:
        self.files, self.output, self.fault = files, output, fault
        self.every, self.resumed_every = every, resumed_every
        self.counts: dict[str, int] = {}
        self.is_active = True

    def install(self, monkeypatch: pytest.MonkeyPatch) -> None:
        for name in ("after_step", "finish"):
            plain = getattr(training.Trainer, name)
            monkeypatch.setattr(training.Trainer, name, self._around(name, plain))

    def _around(self, name: str, plain: Any) -> Any:
        def act(trainer: training.Trainer, *arguments: Any) -> Any:
            if self.is_active:
                self._break(
                    f"{name} {trainer.progress.step}",
                    lambda: plain(trainer, *arguments),
                    trainer.progress.step,
                )
            return plain(trainer, *arguments)

        return act

    def _break(self, what: str, action: Any, step: int) -> None:
        before = self.output.with_name("before")
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(self.output, before)
        log = self.output.with_name("log.txt")
        number = 0
        while True:
            number += 1 if number == 0 else self.every
            code = fault_kit.wait(fault_kit.start(lambda n=number: self._child(n, action), log))
            note = f"{what}, operation {number} {self.fault}: code {code}, {log}"
            assert code in ((fault_kit.KILLED, 99) if self.fault == "killed" else (0, 5, 99)), note
            ended = code == 99
            if not ended:
                assert_last_good_state_is_there(self.output, self.files, (step - 1, step), note=note)
                if number == 1 or number % self.resumed_every == 0:
                    self._resume(log)
                    assert_same_results(self.output, self.files.whole)
                    steps = [path.name for path in self.output.iterdir() if path.name.endswith("-state")]
                    assert sorted(steps) == [f"lora-{name}" for name in STATES], note
            shutil.rmtree(self.output)
            shutil.copytree(before, self.output)
            if ended:
                break
        self.counts[what] = number - 1

    def _child(self, number: int, action: Any) -> None:
        from modules.errors import ResourceError

        disk = fault_kit.FaultyDisk(self.output, number, self.fault)
        disk.install()
        try:
            action()
        except ResourceError as error:
            raise SystemExit(5) from error
        if len(disk.done) < number:
            raise SystemExit(99)  # there was no such operation: all have had their turn

    def _resume(self, log: Path) -> None:
        def go_on() -> None:
            self.is_active = False
            self.files.train(self.output, "--resume", "auto")

        code = fault_kit.wait(fault_kit.start(go_on, log))
        assert code == 0, log.read_text(encoding="utf-8")


def break_every_operation(
    files: Files,
    folder: Path,
    fault: fault_kit.Fault,
    monkeypatch: pytest.MonkeyPatch,
    *,
    every: int,
    resumed_every: int,
) -> dict[str, int]:
    """A run that had ended after 2 steps goes on to 4: saves of steps replace, expire and end files."""
    output = folder / "out"
    files.train(output, steps=2)
    operations = EveryOperation(files, output, fault, every, resumed_every)
    with monkeypatch.context() as patch:
        operations.install(patch)
        files.train(output, "--resume", "auto")
    assert_same_results(output, files.whole)
    return operations.counts


@pytest.mark.parametrize("fault", ["full", "killed"])
def test_a_save_that_fails_anywhere_leaves_the_last_good_state(
    fault: fault_kit.Fault, files: Files, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = break_every_operation(files, tmp_path, fault, monkeypatch, every=97, resumed_every=195)
    assert set(counts) == {"after_step 3", "after_step 4", "finish 4"}


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["full", "killed"])
def test_a_save_that_fails_at_any_operation_leaves_the_last_good_state(
    fault: fault_kit.Fault,
    files: Files,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    counts = break_every_operation(files, tmp_path, fault, monkeypatch, every=1, resumed_every=7)
    with capsys.disabled():
        print(f"\n{fault}: operations that failed, each in its own process: {counts}")


KILL_STEPS = 10


@pytest.fixture(scope="module")
def unkilled(files: Files, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, float]:
    """A whole run in a forked process, and how many seconds it took."""
    folder = tmp_path_factory.mktemp("unkilled")
    began = time.monotonic()
    assert fault_kit.wait(start_run(files, folder / "out")) == 0
    return folder / "out", time.monotonic() - began


def start_run(files: Files, output: Path) -> int:
    words = ("--max_data_loader_n_workers", 1, "--resume", "auto")
    log = output.with_name(f"{output.name}.txt")
    return fault_kit.start(lambda: files.train(output, *words, steps=KILL_STEPS), log)


def kill_and_resume(files: Files, output: Path, after: float, unkilled: Path) -> str:
    """One run killed after so many seconds, then resumed; what was found between."""
    code = 0
    while code == 0:  # a quicker run than the measured one had ended before
        shutil.rmtree(output, ignore_errors=True)
        pid = start_run(files, output)
        time.sleep(after)
        os.killpg(pid, signal.SIGKILL)
        code = fault_kit.wait(pid)
        killed_after, after = after, after * 0.8
    left = leftovers(output) if output.is_dir() else []
    found = find_state(output, "lora", "auto")
    step = 0 if found is None else read_state(found).run.step
    assert fault_kit.wait(start_run(files, output)) == 0, output.with_name(f"{output.name}.txt").read_text()
    assert_same_results(output, unkilled)
    assert results(output) == results(unkilled)
    return f"killed after {killed_after:5.3f} s (code {code}), {len(left)} left, from step {step}, same bytes"


@pytest.mark.parametrize("share", [0.3, 0.8])
def test_a_killed_run_ends_in_the_same_bytes(
    share: float, files: Files, tmp_path: Path, unkilled: tuple[Path, float]
) -> None:
    kill_and_resume(files, tmp_path / "out", share * unkilled[1], unkilled[0])


@pytest.mark.slow
def test_twenty_killed_runs_end_in_the_same_bytes(
    files: Files, tmp_path: Path, unkilled: tuple[Path, float], capsys: pytest.CaptureFixture[str]
) -> None:
    whole, seconds = unkilled
    draw = random.Random(20)
    lines = []
    for number in range(20):
        output = tmp_path / f"run{number}"
        lines.append(kill_and_resume(files, output, draw.uniform(0.0, seconds), whole))
    with capsys.disabled():
        print(f"\na whole run takes {seconds:.3f} s")
        for number, line in enumerate(lines, start=1):
            print(f"{number:3} {line}")


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_in_the_same_bytes(
    files: Files, tmp_path: Path, unkilled: tuple[Path, float]
) -> None:
    whole, seconds = unkilled
    draw = random.Random(21)
    output = tmp_path / "out"
    for _ in range(12):
        pid = start_run(files, output)
        time.sleep(draw.uniform(0.0, seconds / 2))
        os.killpg(pid, signal.SIGKILL)
        fault_kit.wait(pid)
    assert fault_kit.wait(start_run(files, output)) == 0
    assert_same_results(output, whole)
