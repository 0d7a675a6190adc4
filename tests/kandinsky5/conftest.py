"""Fixtures of the generation and training tests."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

import kandinsky5.generation.session as generation
from kandinsky5.text.encoders import TextEncoders, load_text_encoders
from kandinsky5_generate_video import main
from modules.tensor_files import write_tensors
from tests.kandinsky5.generation.generation_kit import LAYER, SMALL, Generate
from tests.kandinsky5.training.training_runs import write_dataset, write_dit
from tests.tiny import tiny_encoders


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DiT of one block of each kind, for the tiny tasks with `SMALLER`."""
    return write_dit(tmp_path_factory.mktemp("dit"))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Caches of five clips of several sizes, and the dataset file for them."""
    return write_dataset(tmp_path_factory.mktemp("data"))


@pytest.fixture
def models(tiny_models: Path) -> dict[str, Path]:
    return {
        "--dit": tiny_models / "model" / "tiny.safetensors",
        "--vae": tiny_models / "vae",
        "--text_encoder_qwen": tiny_models / "text_encoder",
        "--text_encoder_clip": tiny_models / "text_encoder2",
    }


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Matrices this small gain nothing from a second thread, and wait long for it on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    """What the scripts log, whether or not an earlier test has set their logger up for a console."""
    logger = logging.getLogger("k5")
    caplog.set_level(logging.INFO, logger="k5")
    logger.addHandler(caplog.handler)
    propagates, logger.propagate = logger.propagate, False  # else every line arrives twice
    yield caplog
    logger.propagate = propagates
    logger.removeHandler(caplog.handler)


@pytest.fixture(scope="module")
def encoders(tiny_models: Path) -> TextEncoders:
    return load_text_encoders(tiny_encoders(tiny_models), device="cpu", dtype=torch.float32)


@pytest.fixture
def run(script: Generate, encoders: TextEncoders, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """`script` with text encoders that were loaded once for all tests."""
    monkeypatch.setattr(encoders, "free", lambda: None)
    monkeypatch.setattr(generation.ModelLoader, "text_encoders", lambda _self: encoders)
    return script


@pytest.fixture
def script(models: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generate:
    """main() with the small models and sizes; options given again win."""
    monkeypatch.chdir(tmp_path)

    def call(*words: object, task: str = "k5-tiny-t2v", size: Sequence[str] = SMALL) -> None:
        paths = [str(word) for pair in models.items() for word in pair]
        main(["--task", task, *paths, "--device", "cpu", *size, *map(str, words)])

    return call


@pytest.fixture
def lora(tmp_path: Path) -> Path:
    """A LoRA that changes one layer noticeably, with trigger words."""
    generator = torch.Generator().manual_seed(1)
    factors = {
        f"transformer.{LAYER}.lora_A.weight": torch.randn(4, 128, generator=generator) * 0.3,
        f"transformer.{LAYER}.lora_B.weight": torch.randn(128, 4, generator=generator) * 0.3,
    }
    write_tensors(tmp_path / "style.safetensors", factors)
    return tmp_path / "style.safetensors"


@pytest.fixture
def no_models(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading anything is a failure."""

    def fail(*_args: object, **_options: object) -> None:
        raise AssertionError("a model was loaded")

    for name in ("text_encoders", "vae", "dit"):
        monkeypatch.setattr(generation.ModelLoader, name, fail)


@pytest.fixture
def loads(run: Generate, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Fills up with the models that are loaded."""
    names: list[str] = []
    for name in ("text_encoders", "vae", "dit"):
        load = getattr(generation.ModelLoader, name)
        monkeypatch.setattr(
            generation.ModelLoader, name, lambda self, n=name, f=load: names.append(n) or f(self)
        )
    return names
