"""Checks the installed cuDNN for missing kernels before anything is loaded."""

from __future__ import annotations

import sys

import torch

from modules.errors import ResourceError

_CONV3D_GAP = (90800, 91500)
"""From the first cuDNN to below the second torch computes half-precision 3D convolutions without it.

Source: `use_cudnn` in pytorch/pytorch:aten/src/ATen/native/Convolution.cpp; its issues 163539 (wrong results)
and 166643 (memory). Which version a release of torch brings: by the metadata on PyPI 2.10.0 for Linux takes
cuDNN 9.10.2 and 2.11.0 takes 9.19.0.
"""


def check_conv3d(device: torch.device, dtype: torch.dtype) -> None:
    """Refuse a cuDNN without the 3D convolutions of a VAE in half precision: torch's own unfold their input.

    Raises:
        ResourceError: it names what to upgrade.
    """
    if device.type != "cuda" or dtype not in {torch.float16, torch.bfloat16}:
        return
    if not torch.backends.cudnn.enabled:  # by an option of its own
        return
    version = torch.backends.cudnn.version()
    first, fixed = _CONV3D_GAP
    if version is None or not first <= version < fixed:
        return
    name = str(dtype).removeprefix("torch.")
    raise ResourceError(
        f"cuDNN {_cudnn_words(version)} has no 3D convolution for {name}, and torch {torch.__version__} "
        "computes the VAE without it: several times slower, in several times the memory. "
        f"cuDNN {_cudnn_words(fixed)} or later is required:\n{_cudnn_upgrade()}\n"
        "Or give --vae_dtype float32, which needs twice the memory of half precision."
    )


def _cudnn_words(version: int) -> str:
    """91002 -> 9.10.2."""
    return f"{version // 10000}.{version // 100 % 100}.{version % 100}"


def _cudnn_upgrade() -> str:
    """What to type; torch's builds for Windows hold cuDNN themselves."""
    if sys.platform == "win32":
        return "  install a newer build of torch, for CUDA 13: https://pytorch.org/get-started/locally/"
    major = (torch.version.cuda or "13").split(".")[0]
    return (
        f'  pip install --upgrade "nvidia-cudnn-cu{major}>=9.15"\n'
        "pip then reports that torch requires another version; torch works with the newer one."
    )
