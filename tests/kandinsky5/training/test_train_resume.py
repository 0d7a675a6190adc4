"""A run that was stopped anywhere and resumed ends in the same bytes as one that was not."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import tomllib
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch

from kandinsky5.configs.train import DEFAULT_TRAIN_STEPS
from kandinsky5.training import control
from kandinsky5.training import output as train_output
from kandinsky5.training import trainer as training
from kandinsky5.training.results import state as training_state
from kandinsky5.training.results.state import find_state, read_state, remove_leftover_states, state_problem
from kandinsky5.training.resume import resolve_total_steps
from modules import files
from modules.errors import DataError, ModelFileError
from modules.leftovers import machine_mark
from networks.lora import inject
from networks.lora_files import read_lora
from networks.lora_kandinsky import known_layer_names
from networks.lora_saving import save_lora
from tests.kandinsky5.training.training_runs import SMALLER, exit_code, lora_bytes, metrics, train
from tests.tiny import tiny_dit


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


@pytest.mark.slow
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


def test_a_state_of_the_last_step_means_that_the_final_file_is_there(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The run is killed before it ends; an older end of a shorter run lies there."""
    train(dit, dataset, tmp_path / "whole", "--max_train_steps", 4)
    output = tmp_path / "out"
    train(dit, dataset, output, "--max_train_steps", 2, "--save_state_on_train_end")
    words = iter(("", "save"))
    with monkeypatch.context() as patch:
        patch.setattr(control, "take_control_word", lambda _: next(words))
        patch.setattr(training.Trainer, "finish", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            train(dit, dataset, output, "--max_train_steps", 4, "--resume", "auto")
    train(dit, dataset, output, "--max_train_steps", 4, "--resume", "auto")
    assert lora_bytes(output / "lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")
    (output / "lora.safetensors").unlink()
    train(dit, dataset, output, "--max_train_steps", 4, "--resume", "auto")
    assert lora_bytes(output / "lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")


def test_a_state_that_was_moved_away_for_a_new_one_comes_back(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """A kill between the two renames: the old one is used, the half-made one goes."""
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    gone = f"{machine_mark()}-4194303"
    (tmp_path / "lora-state").rename(tmp_path / f".k5old-{gone}-lora-state")
    (tmp_path / f".k5state-{gone}-ab").mkdir()
    assert find_state(tmp_path, "other", "auto") is None
    assert remove_leftover_states(tmp_path) == 1
    assert find_state(tmp_path, "lora", "auto") == tmp_path / "lora-state"
    shutil.copytree(tmp_path / "lora-state", tmp_path / f".k5old-{gone}-lora-state")
    assert remove_leftover_states(tmp_path) == 1
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".k5")] == []


