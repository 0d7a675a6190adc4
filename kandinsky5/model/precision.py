"""Checks and chooses compute dtypes of a device from the command line."""

from __future__ import annotations

import torch

from kandinsky5.configs.generate import DitConfig
from kandinsky5.configs.train import ModelConfig
from modules.cudnn import check_conv3d
from modules.dtypes import dtype_from_word
from modules.fp8 import check_fp8_matmul
from modules.int8 import check_int8_matmul
from modules.nf4 import check_nf4


def check_weight_format(settings: DitConfig | ModelConfig, device: torch.device) -> None:
    """Refuse `--fp8_fast`, `--int8_fast` and `--nf4_base` where they cannot run.

    Raises:
        ResourceError: the device cannot multiply in float8 or int8, or bitsandbytes cannot use it.
    """
    if settings.fp8_fast:
        check_fp8_matmul(device)
    if settings.int8_fast:
        check_int8_matmul(device)
    if settings.nf4_base:
        check_nf4(device)


def compute_dtype(word: str | None, device: torch.device) -> torch.dtype:
    """The dtype requested by the user, else bfloat16 on an accelerator and float32 on the CPU."""
    if word is not None:
        return dtype_from_word(word)
    return torch.float32 if device.type == "cpu" else torch.bfloat16


def check_vae(word: str | None, device: torch.device) -> None:
    """Refuse a device whose libraries cannot compute the VAE in its dtype, before anything is loaded.

    Args:
        word: `--vae_dtype`.
    Raises:
        ResourceError: see `check_conv3d`.
    """
    check_conv3d(device, vae_dtype(word, device))


def vae_dtype(word: str | None, device: torch.device) -> torch.dtype:
    """The dtype requested by the user, else float16 on an accelerator and float32 on the CPU."""
    if word is not None:
        return dtype_from_word(word)
    return torch.float32 if device.type == "cpu" else torch.float16
