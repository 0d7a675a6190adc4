"""A run replaces, deletes and resumes what a run of its own name wrote, and nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from kandinsky5.training.results.names import ResultNames, is_lora_name, is_state_name
from kandinsky5.training.results.ownership import delete_result, find_results
from kandinsky5.training.results.state import find_state
from tests.kandinsky5.training.training_runs import exit_code, train


def files(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_names_are_read_as_they_are_written_and_no_other_way() -> None:
    names = ResultNames(Path(), "a[1]")
    for unit, number in (("epoch", 3), ("epoch", 1234567), ("step", 40), ("step", 123456789)):
        assert is_lora_name(names.lora(unit, number).name, "a[1]")
        assert is_state_name(names.state(unit, number).name, "a[1]")
    assert is_state_name(names.final_state.name, "a[1]")
    for end in (
        "-2",
        "-0000002",
        "-00002",
        "-step2",
        "-ema",
        "-000002-ema",
        "2",
        "-v000002",
        "-step000000040",
    ):
        assert not is_lora_name(f"a[1]{end}.safetensors", "a[1]")
        assert not is_state_name(f"a[1]{end}-state", "a[1]")


def test_a_run_whose_name_ends_in_a_number_is_another_run(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(
        dit, dataset, tmp_path, "--output_name", "cat-2", "--max_train_steps", 3, "--save_state_on_train_end"
    )
    other = {name: value for name, value in files(tmp_path).items() if name.startswith("cat-2")}
    train(dit, dataset, tmp_path, "--output_name", "cat", "--max_train_steps", 1, "--save_state")
    found = find_state(tmp_path, "cat", "auto")
    assert found == tmp_path / "cat-state"
    train(dit, dataset, tmp_path, "--output_name", "cat", "--max_train_steps", 1, "--overwrite")
    assert {name: value for name, value in files(tmp_path).items() if name.startswith("cat-2")} == other
    assert not found.exists()


def test_what_another_run_wrote_under_a_name_of_this_one_is_never_touched(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--output_name", "cat-000001", "--max_train_steps", 1, "--save_state")
    before = files(tmp_path)
    names = ResultNames(tmp_path, "cat")
    assert find_state(tmp_path, "cat", "auto") is None
    delete_result(tmp_path / "cat-000001.safetensors", "cat")
    delete_result(tmp_path / "cat-000001-state", "cat")
    assert [path.name for path in find_results(names, with_average=False).foreign] == [
        "cat-000001-state",
        "cat-000001.safetensors",
    ]
    for words in ((), ("--overwrite",), ("--resume", "auto"), ("--dry_run",)):
        assert exit_code(dit, dataset, tmp_path, "--output_name", "cat", *words) == 2
        assert "cat-000001-state is of the run cat-000001" in capsys.readouterr().err
    assert files(tmp_path) == before


def test_an_average_does_not_replace_the_lora_of_another_run(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--output_name", "lora-ema", "--max_train_steps", 1)
    before = (tmp_path / "lora-ema.safetensors").read_bytes()
    assert exit_code(dit, dataset, tmp_path, "--ema_decay", 0.9) == 2
    assert "lora-ema.safetensors is of the run lora-ema" in capsys.readouterr().err
    train(dit, dataset, tmp_path, "--max_train_steps", 1)  # without an average it is not in the way
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--overwrite")
    assert (tmp_path / "lora-ema.safetensors").read_bytes() == before


def test_a_file_that_does_not_say_whose_it_is_must_be_moved_by_hand(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--no_metadata")
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--no_metadata", "--overwrite")
    (tmp_path / "lora.safetensors").write_bytes(b"cut")
    assert exit_code(dit, dataset, tmp_path, "--overwrite") == 2
    assert "has no metadata of its run" in capsys.readouterr().err
    shutil.rmtree(tmp_path)
    (tmp_path / "lora-state").mkdir(parents=True)
    assert exit_code(dit, dataset, tmp_path, "--overwrite") == 2
