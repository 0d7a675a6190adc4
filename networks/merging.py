"""Merges adapters into the weights, tensor by tensor."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.command_line import check_output
from modules.errors import ModelFileError, ResourceError
from modules.files import check_free_space, disk_errors
from modules.fp8 import FP8_DTYPES
from modules.logs import get_logger
from modules.quantised_files import (
    ONE_BYTE_DTYPES,
    SCALE_SUFFIXES,
    find_rotations,
    find_scale_name,
    quantise_as_stored,
)
from modules.quantised_linear import dequantise
from modules.rotation import NO_ROTATION
from modules.tensor_files import write_tensor_stream
from modules.weight_files import WeightFiles
from networks.lora_files import LoadedLora

log = get_logger(__name__)


def is_merged_layer(layer: str, loras: Sequence[LoadedLora]) -> bool:
    """Whether any LoRA changes the weight of this layer."""
    return any(layer in lora.layers and lora.multiplier != 0.0 for lora in loras)


def add_deltas(weight: Tensor, layer: str, loras: Sequence[LoadedLora]) -> Tensor:
    """weight [out, in] plus the changes of all LoRAs, summed in float32 on the weight's device: float32.

    Each change is that of the LoRA alone: a DoRA's does not depend on the others. A layer that no LoRA
    changes is returned as is.
    """
    if not is_merged_layer(layer, loras):
        return weight
    total = weight.to(torch.float32, copy=True)
    for lora in loras:
        factors = lora.layers.get(layer)
        if factors is not None and lora.multiplier != 0.0:
            total += factors.to(weight.device).change(weight).mul_(lora.multiplier)
    return total


def write_merged(
    files: WeightFiles, output: Path, loras: Sequence[LoadedLora], *, prefix: str, device: torch.device
) -> None:
    """Write the checkpoint with the LoRAs added: same keys, shapes and dtypes, one tensor at a time.

    Weights in one byte are widened, changed and rounded again, with scales and rotations as before. The
    metadata is kept and gains `ss_merged_loras`, a JSON list of names and multipliers.

    Args:
        prefix: what stands before the layer names in the file's keys.
    Raises:
        ConfigError: `output` exists, or its name does not end in .safetensors.
        ModelFileError: a tensor is not finite with the LoRAs added; nothing is left behind.
        ResourceError: no space, a folder that cannot be written, or a device without memory.
    """
    check_output(output, overwrite=None)
    check_free_space(output.parent, sum(info.end - info.start for info in files.tensors.values()))
    layout = {name: (info.dtype, info.shape) for name, info in files.tensors.items()}

    rotations, _ = find_rotations(files)

    def read(name: str) -> Tensor:
        layer, role = name.removeprefix(prefix).rpartition(".")[::2]
        is_scale = f".{role}" in SCALE_SUFFIXES
        if not is_merged_layer(layer, loras) or not (is_scale or role == "weight"):
            return files.read(name)
        rotation = rotations.get(f"{prefix}{layer}", NO_ROTATION)
        weight, scale = _merged_tensors(files, (f"{prefix}{layer}", layer), loras, device, rotation)
        if is_scale:
            assert scale is not None
            return _finite(name, scale.to(layout[name][0])).cpu()
        return _finite(name, weight).cpu()

    merged = [{"name": lora.path.name, "multiplier": lora.multiplier} for lora in loras]
    metadata = {**files.metadata, "ss_merged_loras": json.dumps(merged, ensure_ascii=False)}
    try:
        with disk_errors(output, "run the command again"):
            write_tensor_stream(output, layout, read, metadata)
    except torch.OutOfMemoryError as error:
        raise ResourceError("device memory ran out while merging: use --device cpu") from error


def _finite(name: str, tensor: Tensor) -> Tensor:
    values = tensor.half() if tensor.dtype in FP8_DTYPES else tensor  # float8 cannot be tested itself
    if not bool(values.isfinite().all()):
        raise ModelFileError(
            f"{name} holds NaN or infinite values once the LoRAs are added: check the checkpoint, or use "
            "smaller multipliers"
        )
    return tensor


def _merged_tensors(
    files: WeightFiles,
    names: tuple[str, str],
    loras: Sequence[LoadedLora],
    device: torch.device,
    rotation: int,
) -> tuple[Tensor, Tensor | None]:
    """The merged weight in the file's dtype and its scale, if the file has one.

    Args:
        names: of the layer, in the file and without the file's prefix.
        rotation: the block of the rotation that the file's weight has.
    """
    base, layer = names
    weight = files.read(f"{base}.weight").to(device)
    if weight.dtype not in ONE_BYTE_DTYPES:
        return add_deltas(weight, layer, loras).to(weight.dtype), None
    scale_name = find_scale_name(files.tensors, base)
    scale = files.read(scale_name).to(device) if scale_name else torch.ones((), device=device)
    values = add_deltas(dequantise(weight, scale, torch.float32, rotation), layer, loras)
    return quantise_as_stored(values, weight.dtype, tuple(scale.shape) if scale_name else None, rotation)
