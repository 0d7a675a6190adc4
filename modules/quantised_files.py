"""Quantised weights in checkpoint files: which layouts are read, and names for those that are not.

    <layer>.weight          float8 or int8 [out, in]
    <layer>.weight_scale    a scale for the tensor, per row or per block of a row; also `scale_weight`
    <layer>.comfy_quant     bytes of a JSON object: {"format": "int8_tensorwise", "convrot": true,
                            "convrot_groupsize": 256}; in earlier files one entry of the metadata for all

Source: comfy/ops.py and comfy/quant_ops.py in Comfy-Org/ComfyUI, and its QUANTIZATION.md.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from modules.dtypes import dtype_name
from modules.fp8 import FP8_DTYPES, quantise_like
from modules.int8 import INT8_MAX
from modules.messages import names_in_short
from modules.parsing import parse_json
from modules.quantised_linear import scale_fits
from modules.rotation import NO_ROTATION, is_readable_block, rotate_exactly
from modules.tensor_files import TensorInfo
from modules.weight_files import DOWNLOAD_INSTEAD, WeightSource

ONE_BYTE_DTYPES = frozenset({torch.int8, *FP8_DTYPES})
WEIGHT_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16, *ONE_BYTE_DTYPES})
"""Of the weights that checkpoints may hold."""
SCALE_SUFFIXES = (".scale_weight", ".weight_scale")
"""After a layer's name: where checkpoints keep the scale of its one-byte weight."""
DESCRIPTION = ".comfy_quant"
"""After a layer's name: where ComfyUI describes the weight."""
INT8_FORMAT = "int8_tensorwise"

COMPANIONS = (*SCALE_SUFFIXES, ".scale_input", ".input_scale", DESCRIPTION)
"""What a layer's name is followed by in the tensors that belong to a one-byte weight."""
FP8_MARK = "scaled_fp8"
"""A tensor by which some float8 checkpoints say that they have scales."""
_METADATA = "_quantization_metadata"
_READ_FORMATS = frozenset({INT8_FORMAT, "float8_e4m3fn", "float8_e5m2"})
_SCALE_DTYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})
_DEFAULT_BLOCK = 256
"""Of ComfyUI, where a description names no size."""
_OTHER_FORMATS = {
    "nvfp4": "an NVFP4 checkpoint",
    "mxfp8": "an MXFP8 checkpoint",
    "int8_blockwise": "an int8 checkpoint with scales for square blocks",
    "convrot_w4a4": "a 4-bit ConvRot checkpoint",
    "int4_tensorwise": "a 4-bit ConvRot checkpoint",
    "asym_w4a8_int8": "a 4-bit checkpoint for int8 products",
    "awq_w4a16": "a 4-bit AWQ checkpoint",
    "svdquant_w4a4": "a 4-bit SVDQuant checkpoint",
}
_OTHER_KEYS = (
    ((".quant_state.bitsandbytes", ".weight.absmax"), "a 4-bit bitsandbytes checkpoint"),
    ((".weight_scale_2",), "an NVFP4 checkpoint"),
    ((".wscales", ".proj_down", ".smooth_factor"), "a 4-bit SVDQuant (Nunchaku) checkpoint"),
    ((".qweight", ".qzeros"), "a GPTQ or AWQ checkpoint"),
    (("weight._data", "weight._scale"), "an optimum-quanto checkpoint"),
    ((".weight.SCB", ".SCB"), "an 8-bit bitsandbytes checkpoint"),
)
"""Parts of names, and what has them."""


def find_scale_name(names: Mapping[str, object], base: str) -> str | None:
    """The key that holds the scale of the layer whose full name is `base`."""
    return next((f"{base}{suffix}" for suffix in SCALE_SUFFIXES if f"{base}{suffix}" in names), None)


def unfit_scales(tensors: Mapping[str, TensorInfo], prefix: str) -> list[str]:
    """The scales of one-byte weights whose shape or dtype cannot be used, as lines for a message.

    Args:
        tensors: of a whole checkpoint.
        prefix: what stands before the layer names in its keys.
    """
    unfit = []
    for name, weight in tensors.items():
        if weight.dtype not in ONE_BYTE_DTYPES or not name.startswith(prefix) or not name.endswith(".weight"):
            continue
        scale_name = find_scale_name(tensors, name.removesuffix(".weight"))
        if scale_name is None:
            if weight.dtype == torch.int8:
                unfit.append(f"{name} has none")
            continue
        scale = tensors[scale_name]
        if scale.dtype not in _SCALE_DTYPES or not scale_fits(scale.shape, weight.shape):
            kind = dtype_name(scale.dtype)
            unfit.append(f"{scale_name} {list(scale.shape)} {kind} for a weight {list(weight.shape)}")
    return unfit


