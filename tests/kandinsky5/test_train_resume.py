"""A run that was stopped anywhere and resumed ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5 import training
from kandinsky5.training_state import read_state, state_problem
from modules.errors import DataError, ModelFileError
from modules.tensor_files import read_tensors
from tests.kandinsky5.training_runs import SMALLER, lora_bytes, metrics, train, write_dataset, write_dit

# Five clips in two shapes: with two processes or three batches per step nothing divides the epoch.
MATRIX = {
    "plain": (),
    "accumulation": ("--gradient_accumulation_steps", 2),
    # Only tensors of more than 4096 elements are held in 8 bits.
    "8 bit": (
        *("--optimizer_type", "AdamW8bit", "--network_dim", 40),
        *("--network_args", "include_patterns=['.*blocks.0.self_attention.*']"),
    ),
    "cosine and dropout": (
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", 2, "--network_dropout", 0.3),
        *("--network_args", "rank_dropout=0.2", "module_dropout=0.2", "loraplus_lr_ratio=4"),
        *("--num_timestep_buckets", 3),
    ),
    "own schedule": ("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=2", "gamma=0.5"),
}
TOTAL = ("--max_train_steps", 6)


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data"))


def comparable(output: Path) -> list[dict[str, Any]]:
    return metrics(output, "step")


def leaves(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """Every tensor and number of nested dicts, with its path."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, f"{path}/{key}")
    else:
        yield path, value


