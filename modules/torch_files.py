"""Files written by `torch.save`, of which nothing but tensors is read."""

from __future__ import annotations

import pickle
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import ModelFileError

TORCH_SUFFIXES = frozenset({".pt", ".pth", ".ckpt", ".bin"})
"""In lower case."""


def read_torch_tensors(path: Path, *, is_mapped: bool = False) -> dict[str, Tensor]:
    """The tensors of a file by name; those under `state_dict` if it has that.

    Args:
        is_mapped: only what is used is read from the disk, if the file allows it.
    Raises:
        ModelFileError: missing, damaged, or a pickle with anything but tensors; no code in it is run.
    """
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file")
    try:
        content = torch.load(
            path, map_location="cpu", weights_only=True, mmap=is_mapped and zipfile.is_zipfile(path)
        )
    except Exception as error:
        # Damaged bytes raise whatever the first wrong opcode leads to: no list of types is complete.
        # torch's text for a pickle with more than tensors recommends loading it anyway.
        is_advice = isinstance(error, pickle.UnpicklingError) or not str(error)
        reason = type(error).__name__ if is_advice else str(error).splitlines()[0]
        raise ModelFileError(
            f"{path}: refused: it cannot be read as a file of tensors ({reason}). It is damaged, or holds "
            "more than tensors, which is not loaded because it could run code. Use a .safetensors file."
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise ModelFileError(f"{path}: it does not hold tensors by name")
    return {str(key): value for key, value in content.items()}
