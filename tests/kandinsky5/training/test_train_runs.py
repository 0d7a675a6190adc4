"""Whole training runs on the small DiT: what they write, learn, refuse and leave alone."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.model import assembly
from kandinsky5.training.loss import objective
from modules.locks import sole_user
from modules.tensor_files import read_header, read_tensors
from tests.kandinsky5.training.training_runs import (
    exit_code,
    lora_bytes,
    metrics,
    train,
    write_dataset,
    write_word_while_loading,
)


@pytest.mark.fast
def test_the_same_command_twice_gives_the_same_bytes(dit: Path, dataset: Path, tmp_path: Path) -> None:
    losses = []
    for name in ("one", "two"):
        torch.rand(3)  # the global generator has no say
        records = train(dit, dataset, tmp_path / name, "--max_train_steps", 4)
        losses.append([record["loss"] for record in records if record["kind"] == "step"])
    assert losses[0] == losses[1]
    first, second = (lora_bytes(tmp_path / name / "lora.safetensors") for name in ("one", "two"))
    assert first == second


def test_the_loss_on_fixed_noise_falls(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(
        *(dit, dataset, tmp_path, "--max_train_epochs", 4, "--learning_rate", 5e-3),
        *("--validation_dataset_config", dataset, "--validate_every_n_epochs", 2),
    )
    checks = metrics(tmp_path, "validation")
    assert [check["step"] for check in checks] == [10, 20]
    assert checks[0]["base_loss"] == checks[1]["base_loss"]
    assert checks[1]["loss"] < checks[0]["loss"] < checks[0]["base_loss"]
    assert len(checks[1]["datasets"]) == 1


def test_the_guides_options_run_in_bf16_with_fp8_weights(dit: Path, dataset: Path, tmp_path: Path) -> None:
    records = train(
        *(dit, dataset, tmp_path, "--mixed_precision", "bf16", "--fp8_base", "--sdpa"),
        *("--gradient_checkpointing", "--max_data_loader_n_workers", 1, "--persistent_data_loader_workers"),
        *("--optimizer_type", "AdamW8Bit", "--optimizer_args", "weight_decay=0.001", "betas=(0.9,0.95)"),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", 3, "--save_every_n_epochs", 1),
        *("--max_train_epochs", 2, "--scheduler_scale", 10.0, "--logging_dir", tmp_path / "logs"),
    )
    steps = [record for record in records if record["kind"] == "step"]
    assert [round(record["lr"] / 1e-3, 3) for record in steps[:4]] == [0.0, 0.333, 0.667, 1.0]
    assert (tmp_path / "lora-000001.safetensors").is_file()
    assert not (tmp_path / "lora-000002.safetensors").exists()
    assert list((tmp_path / "logs").rglob("events*"))
    metadata = read_header(tmp_path / "lora.safetensors").metadata
    assert (
        metadata["ss_optimizer"] == "bitsandbytes.optim.adamw.AdamW8bit(weight_decay=0.001,betas=(0.9, 0.95))"
    )
    assert metadata["ss_mixed_precision"] == "bf16"


def test_checkpointing_changes_nothing(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path / "plain", "--max_train_steps", 3)
    train(dit, dataset, tmp_path / "less", "--max_train_steps", 3, "--gradient_checkpointing")
    assert lora_bytes(tmp_path / "plain/lora.safetensors") == lora_bytes(tmp_path / "less/lora.safetensors")


def test_a_batch_is_one_forward_and_the_mean_of_its_clips(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three clips of three caption lengths, as one batch and accumulated one by one."""
    clips = ((2, 4, 4, 5), (2, 4, 4, 7), (2, 4, 4, 6))
    calls: list[int] = []
    plain = objective.flow_matching_loss

    def counting(predict: Any, *rest: torch.Tensor) -> torch.Tensor:
        calls.append(len(rest[0]))
        return plain(predict, *rest)

    monkeypatch.setattr(objective, "flow_matching_loss", counting)
    losses = {}
    for name, size, accumulate in (("batch", 3, 1), ("single", 1, 3)):
        data = write_dataset(tmp_path / name, clips, batch_size=size)
        records = train(
            *(dit, data, tmp_path / name / "out", "--max_train_steps", 3),
            *("--gradient_accumulation_steps", accumulate),
        )
        losses[name] = [record["loss"] for record in records if record["kind"] == "step"]
    assert calls == [3] * 3 + [1] * 9
    torch.testing.assert_close(losses["batch"], losses["single"], rtol=1e-5, atol=1e-5)


