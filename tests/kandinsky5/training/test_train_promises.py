"""What a run promises about its numbers, its files and its settings when it goes on."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from kandinsky5.training import trainer as training
from kandinsky5.training.results.state import read_state
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.training_log import TrainingLog
from modules.errors import ModelFileError
from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.training.step_record import assert_same_steps, hash_of, recorded
from tests.kandinsky5.training.training_runs import (
    CURVE,
    exit_code,
    loss_curve,
    metrics,
    train,
    write_dataset,
)


def on_call(
    owner: Any, name: str, number: int, action: Callable[..., object], patch: pytest.MonkeyPatch
) -> None:
    """Do something after the `number`-th call of a method, with its object."""
    plain, calls = getattr(owner, name), iter(range(1, 999))

    def called(self: Any, *arguments: Any) -> Any:
        result = plain(self, *arguments)
        if next(calls) == number:
            action(self)
        return result

    patch.setattr(owner, name, called)


# Numbers


def test_the_losses_are_those_of_earlier_versions(dit: Path, dataset: Path, tmp_path: Path) -> None:
    """A change of this curve is a change of every result: it must be meant.

    `python -m tests.kandinsky5.training.training_runs` renews it.
    """
    losses = loss_curve(dit, dataset, tmp_path)
    expected = json.loads(CURVE.read_text(encoding="utf-8"))
    assert len(losses) == 20
    assert losses == pytest.approx(expected["losses"], rel=0, abs=1e-6)


def test_training_starts_at_the_base_model_and_leaves_its_weights_alone(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Step 1's loss is the base model's to the bit; its gradient reaches every layer; the base stays."""
    seen: dict[str, Any] = {}

    def look(trainer: training.Trainer) -> None:
        base = {name: value for name, value in trainer.model.dit.named_parameters() if "adapter" not in name}
        seen.setdefault("base", []).append(hash_of([base[name] for name in sorted(base)]))

    def look_at_gradients(trainer: training.Trainer) -> None:
        look(trainer)
        seen["gradients"] = {
            name: float(value.grad.abs().max()) for name, value in trainer.model.network.named_parameters()
            if value.grad is not None
        }  # fmt: skip

    on_call(training.Trainer, "clip_gradients", 2, look_at_gradients, monkeypatch)
    on_call(training.Trainer, "finish", 1, look, monkeypatch)
    train(dit, dataset, tmp_path, "--max_train_steps", 5, "--validation_dataset_config", dataset)
    assert len(set(seen["base"])) == 1
    names = [name for name in seen["gradients"] if "lora_down" in name]
    assert len(names) == 16
    assert all(seen["gradients"][name] > 0 for name in names)
    monkeypatch.undo()
    with recorded() as with_lora:
        train(dit, dataset, tmp_path / "lora", "--max_train_steps", 1)
    with monkeypatch.context() as patch, recorded() as without:
        plain = training.Trainer.accumulate
        patch.setattr(
            training.Trainer,
            "accumulate",
            lambda self, *arguments: (self.model.network.set_multiplier(1e3), plain(self, *arguments))[1],
        )
        train(dit, dataset, tmp_path / "strong", "--max_train_steps", 1)
    assert with_lora[0]["loss"] == without[0]["loss"]


@pytest.mark.parametrize(
    ("words", "steps", "epochs"),
    [
        (("--max_train_steps", 1), 1, [1]),
        (("--max_train_steps", 7), 7, [1, 1, 1, 1, 1, 2, 2]),
        (("--max_train_steps", 4, "--gradient_accumulation_steps", 3), 4, [1, 1, 2, 2]),
        (("--max_train_epochs", 2, "--gradient_accumulation_steps", 2), 6, [1, 1, 1, 2, 2, 2]),
        (("--max_train_epochs", 1, "--gradient_accumulation_steps", 99), 1, [1]),
    ],
)
def test_the_number_of_steps_is_exact(
    words: tuple[object, ...], steps: int, epochs: list[int], dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path, *words)
    records = metrics(tmp_path, "step")
    assert [record["step"] for record in records] == list(range(1, steps + 1))
    assert [record["epoch"] for record in records] == epochs
    assert read_header(tmp_path / "lora.safetensors").metadata["ss_steps"] == str(steps)


