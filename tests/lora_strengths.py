"""One set of LoRA factors, written in every way that a scale is written: `python -m tests.lora_strengths`.

Prints for each way how far the change that is read is from the change that its writer computes. PEFT's own
files come from PEFT, whose merged weights are the reference; the others are written by hand and compared with
their formula in float64.
"""

from __future__ import annotations

import copy
import json
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import peft
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from modules.logs import format_table
from networks.lora_files import read_lora
from networks.merging import add_deltas

BLOCK = "visual_transformer_blocks.1"
LAYERS = (f"{BLOCK}.self_attention.to_query", f"{BLOCK}.feed_forward.in_layer")
RANK, ALPHA = 4, 12
Change = Callable[[Tensor, Tensor, Tensor], Tensor]
"""(weight, down, up) -> change of the weight, all float64."""


def small_model() -> nn.Module:
    """Two linear layers, [24, 16] and [40, 16], under names of the DiT."""
    generator = torch.Generator().manual_seed(0)
    model = nn.Module()
    for name, size in zip(LAYERS, (24, 40), strict=True):
        *folders, last = name.split(".")
        holder = model
        for folder in folders:
            if not hasattr(holder, folder):
                holder.add_module(folder, nn.Module())
            holder = holder.get_submodule(folder)
        layer = nn.Linear(16, size, bias=False)
        layer.weight.data = torch.randn(size, 16, generator=generator)
        holder.add_module(last, layer)
    return model.requires_grad_(False)


def small_factors(model: nn.Module, rank: int = RANK) -> dict[str, tuple[Tensor, Tensor]]:
    """(down, up) by layer."""
    generator = torch.Generator().manual_seed(1)
    return {
        name: (
            torch.randn(rank, 16, generator=generator) * 0.3,
            torch.randn(model.get_submodule(name).out_features, rank, generator=generator) * 0.3,
        )
        for name in LAYERS
    }


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: model.get_submodule(name).weight for name in LAYERS}


def scaled(factor: float) -> Change:
    return lambda weight, down, up: factor * up @ down


def dora(factor: float, axis: int) -> Change:
    """With magnitudes `magnitudes(axis)`. Source: LyCORIS, `apply_weight_decompose`."""

    def change(weight: Tensor, down: Tensor, up: Tensor) -> Tensor:
        turned = weight + factor * up @ down
        return magnitudes(weight, axis).double() * turned / turned.norm(dim=axis, keepdim=True) - weight

    return change


def magnitudes(weight: Tensor, axis: int) -> Tensor:
    norm = weight.float().norm(dim=axis, keepdim=True)
    return norm * torch.linspace(0.5, 1.5, norm.numel()).reshape(norm.shape)


@dataclass(frozen=True)
class Way:
    name: str
    path: Path
    expected: Mapping[str, Tensor]
    """Change by layer."""

    def error(self, weights: Mapping[str, Tensor]) -> float:
        """||read - expected|| / ||expected|| over all layers."""
        lora = read_lora(self.path, list(weights))
        read = {name: add_deltas(weight, name, [lora]) - weight for name, weight in weights.items()}
        squares = sum(float((read[name] - self.expected[name]).square().sum()) for name in weights)
        return (squares / sum(float(change.square().sum()) for change in self.expected.values())) ** 0.5