def test_image_to_video_takes_both_forms_and_modes(dit: Path, dataset: Path, tmp_path: Path) -> None:
    losses = set()
    for mode, form, data in (
        ("first", "inference", dataset),
        ("first", "channels", dataset),
        ("first_last", "inference", write_dataset(tmp_path / "long", ((3, 4, 4, 5), (3, 2, 8, 6)))),
    ):
        output = tmp_path / f"{mode}-{form}"
        options = ("--i2v_mode", mode, "--i2v_conditioning", form, "--max_train_steps", 2)
        train(dit, data, output, *options, task="k5-tiny-i2v")
        losses.add(metrics(output, "step")[0]["loss"])
    assert len(losses) == 3


def test_first_and_last_needs_a_frame_between(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert exit_code(dit, dataset, tmp_path, "--i2v_mode", "first_last", task="k5-tiny-i2v") == 2
    assert "no frame is left to predict" in capsys.readouterr().err


def test_nabla_trains_and_refuses_sizes_it_cannot_take(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    said: pytest.LogCaptureFixture,
) -> None:
    assert exit_code(dit, dataset, tmp_path / "small", task="k5-tiny-nabla") == 2
    assert "--nabla_resize" in capsys.readouterr().err
    wide = write_dataset(tmp_path / "wide", ((2, 16, 16, 5),), resolution=128)
    train(dit, wide, tmp_path / "out", "--max_train_steps", 1, task="k5-tiny-nabla")
    assert "NABLA attention (topcdf, P 0.9, window 3 x 1 x 1), weights" in said.text


def test_old_files_go_by_the_rules(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(
        *(
            dit,
            dataset,
            tmp_path,
            "--max_train_steps",
            6,
            "--save_every_n_steps",
            1,
            "--save_last_n_steps",
            2,
        ),
        *("--save_state", "--save_last_n_steps_state", 1),
    )
    names = sorted(path.name for path in tmp_path.iterdir())
    assert [name for name in names if name.startswith("lora-step") and name.endswith(".safetensors")] == [
        f"lora-step{step:08d}.safetensors" for step in (4, 5, 6)
    ]
    assert [name for name in names if name.endswith("-state")] == [
        "lora-state",
        "lora-step00000005-state",
        "lora-step00000006-state",
    ]
    assert f"lora-step{1:08d}_config_lora.json" not in names


def test_results_of_the_same_name_are_not_overwritten_unasked(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1) == 2
    assert "--overwrite" in capsys.readouterr().err
    before = lora_bytes(tmp_path / "lora.safetensors")
    assert exit_code(dit, dataset, tmp_path, "--overwrite", "--optimizer_type", "LBFGS") == 2
    assert lora_bytes(tmp_path / "lora.safetensors") == before  # nothing is deleted for a run that cannot be
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--overwrite")
    assert len(metrics(tmp_path, "step")) == 1


def test_files_tell_nothing_private(dit: Path, tmp_path: Path) -> None:
    home = tmp_path / "secret_user"
    data = write_dataset(home / "private_folder")
    train(dit, data, home / "out", "--max_train_steps", 2, "--save_state", "--save_every_n_steps", 1)
    for path in (home / "out").rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            for secret in (b"secret_user", b"private_folder", b"clips/"):
                assert secret not in content, path


def test_metadata_names_the_run(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--metadata_title", "T", "--training_comment", "c")
    metadata = read_header(tmp_path / "lora.safetensors").metadata
    expected = {
        "ss_base_model_version": "kandinsky5",
        "ss_network_dim": "4",
        "ss_seed": "3",
        "ss_steps": "2",
        "ss_task": "k5-tiny-t2v",
        "ss_training_comment": "c",
        "ss_timestep_sampling": "shift",
        "modelspec.architecture": "Kandinsky-5/lora",
        "modelspec.title": "T",
        "modelspec.resolution": "32x32",
    }
    assert {key: metadata[key] for key in expected} == expected
    assert len(metadata["sshs_model_hash"]) == 64
    assert json.loads(metadata["ss_datasets"])[0]["video_directory"] == "clips"
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--overwrite", "--no_metadata")
    short = read_header(tmp_path / "lora.safetensors").metadata
    assert {key for key in short if key.startswith("ss_")} == {
        "ss_output_name",
        "ss_base_model_version",
        "ss_network_module",
        "ss_network_dim",
        "ss_network_alpha",
        "ss_network_args",
    }


def test_a_loss_that_is_not_finite_stops_before_the_weights_move(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = objective.draw_noise
    monkeypatch.setattr(
        objective,
        "draw_noise",
        lambda seed, step, keys, shape: plain(seed, step, keys, shape) * (float("inf") if step == 2 else 1.0),
    )
    assert exit_code(dit, dataset, tmp_path / "stop", "--max_train_steps", 4) == 6
    message = capsys.readouterr().err
    assert "step 3" in message
    assert "clip" in message
    saved = read_tensors(tmp_path / "stop/lora-step00000002-state/lora.safetensors")[0]
    assert all(bool(value.isfinite().all()) for value in saved.values())
    train(dit, dataset, tmp_path / "skip", "--max_train_steps", 4, "--on_nan", "skip")
    assert metrics(tmp_path / "skip", "step")[2]["loss"] == "nan"
    assert isinstance(metrics(tmp_path / "skip", "step")[3]["loss"], float)


def test_ten_steps_left_out_in_a_row_end_the_run(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    plain = objective.draw_noise
    monkeypatch.setattr(
        objective,
        "draw_noise",
        lambda seed, step, keys, shape: plain(seed, step, keys, shape) * (float("inf") if step > 1 else 1.0),
    )
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 40, "--on_nan", "skip") == 6
    assert "training diverged at step 12" in capsys.readouterr().err
    assert metrics(tmp_path, "step")[-1]["step"] == 11


def test_running_out_of_memory_names_the_options_that_help(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> torch.Tensor:
        raise torch.OutOfMemoryError("tried to allocate 3 GiB")

    monkeypatch.setattr(objective, "flow_matching_loss", fail)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1) == 5
    message = capsys.readouterr().err
    assert "--gradient_checkpointing: " in message
    assert "--fp8_base: " in message


def test_a_model_that_does_not_fit_is_told_with_what_helps(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_arguments: object) -> None:
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(assembly, "load_model", fail)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1) == 5
    said = capsys.readouterr().err
    assert "while the model was loaded: no room" in said
    assert "--vram_budget GB chooses" in said


def test_a_word_that_is_older_than_the_run_is_removed_unread(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "lora.control").write_text("stop", encoding="utf-8")
    train(dit, dataset, tmp_path, "--max_train_steps", 2)
    assert "lora.control: older than this run, removed" in said.text
    assert len(metrics(tmp_path, "step")) == 2
    assert not (tmp_path / "lora.control").exists()


def test_a_control_file_stops_the_run_in_good_order(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_word_while_loading(tmp_path, "stop\n", monkeypatch)
    train(dit, dataset, tmp_path, "--max_train_steps", 5)
    assert len(metrics(tmp_path, "step")) == 1
    assert (tmp_path / "lora-step00000001-state" / "manifest.json").is_file()
    assert not (tmp_path / "lora.control").exists()


def test_wrong_models_and_caches_are_found_before_anything_is_made(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    assert exit_code(tmp_path / "none.safetensors", dataset, output) == 4
    assert exit_code(dit, tmp_path / "none.toml", output) == 2
    empty = tmp_path / "empty"
    write_dataset(empty, ((2, 4, 4, 5),))
    next((empty / "cache").glob("*_te*")).unlink()
    assert exit_code(dit, empty / "dataset.toml", output) == 3


def test_training_can_start_from_a_lora(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path / "first", "--max_train_steps", 3, "--save_precision", "fp32")
    first = tmp_path / "first/lora.safetensors"
    weights = ("--network_weights", first, "--max_train_steps", 1, "--learning_rate", 1e-12)
    train(dit, dataset, tmp_path / "again", *weights, "--save_precision", "fp32")
    sized = ("--dim_from_weights", "--network_dim", 2, "--save_precision", "fp32")
    train(dit, dataset, tmp_path / "sized", *weights, *sized)
    for name in ("again", "sized"):
        before, after = read_tensors(first)[0], read_tensors(tmp_path / name / "lora.safetensors")[0]
        torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-8)
    merged = ("--base_weights", first, "--base_weights_multiplier", 0.5, "--max_train_steps", 1)
    train(dit, dataset, tmp_path / "merged", *merged)


def test_a_second_run_of_the_same_name_is_refused_while_the_first_goes(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = os.fork()
    if pid == 0:
        with sole_user(tmp_path / "lora.lock", "taken"):
            (tmp_path / "held").touch()
            time.sleep(60)
        os._exit(0)
    try:
        while not (tmp_path / "held").exists():
            time.sleep(0.01)
        with pytest.raises(SystemExit) as stop:
            train(dit, dataset, tmp_path, "--max_train_steps", 1)
        assert stop.value.code == 5
        assert f"is being made by process {pid}: end it first" in capsys.readouterr().err
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    train(dit, dataset, tmp_path, "--max_train_steps", 1)
    assert not (tmp_path / "lora.lock").exists()
