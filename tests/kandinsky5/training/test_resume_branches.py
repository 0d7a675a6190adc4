"""Going back to an earlier state: from then on the run goes on from there; later states are left behind."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from kandinsky5.training import control, preparation, resume
from kandinsky5.training import trainer as training
from kandinsky5.training.results.state import SavedState, StateMark, find_state, read_mark
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, metrics, train

WORDS = ("--max_train_steps", 6, "--save_every_n_steps", 2, "--save_state")
CHANGED = (*WORDS, "--learning_rate", 5e-4)


@pytest.fixture
def output(dit: Path, dataset: Path, tmp_path: Path) -> Path:
    """A finished run with states of the steps 2, 4 and 6."""
    train(dit, dataset, tmp_path / "out", *WORDS)
    return tmp_path / "out"


def stop_after(patch: pytest.MonkeyPatch, steps: int) -> None:
    words = iter([*[""] * (steps - 1), "stop"])
    patch.setattr(control, "take_control_word", lambda _: next(words))


def mark(output: Path) -> StateMark:
    folder = find_state(output, "lora", "auto")
    assert folder is not None
    found = read_mark(folder)
    assert found is not None
    return found


def expected(dit: Path, dataset: Path, output: Path, tmp_path: Path) -> dict[str, bytes]:
    """The LoRA of a run that goes back to step 2 without a stop."""
    train(dit, dataset, tmp_path / "whole", *CHANGED, "--resume", output / "lora-step00000002-state")
    return lora_bytes(tmp_path / "whole/lora.safetensors")


def test_automatic_resume_follows_a_run_that_went_back(
    dit: Path, dataset: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(dit, dataset, output, tmp_path)
    before = lora_bytes(output / "lora.safetensors")
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(dit, dataset, output, *CHANGED, "--resume", output / "lora-step00000002-state")
    assert mark(output) == StateMark("lora", 1, 3)
    assert lora_bytes(output / "lora.safetensors") == before
    train(dit, dataset, output, *CHANGED, "--resume", "auto")
    assert lora_bytes(output / "lora.safetensors") == whole != before
    assert [record["step"] for record in metrics(output, "step")] == [1, 2, 3, 4, 5, 6]
    assert read_mark(output / "lora-state") == StateMark("lora", 1, 6)


def test_a_run_that_was_killed_as_soon_as_it_went_back_has_gone_back(
    dit: Path, dataset: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = expected(dit, dataset, output, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "train_step", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            train(dit, dataset, output, *CHANGED, "--resume", output / "lora-step00000002-state")
    assert mark(output) == StateMark("lora", 1, 2)
    train(dit, dataset, output, *CHANGED, "--resume", "auto")
    assert lora_bytes(output / "lora.safetensors") == whole


def test_going_back_again_and_again_makes_the_last_one_count(
    dit: Path, dataset: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for branch, step in ((1, 4), (2, 2), (3, 2)):
        with monkeypatch.context() as patch:
            stop_after(patch, 1)
            train(dit, dataset, output, *WORDS, "--resume", output / f"lora-step{step:08d}-state")
        assert mark(output) == StateMark("lora", branch, step + 1)
    # The newest state, named, is no step back.
    train(dit, dataset, output, *WORDS, "--resume", output / "lora-step00000003-state")
    assert mark(output) == StateMark("lora", 3, 6)


def test_going_back_to_an_end_writes_its_files_again(
    dit: Path, dataset: Path, output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = lora_bytes(output / "lora.safetensors")
    words = ("--max_train_steps", 6, "--learning_rate", 5e-4)
    train(dit, dataset, output, *words, "--resume", output / "lora-step00000002-state")
    assert lora_bytes(output / "lora.safetensors") != before
    with monkeypatch.context() as patch:
        stop_after(patch, 1)
        train(dit, dataset, output, *words, "--resume", output / "lora-step00000002-state")
    train(dit, dataset, output, *words, "--resume", output / "lora-state")
    assert lora_bytes(output / "lora.safetensors") == before


def test_a_refused_way_back_changes_nothing(dit: Path, dataset: Path, output: Path) -> None:
    for words in (("--network_dim", 8), ("--seed", 9)):
        with pytest.raises(SystemExit):
            train(dit, dataset, output, *WORDS, *words, "--resume", output / "lora-step00000002-state")
    assert mark(output) == StateMark("lora", 0, 6)


def test_the_final_files_of_a_run_that_was_left_behind_are_not_those_of_the_new_one(
    dit: Path, dataset: Path, output: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Killed between the last step's state and the final one."""
    whole = expected(dit, dataset, output, tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(training.Trainer, "finish", lambda *_: (_ for _ in ()).throw(KeyError("killed")))
        with pytest.raises(KeyError, match="killed"):
            train(dit, dataset, output, *CHANGED, "--resume", output / "lora-step00000002-state")
    assert mark(output) == StateMark("lora", 1, 6)
    train(dit, dataset, output, *CHANGED, "--resume", "auto")
    assert read_mark(output / "lora-state") == StateMark("lora", 1, 6)
    assert lora_bytes(output / "lora.safetensors") == whole


def test_a_state_of_an_earlier_version_has_no_branch(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text(json.dumps({"output_name": "lora", "step": 3}), encoding="utf-8")
    assert read_mark(tmp_path) == StateMark("lora", 0, 3)


def test_a_run_of_an_earlier_version_does_not_go_on_with_rotated_weights(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """It multiplied in int8 without a rotation, and its state says nothing of one."""
    monkeypatch.setattr(preparation, "check_weight_format", lambda *_: None)  # there is no CUDA here
    fast = ("--int8_base", "--int8_fast", "--max_train_steps", 2, "--save_every_n_steps", 1, "--save_state")
    train(dit, dataset, tmp_path, *fast, "--no_int8_rotation")
    whole = lora_bytes(tmp_path / "lora.safetensors")
    plain = resume.read_state

    def read_older(folder: Path) -> SavedState:
        saved = plain(folder)
        options = {name: value for name, value in saved.run.options.items() if name != "no_int8_rotation"}
        return replace(saved, run=replace(saved.run, weights="", options=options))

    monkeypatch.setattr(resume, "read_state", read_older)
    again = (*fast, "--resume", tmp_path / "lora-step00000001-state")
    assert exit_code(dit, dataset, tmp_path, *again) == 2
    assert "Add --no_int8_rotation to go on exactly" in capsys.readouterr().err
    train(dit, dataset, tmp_path, *again, "--no_int8_rotation")
    assert lora_bytes(tmp_path / "lora.safetensors") == whole
