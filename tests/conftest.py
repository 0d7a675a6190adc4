"""Shared by all tests: few threads, no network, paths."""

from __future__ import annotations

import os
from collections.abc import Generator
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

# Tiny tensors gain nothing from a second thread and lose much by it on a busy machine.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parent.parent
WHOLE_RUNS = (
    "kandinsky5/caching",
    "kandinsky5/generation",
    "kandinsky5/gpu_check",
    "kandinsky5/memory",
    "kandinsky5/model/test_compilation.py",
    "kandinsky5/model/test_eight_bit_weights.py",
    "kandinsky5/model/test_equal_gradients.py",
    "kandinsky5/small_world",
    "kandinsky5/test_tiny_models.py",
    "kandinsky5/training",
    "test_bench_gpu.py",
    "test_whole_path.py",
)
"""Tests that run whole scripts, compile models or plan large ones; `fast` only where they are marked so."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if not item.path.is_relative_to(ROOT / "tests") or item.get_closest_marker("slow"):
            continue
        if not item.path.relative_to(ROOT / "tests").as_posix().startswith(WHOLE_RUNS):
            item.add_marker("fast")


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """What a test printed may hold halves of characters, which no worker of pytest-xdist can send."""
    report = yield
    report.sections = [
        (title, text.encode("utf-8", "backslashreplace").decode("utf-8")) for title, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the four scripts."""
    return ROOT


@pytest.fixture(scope="session")
def media() -> Path:
    """Real clips and photos; see tests/media/README.md for their licences."""
    return ROOT / "tests" / "media"


@pytest.fixture(scope="session")
def tiny_models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the small random models: model/, vae/, text_encoder/, text_encoder2/. Read only."""
    from kandinsky5.tiny_models import build_tiny_models

    folder = tmp_path_factory.mktemp("tiny_models")
    build_tiny_models(folder)
    return folder
