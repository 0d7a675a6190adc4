"""Shared by all tests: few threads, no network, paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import torch

torch.set_num_threads(2)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def root() -> Path:
    """The folder of the four scripts."""
    return ROOT


@pytest.fixture(scope="session")
def media() -> Path:
    """Real clips and photos; see tests/media/README.md for their licences."""
    return ROOT / "tests" / "media"
