"""Signals wherever a run is, lost parents and lost helpers: the step is finished and saved."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.model import assembly
from kandinsky5.training import result_writer
from kandinsky5.training import samples as train_samples
from kandinsky5.training import trainer as training
from kandinsky5.training.loss import objective
from kandinsky5.training.results.state import find_state, read_state
from kandinsky5.training.validation import measure as validation
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.training_runs import SMALLER, lora_bytes, metrics, train

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")

STEPS = 6
SIGNALS = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] if os.name != "nt" else []


@pytest.fixture(scope="module")
def whole(dit: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The LoRA of a run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("whole")
    train(dit, dataset, folder, "--max_train_steps", STEPS)
    return lora_bytes(folder / "lora.safetensors")


class Run:
    """A run in a forked process, into a folder of its own."""

    def __init__(self, dit: Path, dataset: Path, folder: Path) -> None:
        self.dit, self.dataset, self.output, self.log = dit, dataset, folder / "out", folder / "log.txt"

    def start(self, prepare: Callable[[], object], *words: object) -> int:
        def action() -> None:
            prepare()
            train(self.dit, self.dataset, self.output, "--max_train_steps", STEPS, *words)

        return fault_kit.start(action, self.log)

    def step(self) -> int:
        """Of the newest state; 0 without one."""
        found = find_state(self.output, "lora", "auto")
        return 0 if found is None else read_state(found).run.step

    def assert_goes_on(self, whole: dict[str, bytes], *words: object) -> None:
        assert fault_kit.wait(self.start(lambda: None, "--resume", "auto", *words)) == 0, self.log.read_text()
        assert lora_bytes(self.output / "lora.safetensors") == whole
        assert [path.name for path in self.output.iterdir() if path.name.startswith(".k5")] == []


@pytest.fixture
def run(dit: Path, dataset: Path, tmp_path: Path) -> Run:
    return Run(dit, dataset, tmp_path)


def before_call(owner: Any, name: str, number: int, action: Callable[[], object]) -> None:
    """From now on, do something before the `number`-th call of a function; only in a forked process."""
    plain, calls = getattr(owner, name), iter(range(1, 10_000))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            action()
        return plain(*arguments, **named)

    setattr(owner, name, called)


def send(*numbers: int) -> None:
    for number in numbers:
        os.kill(os.getpid(), number)


PLACES = {
    "in the step": (objective.Objective, "training_losses", 3, 3),
    "in the optimizer": (training.Trainer, "update", 3, 3),
    "in a save": (result_writer, "write_state", 2, 2),
    "in the last step": (objective.Objective, "training_losses", STEPS, STEPS),
    "after the last step": (training.Trainer, "finish", 1, STEPS),
}


@pytest.mark.parametrize(
    ("place", "number"),
    [
        *(("in the step", number) for number in SIGNALS),
        *(("in a save", number) for number in SIGNALS[:2]),
        *(("in the optimizer", number) for number in SIGNALS[1:2]),
        *(("in the last step", number) for number in SIGNALS[:1]),
        *(("after the last step", number) for number in SIGNALS[2:]),
    ],
)
def test_a_signal_anywhere_finishes_the_step_and_saves(
    place: str, number: int, run: Run, whole: dict[str, bytes]
) -> None:
    owner, name, call, step = PLACES[place]
    words = ("--save_state", "--save_every_n_steps", 1)
    pid = run.start(lambda: before_call(owner, name, call, lambda: send(number)), *words)
    assert fault_kit.wait(pid, 30) == 128 + number, run.log.read_text()
    assert run.step() == step
    # A run that has come to its end leaves its final files, whatever was asked of it.
    assert (run.output / "lora-state").is_dir() == (step == STEPS)
    run.assert_goes_on(whole, *words)


def test_a_signal_while_samples_are_made_saves_at_once(run: Run, whole: dict[str, bytes]) -> None:
    def prepare() -> None:
        train_samples.is_due = lambda _settings, step, _epoch: step == 2
        train_samples.TrainingSamples.make = lambda *_: send(signal.SIGTERM) or []  # pyright: ignore

    assert fault_kit.wait(run.start(prepare), 30) == 143, run.log.read_text()
    assert run.step() == 2
    run.assert_goes_on(whole)


@pytest.mark.parametrize("number", [1, 9])
def test_a_signal_during_validation_drops_the_check_and_saves_at_once(
    number: int, run: Run, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """Two clips at four noise levels, without and with the LoRA: 16 passes, of which no more is begun."""
    words = ("--validation_split", 0.4, "--validate_every_n_steps", 2)
    train(dit, dataset, tmp_path / "whole", "--max_train_steps", STEPS, *words)

    def prepare() -> None:
        before_call(validation, "draw_noise", number, lambda: send(signal.SIGTERM))
        before_call(validation, "draw_noise", number + 1, lambda: os._exit(99))

    assert fault_kit.wait(run.start(prepare, *words), 30) == 143, run.log.read_text()
    assert "continues from there with its validation" in run.log.read_text()
    assert run.step() == 2
    assert [record["step"] for record in metrics(run.output, "step")] == [1, 2]
    run.assert_goes_on(lora_bytes(tmp_path / "whole/lora.safetensors"), *words)
    assert metrics(run.output, "validation") == metrics(tmp_path / "whole", "validation")


def test_a_signal_during_the_last_validation_leaves_it_to_the_resumed_run(
    run: Run, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--validation_split", 0.4)
    train(dit, dataset, tmp_path / "whole", "--max_train_steps", STEPS, *words)
    pid = run.start(lambda: before_call(validation, "draw_noise", 3, lambda: send(signal.SIGTERM)), *words)
    assert fault_kit.wait(pid, 30) == 143, run.log.read_text()
    assert (run.output / "lora.safetensors").is_file()
    assert run.step() == STEPS
    run.assert_goes_on(lora_bytes(tmp_path / "whole/lora.safetensors"), *words)
    assert metrics(run.output, "validation") == metrics(tmp_path / "whole", "validation")


@pytest.mark.parametrize("number", SIGNALS[:1])
def test_a_signal_while_the_model_loads_leaves_nothing(
    number: int, run: Run, whole: dict[str, bytes]
) -> None:
    pid = run.start(lambda: before_call(assembly, "load_model", 1, lambda: send(number)))
    assert fault_kit.wait(pid, 30) == 128 + number
    assert run.step() == 0
    run.assert_goes_on(whole)


def test_a_second_signal_leaves_at_once_and_halves_nothing(run: Run, whole: dict[str, bytes]) -> None:
    def prepare() -> None:
        # In the middle of the second state: the files are written, the manifest is not.
        import kandinsky5.training.results.state as state

        before_call(state, "_fingerprint", 5, lambda: send(signal.SIGINT, signal.SIGINT))

    words = ("--save_state", "--save_every_n_steps", 1)
    assert fault_kit.wait(run.start(prepare, *words), 30) == 130, run.log.read_text()
    assert run.step() == 1
    assert not (run.output / "lora-step00000002-state").exists()
    run.assert_goes_on(whole, *words)


def test_a_signal_to_the_whole_group_does_not_cost_the_readers(
    run: Run, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """Ctrl+C and `kill -TERM -<group>` come while caches are read ahead; those batches finish the step."""
    words = ("--max_data_loader_n_workers", 2, "--gradient_accumulation_steps", 5)
    train(dit, dataset, tmp_path / "whole", "--max_train_steps", STEPS, *words)
    pid = run.start(
        lambda: before_call(objective.Objective, "training_losses", 7, lambda: os.killpg(0, signal.SIGTERM)),
        *words,
    )
    assert fault_kit.wait(pid, 30) == 143, run.log.read_text()
    assert run.step() == 2
    run.assert_goes_on(lora_bytes(tmp_path / "whole/lora.safetensors"), *words)


def test_signals_that_were_switched_off_stay_off(run: Run, whole: dict[str, bytes]) -> None:
    """As `nohup` does with SIGHUP, and shells with SIGINT for what runs in the background."""

    def prepare() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        before_call(training.Trainer, "update", 2, lambda: send(signal.SIGHUP))

    assert fault_kit.wait(run.start(prepare), 30) == 0, run.log.read_text()
    assert lora_bytes(run.output / "lora.safetensors") == whole


def start_orphan(run: Run, owner: Any, name: str) -> None:
    """Start a run whose parent dies when it calls a function for the first time."""
    code_file = run.log.with_name("code.txt")

    def launch() -> None:
        launcher = os.getpid()

        def orphan() -> None:
            os.kill(launcher, signal.SIGKILL)
            while os.getppid() == launcher:
                time.sleep(0.001)

        trainer = run.start(lambda: before_call(owner, name, 1, orphan))
        code_file.write_text(str(fault_kit.wait(trainer)), encoding="utf-8")

    assert fault_kit.wait(fault_kit.start(launch, run.log), 30) == -signal.SIGKILL


@pytest.mark.parametrize("word", ["ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"])
@pytest.mark.parametrize("moment", ["while the model loads", "in a step"])
def test_a_run_whose_launcher_died_saves_and_ends(
    moment: str, word: str, run: Run, whole: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, name = {
        "while the model loads": (assembly, "load_model"),
        "in a step": (objective.Objective, "training_losses"),
    }[moment]
    with monkeypatch.context() as patch:
        patch.setenv(word, "default")
        start_orphan(run, owner, name)
    end = time.monotonic() + 30
    while run.step() == 0 and time.monotonic() < end:
        time.sleep(0.02)
    assert run.step() == 1
    run.assert_goes_on(whole)


def test_a_run_without_a_launcher_outlives_the_shell_it_came_from(run: Run, whole: dict[str, bytes]) -> None:
    start_orphan(run, objective.Objective, "training_losses")
    end = time.monotonic() + 30
    while not (run.output / "lora_effect.txt").is_file() and time.monotonic() < end:
        time.sleep(0.02)
    assert lora_bytes(run.output / "lora.safetensors") == whole
    assert run.step() == 0, "nothing asked it to save a state"


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_accelerates_launcher_alone_is_ended_and_no_orphan_stays(
    number: int, dit: Path, dataset: Path, tmp_path: Path, root: Path
) -> None:
    words = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--num_processes", 1, "--num_machines", 1),
        *("--num_cpu_threads_per_process", 1, root / "kandinsky5_train_network.py", "--task", "k5-tiny-t2v"),
        *("--dit", dit, "--dataset_config", dataset, "--output_dir", tmp_path, "--output_name", "lora"),
        *("--seed", 3, "--max_data_loader_n_workers", 1, *SMALLER, "--max_train_steps", 100_000),
    )
    process = subprocess.Popen([str(word) for word in words], start_new_session=True)
    try:
        end = time.monotonic() + 120
        while time.monotonic() < end:
            if (tmp_path / "metrics.jsonl").is_file() and len(metrics(tmp_path, "step")) >= 2:
                break
            time.sleep(0.1)
        os.kill(process.pid, number)
        process.wait(30)
        end = time.monotonic() + 30
        while _group_lives(process.pid) and time.monotonic() < end:
            time.sleep(0.1)
        assert not _group_lives(process.pid)
        found = find_state(tmp_path, "lora", "auto")
        assert found is not None
        assert read_state(found).run.step == metrics(tmp_path, "step")[-1]["step"]
    finally:
        if _group_lives(process.pid):
            os.killpg(process.pid, signal.SIGKILL)


def _group_lives(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True
