"""safetensors reading and writing against the safetensors package and against damaged files."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from modules.errors import ModelFileError
from modules.tensor_files import TensorFile, read_header, read_tensors, write_tensors

TENSORS = {
    "b.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3),
    "a": torch.tensor([1.5, -2.0, 0.25], dtype=torch.bfloat16),
    "mask": torch.tensor([True, False, True]),
    "scalar": torch.tensor(3.0),
    "empty": torch.zeros(0, 4),
    "fp8": torch.tensor([1.0, 2.0]).to(torch.float8_e4m3fn),
}


def same(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.float(), b.float())


def test_the_safetensors_package_reads_what_we_write(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS, {"note": "日本語"})
    loaded = safetensors.torch.load_file(path)
    assert all(same(loaded[name], tensor) for name, tensor in TENSORS.items())
    with safetensors.safe_open(path, "pt") as file:
        assert file.metadata() == {"note": "日本語"}


@pytest.mark.parametrize("use_mmap", [True, False])
def test_we_read_what_the_safetensors_package_writes(tmp_path: Path, use_mmap: bool) -> None:
    path = tmp_path / "x.safetensors"
    safetensors.torch.save_file(TENSORS, path, {"k": "v"})
    with TensorFile(path, use_mmap=use_mmap) as file:
        assert all(same(file.read(name), tensor) for name, tensor in TENSORS.items())
        assert file.header.metadata == {"k": "v"}


def test_equal_content_gives_equal_bytes(tmp_path: Path) -> None:
    metadata = {f"key{i}": str(i) for i in range(20)}
    write_tensors(tmp_path / "a", TENSORS, metadata)
    write_tensors(tmp_path / "b", dict(reversed(TENSORS.items())), dict(reversed(metadata.items())))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


@pytest.mark.parametrize("keep", [0, 4, 10, 60, -1])
def test_a_cut_file_is_refused_with_both_sizes(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, TENSORS)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ModelFileError, match=r"x\.safetensors"):
        read_header(path)


def test_a_giant_header_claim_is_refused_without_reading_it(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(struct.pack("<Q", 2**63) + b"{}")
    with pytest.raises(ModelFileError, match="claims"):
        read_header(path)


def test_a_failed_write_keeps_the_old_file_and_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(1)})
    with pytest.raises(KeyError):
        write_tensors(path, {"a": torch.ones(1, dtype=torch.complex64)})
    assert read_tensors(path)[0]["a"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["x.safetensors"]
