"""Validation: what is measured, that it can be compared, and that training does not notice."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.training import control
from kandinsky5.training.validation import measure as validation
from kandinsky5.training.validation.measure import NUM_BINS, Validation, draw_validation_sigmas
from kandinsky5.training.validation.plot import write_validation_plot
from modules.errors import CacheError
from modules.tensor_files import read_tensors, write_tensors
from tests.kandinsky5.training.training_runs import (
    SMALLER,
    exit_code,
    lora_bytes,
    metrics,
    train,
    write_dataset,
)

SPLIT = ("--validation_split", 0.4)


def checks(output: Path) -> list[dict[str, Any]]:
    return metrics(output, "validation")


def trained_items(output: Path) -> set[str]:
    return {item for record in metrics(output, "step") for item in record["items"]}


def stop_after(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = control.take_control_word
    seen = iter(range(1, 99))
    monkeypatch.setattr(control, "take_control_word", lambda n: "stop" if next(seen) == steps else plain(n))


def test_levels_are_one_per_bin_and_clip_and_never_change() -> None:
    keys = [f"0/clip{number}" for number in range(400)]
    levels = draw_validation_sigmas(keys)
    assert levels.shape == (NUM_BINS, 400)
    for part in range(NUM_BINS):
        low, high = part / NUM_BINS, (part + 1) / NUM_BINS
        assert bool(((levels[part] >= low) & (levels[part] < high)).all())
        assert float(levels[part].mean()) == pytest.approx((low + high) / 2, abs=0.02)
    assert torch.equal(draw_validation_sigmas(keys[7:9]), levels[:, 7:9])


def test_what_is_held_out_is_measured_and_never_trained_on(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_epochs", 4, "--learning_rate", 5e-3, *SPLIT)
    (record,) = checks(tmp_path)
    trained = trained_items(tmp_path)
    assert len(trained) + record["clips"] == 5
    assert record["step"] == 4 * len(trained)
    assert record["loss"] != record["base_loss"]


def test_means_are_those_of_their_parts(dit: Path, dataset: Path, tmp_path: Path) -> None:
    """Over all, per bin, bucket and dataset, with and without the LoRA."""
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--validation_dataset_config", dataset)
    (record,) = checks(tmp_path)
    assert [(part["from"], part["to"]) for part in record["timesteps"]][::3] == [(0, 250), (750, 1000)]
    buckets = {entry["bucket"]: entry["clips"] for entry in record["buckets"]}
    assert buckets == {"32x32x5": 3, "64x16x9": 2}
    for name in ("loss", "base_loss"):
        bins = [part[name] for part in record["timesteps"]]
        assert sum(bins) / NUM_BINS == pytest.approx(record[name], rel=1e-9)
        weighted = sum(entry["clips"] * entry[name] for entry in record["buckets"]) / 5
        assert weighted == pytest.approx(record[name], rel=1e-9)
        assert record["datasets"][0][name] == pytest.approx(record[name], rel=1e-9)
    assert len({record["timesteps"][part]["base_loss"] for part in range(NUM_BINS)}) == NUM_BINS


@pytest.mark.parametrize("measure", [SPLIT, ("--validation_dataset_config", "")])
def test_a_run_with_many_checks_and_one_with_few_end_in_the_same_bytes(
    measure: tuple[object, ...], dit: Path, dataset: Path, tmp_path: Path
) -> None:
    measure = tuple(word or dataset for word in measure)
    words = ("--max_train_steps", 5, "--network_dropout", 0.3, "--num_timestep_buckets", 3)
    words = (*words, "--network_args", "rank_dropout=0.2", "module_dropout=0.2", "--gradient_checkpointing")
    few = measure if "--validation_split" in measure else ()
    train(dit, dataset, tmp_path / "few", *words, *few)
    before = torch.get_rng_state()
    train(dit, dataset, tmp_path / "many", *words, *measure, "--validate_every_n_steps", 1)
    assert torch.equal(before, torch.get_rng_state())
    assert len(checks(tmp_path / "many")) == 5
    losses = [[r["loss"] for r in metrics(tmp_path / name, "step")] for name in ("few", "many")]
    assert losses[0] == losses[1]
    first, second = (lora_bytes(tmp_path / name / "lora.safetensors") for name in ("few", "many"))
    assert first == second


def test_a_resumed_run_makes_the_same_checks_and_measures_the_base_model_once(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = (*("--max_train_steps", 6, "--validate_every_n_steps", 2), *SPLIT)
    train(dit, dataset, tmp_path / "whole", *words)
    measured: list[bool] = []
    plain = Validation.losses

    def counting(self: Validation, should_stop: Callable[[], bool]) -> torch.Tensor:
        assert not self._network.training, "dropout would change what is measured"
        measured.append(self._network.is_enabled)
        return plain(self, should_stop)

    monkeypatch.setattr(Validation, "losses", counting)
    with monkeypatch.context() as patch:
        stop_after(4, patch)  # where a check is due: stopping is quick, the resumed run makes it
        train(dit, dataset, tmp_path / "parts", *words)
    assert [record["step"] for record in checks(tmp_path / "parts")] == [2]
    train(dit, dataset, tmp_path / "parts", *words, "--resume", "auto")
    assert checks(tmp_path / "parts") == checks(tmp_path / "whole")
    assert measured == [False, True, True, True]
    pictures = [(tmp_path / name / "lora_validation.png").read_bytes() for name in ("parts", "whole")]
    assert pictures[0] == pictures[1]


def test_the_word_stop_is_heard_during_a_check(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other words wait for the end of the next step."""
    plain = validation.draw_noise
    words = iter(["save", "stop"])

    def draw_noise(*given: Any) -> torch.Tensor:
        (tmp_path / "lora.control").write_text(next(words), encoding="utf-8")
        return plain(*given)

    monkeypatch.setattr(validation, "draw_noise", draw_noise)
    train(dit, dataset, tmp_path, "--max_train_steps", 6, "--validate_every_n_steps", 2, *SPLIT)
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 2]
    assert checks(tmp_path) == []
    assert (tmp_path / "lora-step00000002-state").is_dir()


