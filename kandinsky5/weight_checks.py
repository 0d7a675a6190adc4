"""Compares the tensors of a weight file with a model, and identifies files of other models."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor

from modules.dtypes import dtype_name
from modules.messages import counted, names_in_short
from modules.tensor_files import TensorInfo

_FINGERPRINT_BYTES = 1024

# A piece of a tensor name that only this kind of model has.
_KINDS = (
    ("visual_transformer_blocks.", "a Kandinsky 5 DiT"),
    ("lora_", "a LoRA"),
    ("text_model.", "a CLIP text encoder"),
    ("embed_tokens.", "a language model such as Qwen"),
    ("double_blocks.", "a FLUX or HunyuanVideo transformer"),
    ("double_stream_modulation", "a FLUX transformer"),
    ("self_attn.norm_q", "a Wan transformer"),
    ("joint_blocks.", "a Stable Diffusion 3 transformer"),
    ("decoder.up_blocks.0.resnets.0.conv1.conv.", "HunyuanVideo's VAE"),
    ("encoder.downsamples.", "Wan's VAE"),
    ("decoder.up_blocks.0.", "an image VAE"),
    ("decoder.up.0.", "an image VAE"),
)


def kind_of_model(names: Iterable[str]) -> str | None:
    """Identify the kind of model by its tensor names; the result includes the deciding name.
    None if unknown.
    """
    names = list(names)
    for piece, kind in _KINDS:
        for name in names:
            if piece in name:
                return f"{kind} (tensor {name})"
    return None


def describe_mismatch(
    found: Mapping[str, tuple[int, ...]], expected: Mapping[str, tuple[int, ...]]
) -> str | None:
    """Describe missing and unexpected tensors, with the first few names; None if all match."""
    missing = [name for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    reshaped = [
        f"{name} {list(found[name])} instead of {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != shape
    ]
    kinds = (("missing", missing), ("not part of the model", extra), ("of another shape", reshaped))
    parts = [f"{len(names)} {what}: {names_in_short(names)}" for what, names in kinds if names]
    return "; ".join(parts) or None


class FiniteCheck:
    """Collects the names of weights with NaN or infinity while they are loaded; synchronises with the device
    only at the end.
    """

    def __init__(self) -> None:
        self._is_finite: dict[str, Tensor] = {}

    def add(self, name: str, tensor: Tensor) -> None:
        """Check a floating-point tensor on its device."""
        if tensor.numel():
            values = tensor.half() if tensor.dtype.itemsize == 1 else tensor  # float8 cannot be compared
            low, high = values.aminmax()  # both are NaN if any value is
            self._is_finite[name] = low.isfinite() & high.isfinite()

    def bad_names(self) -> list[str]:
        """Names of the tensors with values that are not finite."""
        if not self._is_finite:
            return []
        flags = torch.stack(list(self._is_finite.values())).tolist()
        return [name for name, is_finite in zip(self._is_finite, flags, strict=True) if not is_finite]


class WeightHash:
    """A fingerprint of weights: names, shapes, dtypes and the first KiB of each tensor.

    Independent of file names and of the distribution over shards, and fast to compute.
    """

    def __init__(self, *settings: str) -> None:
        self._settings = settings
        self._entries: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Add a CPU tensor in the file's dtype."""
        flat = tensor.reshape(-1)[: _FINGERPRINT_BYTES // tensor.dtype.itemsize].contiguous()
        self._add(name, tensor.dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())

    def add_file(self, file: Path, tensors: Mapping[str, TensorInfo]) -> None:
        """Add tensors of a safetensors file under the given names, reading only the start of each."""
        with file.open("rb") as stream:
            for name, info in tensors.items():
                stream.seek(info.start)
                start = stream.read(min(_FINGERPRINT_BYTES, info.end - info.start))
                self._add(name, info.dtype, info.shape, start)

    def _add(self, name: str, dtype: torch.dtype, shape: tuple[int, ...], start: bytes) -> None:
        digest = hashlib.sha256(start).hexdigest()
        self._entries[name] = f"{dtype_name(dtype)} {list(shape)} {digest}"

    def hexdigest(self) -> str:
        lines = [*self._settings, *(f"{name} {self._entries[name]}" for name in sorted(self._entries))]
        return hashlib.sha256("\n".join(lines).encode("utf-8")).hexdigest()


def not_finite_message(names: list[str]) -> str:
    """Error message for tensors with NaN or infinity: their number, the first names, and what to do."""
    return (
        f"{counted(len(names), 'tensor contains', 'tensors contain')} NaN or infinite values: "
        f"{names_in_short(names)}\nDownload the file again"
    )
