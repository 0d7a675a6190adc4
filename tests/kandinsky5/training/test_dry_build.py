"""What cannot be trained is refused before a model loads: in seconds, not after minutes."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.memory.activations import META
from kandinsky5.model import assembly
from kandinsky5.training import preparation as train_preparation
from kandinsky5.training.results.state import read_state, write_state
from modules.tensor_files import write_tensors
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, train

STEPS = ("--max_train_steps", 3)


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a model is a failure, unless it is one without data."""
    plain = assembly.load_model

    def load(model: Any, device: torch.device, dtype: torch.dtype) -> Any:
        assert device == META, "a model was loaded"
        return plain(model, device, dtype)

    def encode(*_: Any) -> None:
        raise AssertionError("text encoders were loaded")

    monkeypatch.setattr(assembly, "load_model", load)
    monkeypatch.setattr(train_preparation, "encode_requests", encode)


@pytest.mark.parametrize("more", [(), ("--dry_run",)], ids=["run", "dry_run"])
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--optimizer_type", "AdmW"), "did you mean AdamW"),
        (("--optimizer_type", "LBFGS"), "argument: 'closure'). AdamW, AdamW8bit, AdaFactor and Lion can"),
        (("--optimizer_type", "SparseAdam"), "does not support dense gradients"),
        (("--optimizer_args", "differentiable=True"), "AdamW --optimizer_args differentiable=True: cannot"),
        (("--optimizer_args", "wieght_decay=0.1"), "takes no wieght_decay"),
        (("--lr_scheduler", "sine"), "--lr_scheduler sine: use one of"),
        (("--lr_scheduler_args", "x=1"), "--lr_scheduler_args: constant takes no x"),
        (("--lr_scheduler_type", "Foo"), "has no class Foo"),
        (("--lr_scheduler_type", "StepLR"), "'step_size'"),
        (("--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "gama=1"), "'gama'"),
        (("--lr_scheduler_type", "CosineAnnealingLR", "--lr_scheduler_args", "T_max=0"), "by zero"),
        (("--lr_scheduler_type", "ReduceLROnPlateau"), "without a validation loss"),
        (
            ("--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=1e-3", "total_steps=2"),
            "fails at step 3 of the 3 of this run: Tried to step 3 times. The specified number of total "
            "steps is 2",
        ),
        (("--network_args", "exclude_patterns=['nothing']"), "'nothing' matches no layer"),
        (("--network_args", "exclude_patterns=['(']"), "is not a regular expression"),
        (("--network_args", "exclude_patterns=['.*']"), "leave no layer to train"),
    ],
)
def test_settings_that_build_no_run_are_refused_before_a_model_loads(
    words: tuple[object, ...],
    message: str,
    more: tuple[str, ...],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    assert exit_code(dit, dataset, tmp_path / "out", *STEPS, *words, *more) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["Muon", "Adagrad", "Rprop", "PagedAdamW8bit"])
def test_optimizers_that_can_train_a_lora_are_let_through(
    name: str, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--optimizer_type", name)
    assert (tmp_path / "lora.safetensors").is_file()


@pytest.fixture(scope="module")
def stopped(dit: Path, dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps of four, with its state."""
    output = tmp_path_factory.mktemp("stopped")
    words = ("--optimizer_args", "weight_decay=0.1", "betas=(0.9,0.95)", "--save_state_on_train_end")
    train(dit, dataset, output, "--max_train_steps", 2, *words)
    return output


RESUME = ("--max_train_steps", 4, "--resume")
SAME = ("--optimizer_args", "weight_decay=0.1", "betas=(0.9,0.95)")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((*SAME, "--network_dim", 8), "of rank 4 and alpha 4, this run's 16 of rank 8"),
        ((*SAME, "--network_args", "include_patterns=['.*to_query']"), "has 16 layers"),
        ((*SAME, "--network_args", "loraplus_lr_ratio=4"), "its optimizer had 1 groups of parameters"),
        ((*SAME, "--optimizer_type", "Adam"), "this run's is torch.optim.adam.Adam"),
        (("--optimizer_args", "weight_decay=0.2", "betas=(0.9,0.95)"), "its optimizer was"),
    ],
)
def test_a_state_of_another_run_is_refused_before_a_model_loads(
    words: tuple[object, ...],
    message: str,
    stopped: Path,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    state = stopped / "lora-state"
    assert exit_code(dit, dataset, tmp_path, *RESUME, state, *words) == 2
    assert message in capsys.readouterr().err


def test_optimizer_arguments_may_come_in_another_order(
    stopped: Path, dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    for name, words in (("same", SAME), ("other", (SAME[0], *SAME[:0:-1]))):
        train(dit, dataset, tmp_path / name, *RESUME, stopped / "lora-state", *words)
    assert lora_bytes(tmp_path / "same/lora.safetensors") == lora_bytes(tmp_path / "other/lora.safetensors")
    assert "optimizer_args" not in said.text


def test_a_schedule_that_a_longer_run_outlives_is_refused_at_resume(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    request: pytest.FixtureRequest,
) -> None:
    words = ("--lr_scheduler_type", "OneCycleLR", "--lr_scheduler_args", "max_lr=1e-3", "total_steps=2")
    train(dit, dataset, tmp_path, "--max_train_steps", 2, "--save_state_on_train_end", *words)
    request.getfixturevalue("no_models")
    assert exit_code(dit, dataset, tmp_path, *RESUME, "auto", *words) == 2
    assert "fails at step 3 of the 4" in capsys.readouterr().err


def test_weights_of_another_rank_are_refused_before_a_model_loads(
    stopped: Path,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    words = ("--network_weights", stopped / "lora.safetensors", "--network_dim", 8)
    assert exit_code(dit, dataset, tmp_path, *STEPS, *words) == 2
    assert "rank 4 in the file, 8 in this run" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--base_weights", "--network_weights"])
def test_a_lora_for_a_model_of_another_size_is_refused_before_a_model_loads(
    option: str,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    layer = "transformer.visual_transformer_blocks.0.feed_forward.in_layer"
    file = tmp_path / "other.safetensors"
    write_tensors(
        file, {f"{layer}.lora_A.weight": torch.ones(4, 64), f"{layer}.lora_B.weight": torch.ones(128, 4)}
    )
    assert exit_code(dit, dataset, tmp_path / "out", *STEPS, option, file) == 4
    assert "made for a model of another size" in capsys.readouterr().err


def test_a_state_whose_tensors_are_not_its_own_is_refused_before_a_model_loads(
    stopped: Path,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    no_models: None,
) -> None:
    state = read_state(stopped / "lora-state")
    first = next(iter(state.lora))
    tensors = {**state.lora, first: torch.ones(1, 1)}
    write_state(tmp_path / "lora-state", state.run, tensors, state.optimizer)
    assert exit_code(dit, dataset, tmp_path, *RESUME, tmp_path / "lora-state", *SAME) == 4
    assert "its tensors do not fit its state.json" in capsys.readouterr().err


def test_the_dry_build_logs_nothing_twice(
    dit: Path, dataset: Path, tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    words = ("--network_args", "verbose=True", "include_patterns=['.*to_query']")
    train(dit, dataset, tmp_path / "run", "--max_train_steps", 1, *words)
    assert said.text.count("only the layers that match get an adapter") == 1
    said.clear()
    with suppress(FileNotFoundError):  # a dry run has no metrics
        train(dit, dataset, tmp_path / "dry", *words, "--dry_run")
    assert "adapter on visual_transformer_blocks.0.self_attention.to_query" in said.text
