"""What an adapter file holds for one layer, and the change of the layer's weight that it stands for."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerFactors(ABC):
    """The factors of one layer under their role names, and the number their product is multiplied by."""

    tensors: Mapping[str, Tensor]
    scale: float

    ROLES: ClassVar[tuple[str, ...]] = ()
    """Role names that must all be there."""

    def to(self, device: torch.device) -> Self:
        """The same factors on another device."""
        return replace(self, tensors={role: tensor.to(device) for role, tensor in self.tensors.items()})

    @property
    @abstractmethod
    def rank(self) -> int:
        """Inner size of the factorisation; what alpha is divided by."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""

    @abstractmethod
    def delta(self) -> Tensor:
        """The change of the layer's weight: [out, in], float32, on the device of the factors."""


@dataclass(frozen=True, slots=True)
class LoraFactors(LayerFactors):
    """delta = scale * up [out, r] @ down [r, in]."""

    ROLES: ClassVar[tuple[str, ...]] = ("lora_down", "lora_up")

    @property
    def down(self) -> Tensor:
        return self.tensors["lora_down"]

    @property
    def up(self) -> Tensor:
        return self.tensors["lora_up"]

    @property
    def rank(self) -> int:
        return self.down.shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.up.shape[0], self.down.shape[1]

    def delta(self) -> Tensor:
        return (self.up.float() * self.scale) @ self.down.float()


@dataclass(frozen=True, slots=True)
class LohaFactors(LayerFactors):
    """delta = scale * (w1_a [out, r] @ w1_b [r, in]) * (w2_a @ w2_b), the second product element by element.

    Source: Hyeon-Woo et al. 2021, "FedPara"; key names of LyCORIS.
    """

    ROLES: ClassVar[tuple[str, ...]] = ("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")

    @property
    def rank(self) -> int:
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self.tensors["hada_w1_a"].shape[0], self.tensors["hada_w1_b"].shape[1]

    def delta(self) -> Tensor:
        w1_a, w1_b, w2_a, w2_b = (self.tensors[role].float() for role in self.ROLES)
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scale)


@dataclass(frozen=True, slots=True)
class LokrFactors(LayerFactors):
    """delta = scale * kron(w1 [out_l, in_m], w2 [out_k, in_n]); either may be given as a product of two.

    Source: Yeh et al. 2023, "Navigating Text-To-Image Customization" (LyCORIS).
    """

    @property
    def rank(self) -> int:
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in self.tensors:
                return self.tensors[role].shape[0]
        return min(self.tensors["lokr_w2"].shape)

    @property
    def is_full(self) -> bool:
        """Both factors are whole matrices: there is no rank, and alpha does not scale anything."""
        return "lokr_w1" in self.tensors and "lokr_w2" in self.tensors

    @property
    def shape(self) -> tuple[int, int]:
        (out_l, in_m), (out_k, in_n) = self._size("lokr_w1"), self._size("lokr_w2")
        return out_l * out_k, in_m * in_n

    def delta(self) -> Tensor:
        w1, w2 = self._matrix("lokr_w1"), self._matrix("lokr_w2")
        # The Kronecker product, as one broadcast product in the memory order of the result.
        product = w1[:, None, :, None] * (w2 * self.scale)[None, :, None, :]  # [out_l, out_k, in_m, in_n]
        return product.reshape(self.shape)

    def _size(self, role: str) -> tuple[int, int]:
        if role in self.tensors:
            rows, columns = self.tensors[role].shape
        else:
            rows, columns = self.tensors[f"{role}_a"].shape[0], self.tensors[f"{role}_b"].shape[1]
        return rows, columns

    def _matrix(self, role: str) -> Tensor:
        if role in self.tensors:
            return self.tensors[role].float()
        return self.tensors[f"{role}_a"].float() @ self.tensors[f"{role}_b"].float()


def product_problem(tensors: Mapping[str, Tensor]) -> str | None:
    """Which matrices of a layer cannot be multiplied, with their shapes; None when all fit.

    Args:
        tensors: matrices by role, a set that `factors_from_roles` takes.
    """
    pairs = [(role, f"{role[:-1]}b") for role in tensors if role.endswith("_a")]
    pairs += [("lora_up", "lora_down")] if "lora_up" in tensors else []
    for left, right in pairs:
        if tensors[left].shape[1] != tensors[right].shape[0]:
            shapes = [list(tensors[role].shape) for role in (left, right)]
            return f"{left} {shapes[0]} does not fit {right} {shapes[1]}: their ranks differ"
    if "hada_w1_a" in tensors:
        first, second = ((tensors[f"hada_w{i}_a"].shape[0], tensors[f"hada_w{i}_b"].shape[1]) for i in (1, 2))
        if first != second:
            return f"the two products are of sizes {list(first)} and {list(second)}"
    return None


def factors_from_roles(tensors: Mapping[str, Tensor], scale: float) -> LayerFactors | None:
    """The factors that a set of role names makes up; None when it is incomplete or mixed."""
    roles = set(tensors)
    for kind in (LoraFactors, LohaFactors):
        if roles == set(kind.ROLES):
            return kind(tensors, scale)
    is_w1 = "lokr_w1" in roles or {"lokr_w1_a", "lokr_w1_b"} <= roles
    is_w2 = "lokr_w2" in roles or {"lokr_w2_a", "lokr_w2_b"} <= roles
    is_lokr_only = all(role.startswith("lokr_w") for role in roles)
    return LokrFactors(tensors, scale) if is_w1 and is_w2 and is_lokr_only else None