def test_a_state_that_another_machine_moved_away_comes_back_and_what_it_builds_stays(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    (tmp_path / "lora-state").rename(tmp_path / ".k5old-m00000000-1-lora-state")
    (tmp_path / ".k5state-m00000000-1-ab").mkdir()
    (tmp_path / f".k5old-{machine_mark()}-{os.getppid()}-lora-000001-state").mkdir()  # a process that lives
    assert find_state(tmp_path, "lora", "auto") == tmp_path / "lora-state"
    assert remove_leftover_states(tmp_path) == 0
    assert not (tmp_path / "lora-000001-state").exists()


@pytest.mark.parametrize("part", ["optimizer.pt", "state.json", "manifest.json"])
def test_a_state_whose_parts_somebody_removed_never_gets_its_name(
    part: str, dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as a program on another machine that cleans up the folder."""
    plain = training_state.atomic_writer

    def clean_up_before(path: Path, **options: bool) -> AbstractContextManager[BinaryIO]:
        if path.name == part:
            shutil.rmtree(path.parent)
        return plain(path, **options)

    for module in (training_state, files):
        monkeypatch.setattr(module, "atomic_writer", clean_up_before)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state") == 5
    assert not list(tmp_path.glob("*-state"))
    assert not list(tmp_path.glob(".k5*"))
    assert (tmp_path / "lora.safetensors").is_file()


def test_a_state_that_has_lost_one_file_never_gets_its_name(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = training_state.write_json

    def lose_the_lora(path: Path, value: Mapping[str, Any], **options: bool) -> None:
        (path.parent / "lora.safetensors").unlink(missing_ok=True)
        plain(path, value, **options)

    monkeypatch.setattr(training_state, "write_json", lose_the_lora)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state") == 5
    assert not list(tmp_path.glob("*-state"))


@pytest.mark.parametrize(
    "length",
    [("--max_train_epochs", 1, "--gradient_accumulation_steps", 2), ("--max_train_steps", 3)],
)
def test_a_resumed_run_that_is_given_no_length_ends_where_it_was_to_end(
    length: tuple[object, ...],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(control, "take_control_word", lambda _: "stop")
        train(dit, dataset, tmp_path, *length)
    train(dit, dataset, tmp_path, *length[2:], "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2, 3]
    assert (tmp_path / "lora.safetensors").is_file()
    settings = tomllib.loads((tmp_path / "lora_config.toml").read_text(encoding="utf-8"))
    assert settings["max_train_steps"] == 3


def test_without_a_state_the_default_length_is_that_of_the_help() -> None:
    assert resolve_total_steps(None, None) == DEFAULT_TRAIN_STEPS == 1600


def test_files_that_a_kill_left_beyond_their_time_go_at_the_next_start(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--save_state", "--save_every_n_steps", 1, "--save_last_n_steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(train_output, "delete_result", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            train(dit, dataset, tmp_path, *words, "--max_train_steps", 4)
    assert (tmp_path / "lora-step00000001.safetensors").is_file()
    train(dit, dataset, tmp_path, *words, "--max_train_steps", 4, "--resume", "auto")
    kept = [path.name for path in tmp_path.glob("lora-step*") if path.suffix in ("", ".safetensors")]
    assert sorted(kept) == [
        f"lora-step{step:08d}{end}" for step in (3, 4) for end in ("-state", ".safetensors")
    ]


def test_resume_auto_without_a_state_keeps_finished_results_and_offers_what_is_possible(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level("INFO"):
        train(dit, dataset, tmp_path, "--max_train_steps", 1, "--resume", "auto")
    assert "--resume auto: no state found, starting at step 0" in caplog.text
    before = (tmp_path / "lora.safetensors").read_bytes()
    words = ("--max_train_steps", 2, "--learning_rate", 5e-3)
    for resume in ((), ("--resume", "auto")):
        assert exit_code(dit, dataset, tmp_path, *words, *resume) == 2
        said = capsys.readouterr().err
        assert "--network_weights" in said
        assert "--overwrite" in said
        assert "continue with --resume auto" not in said
    assert (tmp_path / "lora.safetensors").read_bytes() == before
    train(dit, dataset, tmp_path, *words, "--save_state", "--resume", "auto", "--overwrite")
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2]
    assert (tmp_path / "lora.safetensors").read_bytes() != before
    capsys.readouterr()
    assert exit_code(dit, dataset, tmp_path, *words) == 2
    assert "continue with --resume auto" in capsys.readouterr().err  # now there is a state


def test_a_length_that_is_given_moves_the_end_of_a_resumed_run_both_ways(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    words = ("--save_state", "--save_every_n_steps", 1, "--lr_scheduler", "linear")
    train(dit, dataset, tmp_path, "--max_train_steps", 8, *words)
    (tmp_path / "lora.safetensors").unlink()
    for number in range(3, 9):
        shutil.rmtree(tmp_path / f"lora-step{number:08d}-state")
    shutil.rmtree(tmp_path / "lora-state")
    with caplog.at_level("INFO"):
        train(dit, dataset, tmp_path, "--max_train_steps", 3, *words, "--resume", "auto")
    assert "the end moves from step 8 to 3" in caplog.text
    assert [record["step"] for record in metrics(tmp_path, "step")][-1] == 3
    assert (tmp_path / "lora.safetensors").is_file()
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 2, *words, "--resume", "auto") == 2
    assert "is at step 3 already, and the run is to end at step 2" in capsys.readouterr().err
    train(dit, dataset, tmp_path, *words, "--resume", "auto")  # no number: the end that was planned last
    assert [record["step"] for record in metrics(tmp_path, "step")][-1] == 3


def test_a_run_that_took_its_ranks_from_a_file_is_resumed_without_the_file(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    mixed = inject(
        tiny_dit(num_text_blocks=1, num_visual_blocks=1),
        [f"visual_transformer_blocks.0.self_attention.{name}" for name in ("to_query", "to_key")],
        rank={
            f"visual_transformer_blocks.0.self_attention.{n}": r for n, r in (("to_query", 2), ("to_key", 6))
        },
        alpha=3.0,
        seed=0,
    )
    start = tmp_path / "start.safetensors"
    save_lora(mixed, start, lora_format="kohya", save_precision=torch.float32)
    words = ("--network_weights", start, "--dim_from_weights", "--save_state")
    train(dit, dataset, tmp_path / "whole", "--max_train_steps", 4, *words)
    train(dit, dataset, tmp_path / "parts", "--max_train_steps", 2, *words)
    start.unlink()
    train(dit, dataset, tmp_path / "parts", "--max_train_steps", 4, *words, "--resume", "auto")
    whole, parts = (lora_bytes(tmp_path / name / "lora.safetensors") for name in ("whole", "parts"))
    assert whole == parts
    layers = read_lora(tmp_path / "parts" / "lora-state", known_layer_names()).layers
    assert sorted((factors.rank, factors.scale) for factors in layers.values()) == [(2, 1.5), (6, 0.5)]
