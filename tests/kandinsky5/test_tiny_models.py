"""The small models: as the real files, and the same every time."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TINY_PARAMS, DitParams
from kandinsky5.tiny_models import dit_tensor_shapes, dit_tensors
from modules.tensor_files import read_header


def _digests(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.parametrize("params", [TINY_PARAMS, LITE_PARAMS, PRO_PARAMS])
def test_the_dit_file_has_the_tensors_of_the_dit(params: DitParams) -> None:
    with torch.device("meta"):
        dit = DiffusionTransformer3D(**params.as_kwargs())
    assert dit_tensor_shapes(params) == {name: tuple(t.shape) for name, t in dit.state_dict().items()}


def test_modulation_and_time_embedding_are_float32_and_the_rest_bfloat16(tiny_models: Path) -> None:
    header = read_header(tiny_models / "model" / "tiny.safetensors")
    wide = {name for name, info in header.tensors.items() if info.dtype == torch.float32}
    assert wide == {name for name in header.tensors if "modulation" in name or "time_embeddings" in name}
    assert {info.dtype for name, info in header.tensors.items() if name not in wide} == {torch.bfloat16}


def test_every_modulation_acts_without_dominating() -> None:
    for name, tensor in dit_tensors(TINY_PARAMS).items():
        if "modulation" in name:
            assert 0.01 < tensor.std() < 0.5, name


def test_qwen_lies_in_two_bfloat16_shards_with_vision_tower_and_head(tiny_models: Path) -> None:
    folder = tiny_models / "text_encoder"
    index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
    assert len(set(index["weight_map"].values())) == 2
    assert {"lm_head.weight", "visual.patch_embed.proj.weight", "model.norm.weight"} <= set(
        index["weight_map"]
    )
    for shard in set(index["weight_map"].values()):
        assert {info.dtype for info in read_header(folder / shard).tensors.values()} == {torch.bfloat16}


def test_clip_is_a_whole_model_with_the_published_end_token(tiny_models: Path) -> None:
    folder = tiny_models / "text_encoder2"
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["CLIPModel"]
    assert config["text_config"]["eos_token_id"] == 2
    names = read_header(folder / "model.safetensors").tensors
    assert any(name.startswith("vision_model.") for name in names)


def test_the_folder_is_a_few_megabytes(tiny_models: Path) -> None:
    assert sum(path.stat().st_size for path in tiny_models.rglob("*") if path.is_file()) < 12 * 2**20


def test_another_process_writes_the_same_bytes_and_says_little(tiny_models: Path, tmp_path: Path) -> None:
    """Hash randomisation differs between processes; dictionaries and sets must not leak into the files."""
    result = subprocess.run(
        [sys.executable, "-m", "kandinsky5.tiny_models", str(tmp_path)],
        env={**os.environ, "PYTHONHASHSEED": "7"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=True,
    )
    assert _digests(tmp_path) == _digests(tiny_models)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1, result.stderr