def by_hand(folder: Path, model: nn.Module) -> Iterator[Way]:
    """Files whose names and settings are written here."""
    weights, factors = weights_of(model), small_factors(model)

    def way(
        name: str,
        change: Change,
        *,
        header: Mapping[str, str] | None = None,
        beside: tuple[str, Mapping[str, Any]] | None = None,
        extra: Callable[[str], dict[str, Tensor]] = lambda layer: {},
        fold: float = 1.0,
    ) -> Way:
        place = folder / name.replace(" ", "_").replace("/", "_")
        place.mkdir()
        tensors = {}
        for layer, (down, up) in factors.items():
            tensors[f"transformer.{layer}.lora_A.weight"] = down
            tensors[f"transformer.{layer}.lora_B.weight"] = up * fold
            tensors |= {f"transformer.{layer}.{role}": tensor for role, tensor in extra(layer).items()}
        save_file(tensors, place / "some.safetensors", dict(header or {}))
        if beside is not None:
            (place / beside[0]).write_text(json.dumps(beside[1]), encoding="utf-8")
        expected = {
            layer: change(weights[layer].double(), *(factor.double() for factor in factors[layer]))
            for layer in LAYERS
        }
        return Way(name, place / "some.safetensors", expected)

    alpha, settings = str(ALPHA), {"r": RANK, "lora_alpha": ALPHA}
    three, root = scaled(ALPHA / RANK), scaled(ALPHA / RANK**0.5)
    yield way("alpha tensors", three, extra=lambda layer: {"alpha": torch.tensor(float(ALPHA))})
    yield way("folded, marked as ours", three, header={"k5_lora_scale": "folded"}, fold=ALPHA / RANK)
    packed = json.dumps({f"transformer.{name}": value for name, value in settings.items()})
    yield way("header: lora_adapter_metadata", three, header={"lora_adapter_metadata": packed})
    kohya = {"ss_network_alpha": f"{ALPHA}.0", "ss_network_dim": str(RANK)}
    yield way("header: ss_network_alpha", three, header=kohya)
    yield way("header: lora_alpha", three, header={"lora_alpha": alpha, "r": str(RANK)})
    yield way("header: network_alpha", three, header={"transformer.network_alpha": alpha})
    yield way("header: alpha", three, header={"alpha": alpha, "rank": str(RANK)})
    yield way("config_lora.json", three, beside=("config_lora.json", settings))
    yield way("<name>_config_lora.json", three, beside=("some_config_lora.json", settings))
    yield way("config_lora.json, rsLoRA", root, beside=("config_lora.json", {**settings, "use_rslora": True}))
    for name, axis, shape in (("per row", 1, (-1, 1)), ("per column", 0, (1, -1))):
        yield way(
            f"DoRA as LyCORIS, {name}",
            dora(ALPHA / RANK, axis),
            extra=lambda layer, axis=axis, shape=shape: {
                "alpha": torch.tensor(float(ALPHA)),
                "dora_scale": magnitudes(weights[layer], axis).reshape(shape),
            },
        )


_PATTERNS = {
    "alpha_pattern": {r"visual_transformer_blocks\.\d+\.self_attention\.to_(query|key)": 5, "in_layer": 9},
    "rank_pattern": {r".*feed_forward.*": 2},
}
PEFT_SETTINGS: dict[str, dict[str, Any]] = {
    "PEFT's folder": {},
    "PEFT's folder, rsLoRA": {"use_rslora": True},
    "PEFT's folder, patterns": _PATTERNS,
    "PEFT's folder, DoRA": {"use_dora": True},
    "PEFT's folder, DoRA, rsLoRA, patterns": {"use_dora": True, "use_rslora": True, **_PATTERNS},
}


def by_peft(folder: Path, model: nn.Module, name: str) -> Way:
    """A folder that PEFT writes, with PEFT's merged weights as reference; settings of `PEFT_SETTINGS`."""
    config = peft.LoraConfig(
        r=RANK, lora_alpha=ALPHA, target_modules=["to_query", "in_layer"], **PEFT_SETTINGS[name]
    )
    trained = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    for parameter_name, parameter in trained.named_parameters():
        if "magnitude" in parameter_name:
            parameter.data *= torch.linspace(0.5, 1.5, parameter.numel()).reshape(parameter.shape)
        elif "lora_" in parameter_name:
            parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3
    place = folder / f"peft {len(list(folder.iterdir()))}"
    trained.save_pretrained(place)
    merged = trained.merge_and_unload()
    weights = weights_of(model)
    expected = {layer: merged.get_submodule(layer).weight - weights[layer] for layer in LAYERS}
    return Way(name, place, expected)


def main() -> None:
    model = small_model()
    with tempfile.TemporaryDirectory() as text:
        folder = Path(text)
        ways = [*by_hand(folder, model), *(by_peft(folder, model, name) for name in PEFT_SETTINGS)]
        rows = [(way.name, f"{way.error(weights_of(model)):.1e}") for way in ways]
    print(format_table(("one set of factors, written as", "relative error of the change"), rows))


if __name__ == "__main__":
    main()
