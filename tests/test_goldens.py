"""The project computes what the official code computes, and the comparison would notice if it did not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from modules.tensor_files import read_tensors, write_tensors
from tests.check_goldens import check_file, is_input, read_golden

GOLDENS = Path(__file__).resolve().parent / "goldens"
FILES = sorted(path.name for path in GOLDENS.iterdir() if path.suffix in (".safetensors", ".json"))


@pytest.mark.parametrize("name", FILES)
def test_every_quantity_of_a_golden_is_reproduced(name: str) -> None:
    rows = check_file(GOLDENS / name)
    assert rows
    assert not [f"{row.quantity}: {row.error:.2e} > {row.tolerance:.0e}" for row in rows if not row.passed]


MUTATED = [
    "dit_t2v",
    "dit_t2v_grad",
    "dit_nabla",
    "train_i2v",
    "sample_t2v_nocfg",
    "schedule",
    "first_frame_norm",
]


@pytest.mark.parametrize("stem", MUTATED)
def test_a_golden_that_is_off_by_a_thousandth_fails(tmp_path: Path, stem: str) -> None:
    """Every compared float32 or exact output is changed in a copy; its row, and no other, must fail."""
    for path in GOLDENS.glob("*.safetensors"):
        shutil.copy(path, tmp_path)
    path = tmp_path / f"{stem}.safetensors"
    tensors, metadata = read_tensors(path)
    golden = read_golden(path)
    for name, tensor in tensors.items():
        if is_input(name, golden) or "mixed" in name or "bf16" in name:
            continue
        if tensor.is_floating_point():
            changed = tensor * 1.001
        else:
            changed = tensor.clone()
            changed.view(-1)[0] = (
                ~changed.view(-1)[0] if tensor.dtype == torch.bool else tensor.view(-1)[0] + 1
            )
        write_tensors(path, tensors | {name: changed}, metadata)
        assert {row.quantity for row in check_file(path) if not row.passed} == {name}


def test_an_unknown_file_and_an_unknown_quantity_fail(tmp_path: Path) -> None:
    write_tensors(tmp_path / "new.safetensors", {"a": torch.ones(1)}, {"config": json.dumps({"kind": "new"})})
    assert not check_file(tmp_path / "new.safetensors")[0].passed
    tensors, metadata = read_tensors(GOLDENS / "schedule.safetensors")
    write_tensors(tmp_path / "more.safetensors", tensors | {"surprise": torch.ones(2)}, metadata)
    assert [row.quantity for row in check_file(tmp_path / "more.safetensors") if not row.passed] == [
        "surprise (unknown)"
    ]
