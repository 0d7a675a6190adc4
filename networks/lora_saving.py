"""Writes LoRA files that other programs load, in the two layouts of `--lora_format` and for the converter."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from modules.dtypes import dtype_name
from modules.errors import ModelFileError
from modules.files import write_json
from modules.tensor_files import encode_header, file_order, tensor_bytes, write_tensors
from networks.dora import foldable
from networks.factors import LayerFactors
from networks.lora import LoRANetwork
from networks.lora_keys import underscored
from networks.lora_scales import FOLDED_MARK, lora_config_path
from networks.lora_types import MAGNITUDE

LoraFormat = Literal["diffusers", "kohya"]


def save_lora(
    network: LoRANetwork,
    path: Path,
    *,
    lora_format: LoraFormat = "diffusers",
    save_precision: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write the network's factors as one whole file.

    Args:
        lora_format: "diffusers" folds alpha / rank into lora_B, so that no reader needs more than the file,
            and writes `<stem>_config_lora.json` for the official loader beside it; "kohya" keeps `.alpha`.
            LoHa and LoKr are written in kohya's layout, the one other programs read.
        metadata: kept as it is; two hashes of the tensors are added.
    """
    factors = {name: adapter.factors() for name, adapter in network.adapters.items()}
    if lora_format == "diffusers" and all(map(foldable, factors.values())):
        save_folded(factors, path, save_precision=save_precision, metadata=metadata)
        return
    tensors = {}
    for name, layer in factors.items():
        prefix = f"lora_unet_{underscored(name)}"
        for role, tensor in layer.tensors.items():
            # Half precision would change the whole weight by more than a DoRA does.
            dtype = torch.float32 if role == MAGNITUDE else save_precision
            tensors[f"{prefix}.{kohya_suffix(role)}"] = tensor.to(dtype)
        alpha = torch.tensor(network.adapters[name].alpha)
        tensors[f"{prefix}.alpha"] = alpha.to(save_precision)
    write_tensors(path, tensors, with_hashes(tensors, metadata or {}))


def alpha_settings(network: LoRANetwork) -> dict[str, object]:
    """PEFT's settings that state the alpha of every layer, for a file of the raw factors."""
    alphas = {name: float(adapter.alpha) for name, adapter in network.adapters.items()}
    common = next(iter(alphas.values()))
    others = {re.escape(name): alpha for name, alpha in alphas.items() if alpha != common}
    return {"lora_alpha": common, "alpha_pattern": others}


def kohya_suffix(role: str) -> str:
    """The end of a key in kohya's layout: only plain factors carry `.weight`."""
    return f"{role}.weight" if role.startswith("lora_") else role


def save_folded(
    layers: Mapping[str, LayerFactors],
    path: Path,
    *,
    save_precision: torch.dtype | None,
    metadata: Mapping[str, str] | None,
    prefix: str = "transformer.",
    suffix: str = "",
) -> None:
    """Write lora_A / lora_B with the whole scale inside lora_B, and the official loader's JSON beside it.

    The magnitudes of a DoRA are float32, under PEFT's name or ComfyUI's, which is LyCORIS's.

    Args:
        layers: those for which `foldable` holds.
        save_precision: None keeps the dtype of the factors.
        prefix, suffix: what stands before the layer's name and after lora_A / lora_B.
    Raises:
        ModelFileError: the scaled lora_B does not fit its dtype.
    """
    rank = max(layer.rank for layer in layers.values())
    tensors = {}
    for name, layer in layers.items():
        down, up = layer.tensors["lora_down"], layer.tensors["lora_up"]
        dtype = save_precision or up.dtype
        up = up.float() * layer.scale
        if layer.rank < rank:
            # PEFT would divide a common alpha by each layer's own rank; with zero rows added all ranks agree.
            missing = rank - layer.rank
            down = torch.nn.functional.pad(down, (0, 0, 0, missing))
            up = torch.nn.functional.pad(up, (0, missing))
        tensors[f"{prefix}{name}.lora_A{suffix}.weight"] = down.to(dtype)
        tensors[f"{prefix}{name}.lora_B{suffix}.weight"] = up.to(dtype)
        if MAGNITUDE in layer.tensors:
            tensors |= _magnitude_entry(f"{prefix}{name}", suffix, layer.tensors[MAGNITUDE])
        if not bool(up.to(dtype).isfinite().all()):
            raise ModelFileError(
                f"{path}: {name}: lora_B times its scale {layer.scale:g} is too large for {dtype_name(dtype)}"
            )
    marked = {**(metadata or {}), FOLDED_MARK[0]: FOLDED_MARK[1]}
    write_tensors(path, tensors, with_hashes(tensors, marked))
    write_json(lora_config_path(path), _peft_config(layers, rank))


def _magnitude_entry(base: str, suffix: str, magnitude: Tensor) -> dict[str, Tensor]:
    if base.startswith("diffusion_model."):
        return {f"{base}.{MAGNITUDE}": magnitude.float()}
    ending = f"{suffix}.weight" if suffix else ""
    return {f"{base}.lora_magnitude_vector{ending}": magnitude.flatten().float()}


def _peft_config(layers: Mapping[str, LayerFactors], rank: int) -> dict[str, object]:
    """PEFT's LoraConfig for a file whose scale is 1."""
    is_dora = any(MAGNITUDE in layer.tensors for layer in layers.values())
    inside_block = {re.sub(r"^.*\.\d+\.", "", name) for name in layers}
    return {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted(inside_block),
        **({"use_dora": True} if is_dora else {}),
    }


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """The metadata with kohya's two model hashes, by which user interfaces recognise a LoRA.

    `sshs_model_hash` is SHA-256 over the tensor bytes; `sshs_legacy_hash` the first 8 digits of SHA-256 over
    64 KiB at 1 MiB of a file that has only the `ss_*` metadata.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header = encode_header(layout, {key: value for key, value in metadata.items() if key.startswith("ss_")})
    whole, legacy = hashlib.sha256(), hashlib.sha256()
    start, end = 0x100000, 0x110000
    position = 0

    def feed(piece: bytes | memoryview) -> None:
        nonlocal position
        legacy.update(piece[max(start - position, 0) : max(end - position, 0)])
        position += len(piece)

    feed(header)
    for name in file_order(layout):
        for piece in tensor_bytes(tensors[name]):
            whole.update(piece)
            feed(piece)
    return {**metadata, "sshs_model_hash": whole.hexdigest(), "sshs_legacy_hash": legacy.hexdigest()[:8]}
