"""Effect of a trained network: the size of its changes relative to the weights."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from modules.quantised_linear import StoredLinear
from networks.lora import LoRANetwork, frozen_layer


@dataclass(frozen=True, slots=True)
class LoraEffect:
    """Frobenius norms of the changes, relative to those of the weights they are added to."""

    change: float
    """Of all layers together."""
    blocks: Mapping[str, float]
    """Per block of the model, by its dotted name."""
    unchanged: tuple[str, ...]
    """Layers whose change is exactly zero."""
    layers: tuple[str, ...]
    """All of them, by their dotted names."""

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def does_nothing(self) -> bool:
        return len(self.unchanged) == self.num_layers

    def describe(self) -> str:
        """One line: mean, smallest and largest change, and the number of unchanged layers."""
        least, most = (choose(self.blocks, key=self.blocks.__getitem__) for choose in (min, max))
        return (
            f"the weights change by {self.change:.3%} (least {least} {self.blocks[least]:.3%}, "
            f"most {most} {self.blocks[most]:.3%}); "
            f"{len(self.unchanged)} of {self.num_layers} layers are unchanged"
        )


def block_of(layer: str) -> str:
    """Dotted name of the block that a layer is in."""
    return ".".join(layer.split(".")[:2])


@torch.no_grad()
def weight_norms(network: LoRANetwork, device: torch.device) -> dict[str, float]:
    """Frobenius norm of the frozen weight under every adapter; read while the layers hold their weights.

    Args:
        device: where to compute; weights in host memory visit it one at a time.
    """
    norms = [
        torch.linalg.vector_norm(_frozen_weight(network.host, path, device), dtype=torch.float32)
        for path in network.adapters
    ]
    return dict(zip(network.adapters, torch.stack(norms).tolist(), strict=True))


def _frozen_weight(host: nn.Module, path: str, device: torch.device) -> Tensor:
    layer = frozen_layer(host.get_submodule(path))
    if isinstance(layer, StoredLinear):
        return layer.widened(device)
    return layer.get_parameter("weight").to(device)


@torch.no_grad()
def measure_effect(network: LoRANetwork, base_norms: Mapping[str, float]) -> LoraEffect:
    """Compare the network's changes with the weights, whose norms `weight_norms` gave."""
    names = list(network.adapters)
    norms = torch.stack([network.adapters[name].change_norm() for name in names]).tolist()
    changes, weights = defaultdict(list), defaultdict(list)
    for name, norm in zip(names, norms, strict=True):
        block = block_of(name)
        changes[block].append(norm)
        weights[block].append(base_norms[name])
    return LoraEffect(
        change=_ratio(norms, list(base_norms.values())),
        blocks={block: _ratio(changes[block], weights[block]) for block in changes},
        unchanged=tuple(name for name, norm in zip(names, norms, strict=True) if norm == 0.0),
        layers=tuple(names),
    )


def _ratio(changes: list[float], weights: list[float]) -> float:
    whole = math.hypot(*weights)
    return math.hypot(*changes) / whole if whole > 0 else math.inf