# Numbers that are not finite


def test_a_cache_of_huge_numbers_stops_the_run_and_is_named(
    dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_dataset(tmp_path / "data")
    (latents,) = (tmp_path / "data/cache").glob("clip3_0*")
    tensors, metadata = read_tensors(latents)
    write_tensors(latents, {name: value * 1e25 for name, value in tensors.items()}, metadata)
    words = ("--max_train_steps", 5, "--save_state", "--save_every_n_steps", 1)
    assert exit_code(dit, data, tmp_path / "out", *words) == 6
    message = capsys.readouterr().err
    step = len(metrics(tmp_path / "out", "step"))
    assert f"diverged at step {step + 1}: loss " in message
    assert "clip3" in message
    assert "timesteps" in message
    state = read_state(tmp_path / f"out/lora-step{step:08d}-state")
    assert state.run.step == step
    assert all(bool(value.isfinite().all()) for value in state.lora.values())


def break_gradient(trainer: training.Trainer) -> None:
    next(iter(trainer.model.network.parameters())).grad[0, 0] = float("inf")  # pyright: ignore


def test_a_gradient_that_is_not_finite_stops_before_the_weights_move(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_call(training.Trainer, "accumulate", 3, break_gradient, monkeypatch)
    with recorded() as records:
        assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 4) == 6
    assert "step 3" in capsys.readouterr().err
    state = read_state(tmp_path / "lora-step00000002-state")
    assert hash_of(dict(state.lora)) == records[1]["LoRA"]


def break_weight(trainer: training.Trainer) -> None:
    next(iter(trainer.model.network.parameters())).data[0, 0] = float("nan")


def test_a_weight_that_is_not_finite_is_found_at_the_save_and_not_saved(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_call(training.Trainer, "update", 2, break_weight, monkeypatch)
    words = ("--max_train_steps", 4, "--save_state", "--save_every_n_steps", 1)
    assert exit_code(dit, dataset, tmp_path, *words) == 6
    assert "lora-step00000002.safetensors is not written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.glob("*.safetensors")] == ["lora-step00000001.safetensors"]
    assert [path.name for path in tmp_path.glob("*-state")] == ["lora-step00000001-state"]


def test_a_broken_weight_before_the_next_save_is_not_saved_either(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    on_call(training.Trainer, "update", 2, break_weight, monkeypatch)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 4) == 6
    message = capsys.readouterr().err
    assert "diverged at step 3" in message
    assert "already not finite" in message
    assert not list(tmp_path.glob("*.safetensors"))
    assert not list(tmp_path.glob("*-state"))


# Going on with other settings


def test_automatic_resume_without_a_state_starts_afresh(dit: Path, dataset: Path, tmp_path: Path) -> None:
    with recorded() as fresh:
        train(dit, dataset, tmp_path / "fresh", "--max_train_steps", 2)
    with recorded() as resumed:
        train(dit, dataset, tmp_path / "resumed", "--max_train_steps", 2, "--resume", "auto")
    assert_same_steps(resumed, fresh)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("batch_size = 2", "dataset or its batch sizes"),
        ("num_repeats = 2", "number of steps per epoch was 5, is 10"),
        ("caption_dropout_rate = 0.0\nbatch_size = 5", "number of steps per epoch was 5, is 2"),
    ],
)
def test_another_dataset_is_not_resumed_unless_asked(
    change: str, message: str, dit: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Five clips of five sizes, so that a larger batch size leaves the number of steps alone.
    clips = ((2, 4, 4, 5), (2, 2, 8, 7), (2, 8, 2, 6), (3, 4, 4, 5), (3, 2, 8, 9))
    data = write_dataset(tmp_path / "data", clips if "dataset" in message else clips[:1] * 4 + clips[4:])
    words = ("--max_train_steps", 2, "--save_state", "--resume", "auto")
    train(dit, data, tmp_path / "out", "--max_train_steps", 1, "--save_state")
    text = data.read_text(encoding="utf-8").replace("batch_size = 1\n", f"{change}\n")
    data.write_text(text, encoding="utf-8")
    if message.startswith("dataset"):
        (data.parent / "cache").joinpath(next(p.name for p in data.parent.glob("cache/clip4_0*"))).unlink()
        next(data.parent.glob("cache/clip4_*te*")).unlink()
        words = (*words, "--allow_missing")
        message = "number of steps per epoch was 5, is 4"
    assert exit_code(dit, data, tmp_path / "out", *words) == 2
    assert message in capsys.readouterr().err
    train(dit, data, tmp_path / "out", *words, "--allow_changed_data")
    assert [record["step"] for record in metrics(tmp_path / "out", "step")] == [1, 2]


def test_changed_settings_are_used_and_said(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state", "--learning_rate", 1e-3)
    changed = ("--learning_rate", 5e-4, "--timestep_sampling", "sigmoid", "--network_dropout", 0.2)
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", "auto", *changed)
    assert metrics(tmp_path, "step")[1]["lr"] == 5e-4
    assert "--learning_rate changes from 0.001 to 0.0005" in said.text
    assert "--timestep_sampling changes from shift to sigmoid" in said.text
    assert "--network_dropout changes from None to 0.2" in said.text
    assert "--save_state changes" not in said.text
    said.clear()
    train(dit, dataset, tmp_path / "same", "--max_train_steps", 1, "--save_state")
    train(dit, dataset, tmp_path / "same", "--max_train_steps", 2, "--save_state", "--resume", "auto")
    assert "changes from" not in said.text


def test_other_groups_of_parameters_are_not_resumed(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    words = ("--max_train_steps", 2, "--resume", "auto", "--network_args", "loraplus_lr_ratio=4")
    assert exit_code(dit, dataset, tmp_path, *words) == 2
    assert "loraplus_lr_ratio" in capsys.readouterr().err


# Curves and files


def test_curves_have_every_step_once_after_a_crash_and_a_resume(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("--max_train_steps", 6, "--logging_dir", tmp_path / "logs", "--save_state")
    words = (*words, "--save_every_n_steps", 2)
    with monkeypatch.context() as patch:
        on_call(TrainingLog, "write_step", 5, lambda _: (_ for _ in ()).throw(OSError("gone")), patch)
        with pytest.raises(OSError, match="gone"):
            train(dit, dataset, tmp_path / "out", *words)
    train(dit, dataset, tmp_path / "out", *words, "--resume", "auto")
    (folder,) = (tmp_path / "logs").iterdir()
    assert len(list(folder.glob("events*"))) == 2
    curves = EventAccumulator(str(folder)).Reload()
    for name in ("loss/current", "grad_norm", "lr/unet"):
        assert [event.step for event in curves.Scalars(name)] == [1, 2, 3, 4, 5, 6], name
    logged = [record["loss"] for record in metrics(tmp_path / "out", "step")]
    assert [event.value for event in curves.Scalars("loss/current")] == pytest.approx(logged)


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


@pytest.mark.skipif(os.name == "nt", reason="POSIX rights")
@pytest.mark.usefixtures("umask")
def test_files_have_the_rights_that_the_umask_gives(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path / "out", "--max_train_steps", 1, "--save_state")
    modes = {
        path.name: path.stat().st_mode & 0o777 for path in (tmp_path / "out").rglob("*") if path.is_file()
    }
    assert {"lora.safetensors", "optimizer.pt", "manifest.json", "metrics.jsonl"} <= set(modes)
    assert set(modes.values()) == {0o640}
    assert (tmp_path / "out/lora-state").stat().st_mode & 0o777 == 0o750


def test_no_byte_that_is_written_tells_who_and_where(
    dit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    """Folders, user, host, keys and captions stay out of results, states, curves and logs."""
    home = tmp_path / "secret_user"
    data = write_dataset(home / "private_folder")
    for name in ("HF_TOKEN", "WANDB_API_KEY"):
        monkeypatch.setenv(name, "hf_canary")
    monkeypatch.setenv("USER", "secret_user")
    monkeypatch.setattr("socket.gethostname", lambda: "secret_host")
    monkeypatch.setattr("platform.node", lambda: "secret_host")
    words = (
        *(
            "--max_train_steps",
            3,
            "--save_state",
            "--save_every_n_steps",
            1,
            "--ema_decay",
            0.9,
            "--log_config",
        ),
        *("--logging_dir", home / "logs", "--validation_dataset_config", data),
        *("--output_dir_fallback", home / "second", "--training_comment", "mine"),
    )
    train(dit, data, home / "out", *words)
    train(dit, data, home / "out", *words, "--max_train_steps", 4, "--resume", "auto")
    written = [path for path in home.rglob("*") if path.is_file() and "private_folder" not in path.parts]
    assert len(written) > 20
    for path in written:
        content = path.read_bytes()
        for secret in (b"secret_user", b"private_folder", b"hf_canary", b"secret_host"):
            assert secret not in content, (path, secret)
    assert "hf_canary" not in said.text
    options = next(
        record.getMessage() for record in said.records if record.getMessage().startswith("options")
    )
    assert "secret_user" not in options


def test_keys_on_the_command_line_reach_no_file(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--max_train_steps", 1, "--save_state", "--huggingface_token", "hf_canary")
    train(dit, dataset, tmp_path, *words)
    for path in tmp_path.rglob("*"):
        assert not path.is_file() or b"hf_canary" not in path.read_bytes(), path


# States from strangers


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.fixture
def state(dit: Path, dataset: Path, tmp_path: Path) -> Path:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    return tmp_path / "lora-state"


def replace(state: Path, name: str, content: bytes) -> None:
    """Put another file into a state, with a manifest that vouches for it."""
    (state / name).write_bytes(content)
    manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
    manifest["files"][name] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (state / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")


@pytest.mark.parametrize("name", ["optimizer.pt", "scheduler.pt"])
@pytest.mark.parametrize("form", ["pickle", "torch"])
def test_a_strangers_state_runs_no_code(name: str, form: str, state: Path, tmp_path: Path) -> None:
    payload, path = Payload(tmp_path / "marker"), tmp_path / "payload"
    if form == "torch":
        torch.save({"state": payload}, path)
    else:
        path.write_bytes(pickle.dumps(payload))
    replace(state, name, path.read_bytes())
    with pytest.raises(ModelFileError, match="holds more than tensors"):
        read_state(state)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{}", b"null", b'{"step": 1}', b"[" * 100_000, b'{"output_name": "lora"']
)
def test_a_state_that_says_nonsense_is_refused(content: bytes, state: Path) -> None:
    replace(state, "state.json", content)
    with pytest.raises(ModelFileError, match=r"state\.json"):
        read_state(state)


def test_a_state_whose_tensors_are_others_than_it_says_is_refused(
    state: Path, dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_tensors(tmp_path / "other.safetensors", {"a": torch.zeros(3)})
    replace(state, "lora.safetensors", (tmp_path / "other.safetensors").read_bytes())
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", state) == 4
    assert "do not fit" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["lora.safetensors", "optimizer.pt", "state.json"])
def test_a_manifest_that_leaves_a_file_out_is_not_whole(
    name: str, state: Path, dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    manifest = json.loads((state / "manifest.json").read_text(encoding="utf-8"))
    del manifest["files"][name]
    (state / "manifest.json").write_text(json.dumps(manifest), encoding="utf-8")
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 2, "--resume", state) == 3
    assert name in capsys.readouterr().err


def test_a_log_that_a_kill_cut_within_a_character_is_read_and_gone_on_with(tmp_path: Path) -> None:
    line = json.dumps({"run": "lora", "kind": "step", "step": 1, "items": ["a\u2028b"]}, ensure_ascii=False)
    cut = '{"run": "other", "items": ["猫'.encode()[:-1]
    (tmp_path / "metrics.jsonl").write_bytes(line.encode("utf-8") + b"\n" + cut)
    log = Metrics(tmp_path, "lora", start_step=1)
    assert [record["step"] for record in log.records("step")] == [1]
    log.write("step", 2, {})
    assert [record["step"] for record in log.records("step")] == [1, 2]