def unread_layout(files: WeightSource) -> str | None:
    """What a checkpoint is whose layout is not read, with what to download instead; None for others."""
    for marks, kind in _OTHER_KEYS:
        for name in files.tensors:
            if any(mark in name for mark in marks):
                return f"this is {kind} (key {name}), which is not read here. {DOWNLOAD_INSTEAD}"
    formats = {str(described.get("format")) for described in _descriptions(files).values()}
    others = sorted(formats - _READ_FORMATS)
    if not others:
        return None
    if others == ["None"]:
        return f"its quantised weights are described without a format. {DOWNLOAD_INSTEAD}"
    kinds = names_in_short([
        _OTHER_FORMATS.get(name, f"a checkpoint in the layout {name}") for name in others
    ])
    return f"this is {kinds}, which is not read here. {DOWNLOAD_INSTEAD}"


def find_rotations(files: WeightSource) -> tuple[dict[str, int], list[str]]:
    """(block of the rotation of each int8 weight by its layer's full name, what is wrong with some)."""
    described = _descriptions(files)
    rotations: dict[str, int] = {}
    problems = []
    for name, info in files.tensors.items():
        if info.dtype != torch.int8 or not name.endswith(".weight") or len(info.shape) != 2:
            continue
        layer = name.removesuffix(".weight")
        description = described.get(layer)
        if description is None:
            problems.append(f"{name} is not described: no {layer}{DESCRIPTION}")
        elif description.get("format") != INT8_FORMAT:
            problems.append(f"{name} is int8, described as {description.get('format')}")
        else:
            block = _block(description)
            if block != NO_ROTATION and not is_readable_block(block, info.shape[1]):
                problems.append(f"{name} [{info.shape[0]}, {info.shape[1]}], rotated in blocks of {block}")
            else:
                rotations[layer] = block
    return rotations, problems


def describe_int8(rotation: int) -> Tensor:
    """The bytes that describe an int8 weight, rotated in blocks of this size."""
    description: dict[str, Any] = {"format": INT8_FORMAT}
    if rotation != NO_ROTATION:
        description |= {"convrot": True, "convrot_groupsize": rotation}
    return _as_bytes(description)


def quantise_as_stored(
    values: Tensor, dtype: torch.dtype, scale_shape: tuple[int, ...] | None, rotation: int
) -> tuple[Tensor, Tensor | None]:
    """Round float32 values [out, in] the way that a file stores them.

    Args:
        dtype: float8 or int8.
        scale_shape: see `quantise_like`.
        rotation: the block of the rotation that the file's weight has.
    """
    if dtype != torch.int8:
        return quantise_like(values, dtype, scale_shape)
    assert scale_shape is not None
    rotated = rotate_exactly(values, rotation)
    grouped = rotated.reshape(torch.Size(scale_shape).numel(), -1)
    scale = (grouped.abs().amax(dim=1, keepdim=True) / INT8_MAX).clamp(min=1e-30)
    return (grouped / scale).round().to(dtype).view(values.shape), scale.view(scale_shape)


def _as_bytes(description: Mapping[str, Any]) -> Tensor:
    return torch.frombuffer(bytearray(json.dumps(description).encode()), dtype=torch.uint8)


def _block(description: Mapping[str, Any]) -> int:
    nested = description.get("params")
    found = {**(nested if isinstance(nested, dict) else {}), **description}
    return found.get("convrot_groupsize", _DEFAULT_BLOCK) if found.get("convrot") else NO_ROTATION


def _descriptions(files: WeightSource) -> dict[str, Mapping[str, Any]]:
    """What the file says of its layers, by their full names; empty objects for what cannot be understood."""
    found = dict(_described_in_metadata(files.metadata))
    for name in files.tensors:
        if name.endswith(DESCRIPTION):
            found[name.removesuffix(DESCRIPTION)] = _as_object(files.read(name).numpy().tobytes())
    return found


def _described_in_metadata(metadata: Mapping[str, str]) -> Iterable[tuple[str, Mapping[str, Any]]]:
    layers = _as_object(metadata.get(_METADATA, "{}")).get("layers")
    if isinstance(layers, dict):
        yield from ((name, value if isinstance(value, dict) else {}) for name, value in layers.items())


def _as_object(text: bytes | str) -> Mapping[str, Any]:
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}