def test_other_model_settings_are_another_measurement(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--validation_dataset_config", dataset)
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state", *words)
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", "--fp8_base", *words)
    first, second = checks(tmp_path)
    assert first["set"] != second["set"]
    assert first["base_loss"] != second["base_loss"]


def test_another_place_and_less_memory_are_the_same_measurement(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--validation_dataset_config", dataset)
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state", *words)
    (tmp_path / "moved").mkdir()
    moved = Path(shutil.copy(dit, tmp_path / "moved"))
    saving = ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload")
    train(moved, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", *saving, *words)
    first, second = checks(tmp_path)
    assert (first["set"], first["base_loss"]) == (second["set"], second["base_loss"])


def test_another_split_is_not_resumed(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state", *SPLIT)
    for split in (("--validation_split", 0.5), ()):
        with pytest.raises(SystemExit) as caught:
            train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", *split)
        assert caught.value.code == 2
        assert "--resume lora-state" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--validation_split", 0.4, "--validation_dataset_config", "v.toml"), "give only one of them"),
        (("--validation_split", 0), "must lie within"),
        (("--validation_split", 0.001), "at least one is held out"),
    ],
)
def test_what_cannot_be_measured_is_refused(
    words: tuple[object, ...],
    message: str,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, *words)
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_image_to_video_and_averaged_weights_are_measured(dit: Path, dataset: Path, tmp_path: Path) -> None:
    optimizer = "tests.kandinsky5.training.test_train_saved.ThirdsScheduleFree"
    words = ("--optimizer_type", optimizer, "--learning_rate", 0.1, "--max_train_steps", 3, *SPLIT)
    train(dit, dataset, tmp_path / "few", *words, task="k5-tiny-i2v")
    train(dit, dataset, tmp_path / "many", *words, "--validate_every_n_steps", 1, task="k5-tiny-i2v")
    assert lora_bytes(tmp_path / "few/lora.safetensors") == lora_bytes(tmp_path / "many/lora.safetensors")
    assert checks(tmp_path / "few")[-1] == checks(tmp_path / "many")[-1]


def record(step: int, loss: object, name: str = "a") -> dict[str, Any]:
    parts = [{"from": 0, "to": 500, "loss": loss, "base_loss": 2.0}]
    return {"set": name, "step": step, "clips": 3, "loss": loss, "base_loss": 2.0, "timesteps": parts}


def test_the_picture_shows_one_measurement_and_stands_numbers_that_are_not_finite(tmp_path: Path) -> None:
    def picture(*records: dict[str, Any]) -> bytes:
        write_validation_plot(tmp_path / "p.png", records)
        with Image.open(tmp_path / "p.png") as image:
            assert image.size == (1200, 670)
            return image.tobytes()

    two = picture(record(10, 1.9), record(20, 1.7))
    assert picture(record(5, 9.0, "b"), record(10, 1.9), record(20, 1.7)) == two
    assert picture(record(10, 1.9), record(15, "nan"), record(20, 1.7)) != two
    assert picture(record(10, 1.9)) != two
    picture(record(10, "nan"))
    picture(record(0, 2.0), record(10, 2.0))


def test_a_falling_loss_falls_in_the_picture_and_a_gap_stays_empty(tmp_path: Path) -> None:
    losses = (1.9, 1.7, "nan", 1.0)
    write_validation_plot(tmp_path / "p.png", [record(10 * n, loss) for n, loss in enumerate(losses)])
    with Image.open(tmp_path / "p.png") as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)[40:370]  # the upper panel, below its legend
    is_lora = np.abs(pixels - (0x14, 0x5A, 0xAA)).sum(axis=2) < 60
    columns = np.flatnonzero(is_lora.any(axis=0))
    heights = [np.flatnonzero(is_lora[:, column]).mean() for column in columns]
    assert heights[0] < heights[-1], "a smaller loss lies lower"
    gap = np.diff(columns).max()
    assert gap > 300, "nothing is drawn towards the value that is no number"


def test_a_picture_that_cannot_be_written_costs_a_warning(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lora_validation.png").mkdir()
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--validate_every_n_steps", 1, *SPLIT)
    assert said.text.count("cannot be written") == 1
    assert len(checks(tmp_path)) == 2
    json.dumps(checks(tmp_path))


@pytest.mark.slow
def test_one_of_two_processes_measures_and_training_does_not_notice(
    dit: Path, dataset: Path, tmp_path: Path, root: Path
) -> None:
    """With reports on saved files and limited norms: what one process does alone must not block the other."""
    for name, often in (("few", ()), ("many", ("--validate_every_n_steps", 1, "--save_every_n_steps", 1))):
        words = (
            *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2),
            *("--num_machines", 1, "--main_process_port", 0, root / "kandinsky5_train_network.py"),
            *("--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", dataset, "--output_name", "lora"),
            *("--output_dir", tmp_path / name, "--seed", 3, "--learning_rate", 1e-2, "--max_train_steps", 4),
            *("--scale_weight_norms", 0.1, "--max_data_loader_n_workers", 0, *SMALLER, *SPLIT, *often),
        )
        subprocess.run([str(word) for word in words], check=True, timeout=300)
    assert [record["step"] for record in checks(tmp_path / "many")] == [1, 2, 3, 4]
    assert [record["step"] for record in metrics(tmp_path / "many", "norms")] == [1, 2, 3, 4]
    assert checks(tmp_path / "few") == checks(tmp_path / "many")[-1:]
    assert lora_bytes(tmp_path / "few/lora.safetensors") == lora_bytes(tmp_path / "many/lora.safetensors")


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("no room"), "out of device memory while validating after step 3: no room"),
        (CacheError("cache is gone"), "cache is gone"),
    ],
)
def test_a_check_that_fails_costs_nothing_that_was_trained(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    said: pytest.LogCaptureFixture,
    error: Exception,
    message: str,
) -> None:
    def fail(*_: object) -> None:
        raise error

    words = ("--validation_split", 0.4, "--max_train_steps", 3, "--save_state")
    with monkeypatch.context() as patch:
        patch.setattr(Validation, "measure", fail)
        with pytest.raises(SystemExit) as stop:
            train(dit, dataset, tmp_path, *words)
    assert stop.value.code in (3, 5)
    assert message in capsys.readouterr().err
    assert (tmp_path / "lora.safetensors").is_file()
    assert (tmp_path / "lora-state").is_dir()
    train(dit, dataset, tmp_path, *words, "--resume", "auto")
    assert [record["step"] for record in checks(tmp_path)] == [3]
    assert "nothing to do" not in said.text
    train(dit, dataset, tmp_path, *words, "--resume", "auto")
    assert [record["step"] for record in checks(tmp_path)] == [3]
    assert "nothing to do" in said.text


