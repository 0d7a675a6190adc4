"""Factors of one layer in an adapter file, and the weight change they represent."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from typing import ClassVar, Self

import torch
from torch import Tensor

from networks.lora_types import LoraType, type_of_roles


@dataclass(frozen=True, slots=True)
class LayerFactors(ABC):
    """The factors of one layer by role name, and the scale of their product."""

    tensors: Mapping[str, Tensor]
    scale: float

    PRODUCTS: ClassVar[tuple[tuple[str, str], ...]] = ()
    """Pairs of roles that are multiplied as matrices, left [m, r] and right [r, n]."""

    @classmethod
    @abstractmethod
    def is_complete(cls, roles: Collection[str]) -> bool:
        """Whether tensors with these roles form a complete layer of this kind."""

    def to(self, device: torch.device) -> Self:
        """The same factors on another device."""
        return replace(self, tensors={role: tensor.to(device) for role, tensor in self.tensors.items()})

    @property
    @abstractmethod
    def rank(self) -> int:
        """Inner size of the factorisation; alpha is divided by it."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out_features, in_features) of the layer."""

    @abstractmethod
    def delta(self) -> Tensor:
        """What the factors add to the layer's weight: [out, in], float32, on the device of the factors."""

    def change(self, weight: Tensor) -> Tensor:
        """The whole change of the layer's weight, for kinds in which it depends on the weight.

        Args:
            weight: [out, in], of any dtype, on the device of the factors; not changed.
        Returns:
            A fresh [out, in], float32.
        """
        del weight
        return self.delta()

    @property
    def is_scaled(self) -> bool:
        """Whether alpha / rank scales this layer."""
        return True

    @property
    def alpha(self) -> float:
        """The alpha that gives `scale` when it is divided by the rank."""
        return float(self.scale * self.rank if self.is_scaled else self.rank)

    def norm(self) -> Tensor:
        """||delta||_F: float64 [], on the device of the factors."""
        return torch.linalg.vector_norm(self.delta(), dtype=torch.float64)

    def product_problem(self) -> str | None:
        """Describe matrices whose shapes do not match for a product; None if all match."""
        for left, right in self.PRODUCTS:
            if left not in self.tensors or right not in self.tensors:
                continue
            if self.tensors[left].shape[1] != self.tensors[right].shape[0]:
                shapes = [list(self.tensors[role].shape) for role in (left, right)]
                return f"{left} {shapes[0]} does not fit {right} {shapes[1]}: their ranks differ"
        return None


def factors_class(kind: LoraType) -> type[LayerFactors]:
    """The factors of a kind of adapter."""
    return kind.load_class(kind.factors)


def factors_from_roles(tensors: Mapping[str, Tensor], scale: float) -> LayerFactors | None:
    """Build the factors from tensors by role; None if they are incomplete or of several kinds."""
    kind = type_of_roles(frozenset(tensors))
    factors = None if kind is None else factors_class(kind)
    return factors(tensors, scale) if factors is not None and factors.is_complete(tensors) else None