def stop_at(output: Path, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the control file's word appear while step `step` runs."""
    plain = training.take_control_word
    seen = iter(range(1, 99))
    monkeypatch.setattr(
        training, "take_control_word", lambda names: "stop" if next(seen) == step else plain(names)
    )


@pytest.mark.parametrize("name", MATRIX)
def test_stopped_and_resumed_equals_uninterrupted(
    name: str, dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    options = (*MATRIX[name], *TOTAL, "--save_state_on_train_end")
    train(dit, dataset, whole, *options)
    for steps in (1, 3):  # stops after step 1, and after step 4 inside or at the end of an epoch
        stop_at(parts, steps, monkeypatch)
        train(dit, dataset, parts, *options, "--resume", "auto")
        monkeypatch.undo()
    train(dit, dataset, parts, *options, "--resume", "auto")
    assert comparable(parts) == comparable(whole)
    assert lora_bytes(parts / "lora.safetensors") == lora_bytes(whole / "lora.safetensors")
    ours, theirs = (read_state(folder / "lora-state") for folder in (parts, whole))
    assert all(torch.equal(ours.lora[key], theirs.lora[key]) for key in theirs.lora)
    ours_flat, theirs_flat = (dict(leaves(state.optimizer["state"])) for state in (ours, theirs))
    assert ours_flat.keys() == theirs_flat.keys()
    for key, value in theirs_flat.items():
        same = torch.equal(ours_flat[key], value) if torch.is_tensor(value) else ours_flat[key] == value
        assert same, key
    if name == "8 bit":
        assert torch.uint8 in {value.dtype for value in ours_flat.values() if torch.is_tensor(value)}


def test_resuming_a_finished_run_does_nothing_and_more_steps_continue_it(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--save_state")
    before = lora_bytes(tmp_path / "lora.safetensors")
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--save_state", "--resume", "auto")
    assert lora_bytes(tmp_path / "lora.safetensors") == before
    train(dit, dataset, tmp_path, "--max_train_steps", 4, "--save_state", "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2, 3, 4]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        (("--network_dim", 8), "rank 4"),
        (("--seed", 9), "--seed was 3, is 9"),
        (("--gradient_accumulation_steps", 2), "--gradient_accumulation_steps was 1"),
        (("--optimizer_type", "SGD"), "optimizer was"),
    ],
)
def test_another_run_is_not_resumed(
    changed: tuple[object, ...],
    message: str,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", *changed)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_broken_states_are_passed_over_and_never_loaded(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--save_state", "--save_every_n_steps", 1)
    shutil.rmtree(tmp_path / "lora-state")
    newest, older = tmp_path / "lora-step00000002-state", tmp_path / "lora-step00000001-state"
    damaged = bytearray((newest / "optimizer.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (newest / "optimizer.pt").write_bytes(damaged)
    assert "damaged" in (state_problem(newest) or "")
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2]
    (older / "manifest.json").unlink()
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto")
    assert caught.value.code == 3
    with pytest.raises(DataError, match="never finished"):
        read_state(older)


def test_states_of_other_programs_are_refused_with_the_way_on(tmp_path: Path) -> None:
    (tmp_path / "random_states_0.pkl").write_bytes(b"x")
    with pytest.raises(ModelFileError, match="--network_weights"):
        read_state(tmp_path)


def test_a_state_holds_the_lora_and_no_base_weights(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    state = tmp_path / "lora-state"
    lora_size = (state / "lora.safetensors").stat().st_size
    assert sum(path.stat().st_size for path in state.iterdir()) < 4 * lora_size
    assert json.loads((state / "state.json").read_text(encoding="utf-8"))["step"] == 1


def launch(dit: Path, dataset: Path, output: Path, root: Path, *extra: object) -> subprocess.Popen[bytes]:
    words = (
        *(sys.executable, root / "kandinsky5_train_network.py", "--task", "k5-tiny-t2v", "--dit", dit),
        *("--dataset_config", dataset, "--output_dir", output, "--output_name", "lora", "--seed", 3),
        *("--learning_rate", 1e-3, "--max_data_loader_n_workers", 0, *SMALLER, *extra),
    )
    return subprocess.Popen([str(word) for word in words], start_new_session=True, stderr=subprocess.DEVNULL)


def wait_for_steps(process: subprocess.Popen[bytes], output: Path, steps: int) -> None:
    while process.poll() is None:
        if (output / "metrics.jsonl").is_file() and len(metrics(output, "step")) >= steps:
            return
        time.sleep(0.05)


@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_a_signal_saves_and_the_run_goes_on_exactly(
    dit: Path, dataset: Path, tmp_path: Path, root: Path
) -> None:
    output = tmp_path / "stopped"
    process = launch(dit, dataset, output, root, "--max_train_steps", 20)
    wait_for_steps(process, output, 1)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    step = len(metrics(output, "step"))
    assert step < 20
    assert state_problem(output / f"lora-step{step:08d}-state") is None
    again = launch(dit, dataset, output, root, "--max_train_steps", 20, "--resume", "auto")
    assert again.wait(120) == 0
    # Another process, because sums depend on the number of threads, which differs here.
    assert launch(dit, dataset, tmp_path / "whole", root, "--max_train_steps", 20).wait(120) == 0
    assert lora_bytes(output / "lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")


@pytest.mark.slow
def test_two_processes_train_as_one(dit: Path, dataset: Path, tmp_path: Path, root: Path) -> None:
    """Five batches in steps of four: the second process repeats one, at weight zero, in every other step."""
    options = ("--max_train_steps", 4, "--save_precision", "fp32", "--timestep_sampling", "shift")
    train(dit, dataset, tmp_path / "one", *options, "--gradient_accumulation_steps", 4)
    words = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2),
        *("--num_machines", 1, "--num_cpu_threads_per_process", 1, root / "kandinsky5_train_network.py"),
        *("--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", dataset, "--output_name", "lora"),
        *("--output_dir", tmp_path / "two", "--network_dim", 4, "--network_alpha", 4, "--seed", 3),
        *("--learning_rate", 1e-3, "--discrete_flow_shift", 5.0, "--gradient_accumulation_steps", 2),
        *("--max_data_loader_n_workers", 0, *SMALLER, *options),
    )
    subprocess.run([str(word) for word in words], check=True, timeout=300)
    losses = [[record["loss"] for record in metrics(tmp_path / name, "step")] for name in ("one", "two")]
    torch.testing.assert_close(losses[0], losses[1], rtol=0, atol=1e-5)
    one, two = (read_tensors(tmp_path / name / "lora.safetensors")[0] for name in ("one", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
