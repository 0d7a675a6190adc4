"""A small random DiT for tests."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.model.dit import DiffusionTransformer3D, is_float32_island
from kandinsky5.tasks import TINY_PARAMS


def tiny_dit(
    *, seed: int = 0, compute_dtype: torch.dtype = torch.float32, **changes: Any
) -> DiffusionTransformer3D:
    """A DiT of the tiny tasks' size with random bfloat16-exact weights, modulation included."""
    params = replace(TINY_PARAMS, **changes)
    dit = DiffusionTransformer3D(**params.as_kwargs(), compute_dtype=compute_dtype)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in dit.named_parameters():
        values = torch.randn(parameter.shape, generator=generator) * (
            0.5 / max(parameter.shape[-1], 4) ** 0.5
        )
        if key.endswith("norm.weight"):
            values += 1
        dtype = torch.float32 if is_float32_island(key) else compute_dtype
        parameter.data = values.bfloat16().to(dtype)
    return dit.requires_grad_(False)


def tiny_encoders(models: Path, **settings: Any) -> TextEncodersConfig:
    """The text encoders that `python -m kandinsky5.tiny_models` writes."""
    folders = {
        "text_encoder_qwen": str(models / "text_encoder"),
        "text_encoder_clip": str(models / "text_encoder2"),
    }
    return TextEncodersConfig(**{**folders, **settings})
