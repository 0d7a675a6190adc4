"""Checkpoints of any size that take no room: a whole header, and a file of the right length without data."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.tasks import DitParams


def write_sparse_dit(path: Path, params: DitParams, *, modulation: str = "BF16") -> Path:
    """A DiT file in bfloat16 whose modulation has the given dtype; reading its data gives zeros."""
    tensors = build_meta_dit(params, torch.bfloat16).state_dict()
    return _write(path, tensors, lambda key: modulation if "modulation" in key else "BF16")


def write_sparse_vae(path: Path) -> Path:
    """HunyuanVideo's VAE in float16."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    with torch.device("meta"):
        tensors = AutoencoderKLHunyuanVideo().state_dict()
    return _write(path, tensors, lambda _: "F16")


def _write(path: Path, tensors: Mapping[str, Tensor], code_of: Callable[[str], str]) -> Path:
    header: dict[str, object] = {}
    position = 0
    for key, tensor in tensors.items():
        code = code_of(key)
        end = position + tensor.numel() * {"BF16": 2, "F16": 2, "F32": 4}[code]
        header[key] = {"dtype": code, "shape": list(tensor.shape), "data_offsets": [position, end]}
        position = end
    raw = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(raw)) + raw)
    os.truncate(path, 8 + len(raw) + position)
    return path
