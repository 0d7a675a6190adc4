"""LoKr: the change of a weight is a Kronecker product of a small matrix and a larger one.

Source: Yeh et al. 2023, "Navigating Text-To-Image Customization" (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modules.seeding import generator_for
from networks.dense_adapter import DenseAdapter
from networks.factors import LayerFactors


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: 512 -> (16, 32); with factor 4 -> (4, 128).

    Args:
        factor: the requested smaller factor, or its upper bound if it does not divide; -1: an even pair.
    """
    limit = math.isqrt(size)
    if factor > 0:
        if size % factor == 0:
            return min(factor, size // factor), max(factor, size // factor)
        limit = min(limit, factor)
    small = next(part for part in range(limit, 0, -1) if size % part == 0)
    return small, size // small


@dataclass(frozen=True, slots=True)
class LokrFactors(LayerFactors):
    """delta = scale * kron(w1 [out_l, in_m], w2 [out_k, in_n]); either may be given as a product of two.

    Source of the key names: LyCORIS.
    """

    PRODUCTS: ClassVar[tuple[tuple[str, str], ...]] = (("lokr_w1_a", "lokr_w1_b"), ("lokr_w2_a", "lokr_w2_b"))

    @classmethod
    def is_complete(cls, roles: Collection[str]) -> bool:
        return all(
            whole in roles or {f"{whole}_a", f"{whole}_b"} <= set(roles) for whole in ("lokr_w1", "lokr_w2")
        )

    @property
    def rank(self) -> int:
        for role in ("lokr_w2_b", "lokr_w1_b"):
            if role in self.tensors:
                return self.tensors[role].shape[0]
        return min(self.tensors["lokr_w2"].shape)

    @property
    def is_scaled(self) -> bool:
        """False where both factors are whole matrices: there is no rank, and alpha has no effect."""
        return not {"lokr_w1", "lokr_w2"} <= set(self.tensors)

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


class LokrAdapter(DenseAdapter):
    """delta = scale * kron(w1 [out_l, in_m], w2 [out_k, in_n]).

    w2 is a product of rank `rank`, or a whole matrix (then scale is 1) where that rank would not be smaller
    than half its longer side. It starts at zero.
    """

    def __init__(
        self,
        path: str,
        in_features: int,
        out_features: int,
        *,
        rank: int,
        alpha: float,
        seed: int,
        factor: int = -1,
    ) -> None:
        super().__init__(path, in_features, out_features, rank=rank, alpha=alpha)
        (in_m, in_n), (out_l, out_k) = split_size(in_features, factor), split_size(out_features, factor)
        generator = generator_for(seed, "lokr", path)
        self.lokr_w1 = nn.Parameter(_kaiming(out_l, in_m, generator))
        self.is_full = rank >= max(out_k, in_n) / 2
        if self.is_full:
            self.lokr_w2 = nn.Parameter(torch.zeros(out_k, in_n))
        else:
            self.lokr_w2_a = nn.Parameter(_kaiming(out_k, rank, generator))
            self.lokr_w2_b = nn.Parameter(torch.zeros(rank, in_n))

    @property
    def scale(self) -> float:
        return 1.0 if self.is_full else self.alpha / self.rank

    def change(self, dtype: torch.dtype) -> Tensor:
        w1 = self.lokr_w1.to(dtype)
        if self.is_full:
            w2 = self.lokr_w2.to(dtype)
        else:
            w2 = self.lokr_w2_a.to(dtype) @ self.lokr_w2_b.to(dtype)
        product = w1[:, None, :, None] * w2[None, :, None, :]  # [out_l, out_k, in_m, in_n]
        return product.reshape(self.out_features, self.in_features)

    def factors(self) -> LokrFactors:
        # Registered in this order: the zero one is last.
        return LokrFactors({role: p.detach() for role, p in self.named_parameters()}, self.scale)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    return nn.init.kaiming_uniform_(torch.empty(rows, columns), a=math.sqrt(5), generator=generator)