def test_a_check_that_is_made_up_for_and_fails_is_told_as_one(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    words = ("--validation_split", 0.4, "--max_train_steps", 3, "--validate_every_n_steps", 1)
    with monkeypatch.context() as patch:
        patch.setattr(control, "take_control_word", lambda names: "stop")
        train(dit, dataset, tmp_path, *words)
    monkeypatch.setattr(Validation, "measure", fail)
    assert exit_code(dit, dataset, tmp_path, *words, "--resume", "auto") == 5
    assert "while validating after step 1: no room" in capsys.readouterr().err


def test_caches_with_other_contents_are_another_measurement(dit: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data")
    words = ("--validation_dataset_config", dataset)
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 1, "--save_state", *words)
    for path in (tmp_path / "data" / "cache").glob("*_te.safetensors"):
        tensors, metadata = read_tensors(path)
        scaled = {
            name: value * 1.5 if value.is_floating_point() else value for name, value in tensors.items()
        }
        write_tensors(path, scaled, metadata)
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 2, "--resume", "auto", *words)
    first, second = checks(tmp_path / "out")
    assert first["set"] != second["set"]
    assert first["base_loss"] != second["base_loss"]


def test_a_run_that_is_stopped_in_its_last_step_has_its_files_and_is_measured_when_resumed(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--validation_split", 0.4, "--max_train_steps", 1)
    with monkeypatch.context() as patch:
        stop_after(1, patch)
        train(dit, dataset, tmp_path, *words)
    assert (tmp_path / "lora.safetensors").is_file()
    assert metrics(tmp_path, "validation") == []
    train(dit, dataset, tmp_path, *words, "--resume", "auto")
    assert [record["step"] for record in metrics(tmp_path, "validation")] == [1]


def test_a_check_that_fails_between_steps_leaves_a_state_of_that_step(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(Validation, "measure", fail)
    words = ("--validation_split", 0.4, "--max_train_steps", 3, "--validate_every_n_steps", 2)
    assert exit_code(dit, dataset, tmp_path, *words) == 5
    assert (tmp_path / "lora-step00000002-state").is_dir()
