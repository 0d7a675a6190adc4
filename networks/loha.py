"""LoHa: the change of a weight is the element-wise product of two low-rank matrices.

Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product" (https://arxiv.org/abs/2108.06098).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from modules.seeding import generator_for
from networks.dense_adapter import DenseAdapter
from networks.factors import LayerFactors


@dataclass(frozen=True, slots=True)
class LohaFactors(LayerFactors):
    """delta = scale * (w1_a [out, r] @ w1_b [r, in]) * (w2_a @ w2_b), the second product element by element.

    Source of the key names: LyCORIS.
    """

    PRODUCTS: ClassVar[tuple[tuple[str, str], ...]] = (("hada_w1_a", "hada_w1_b"), ("hada_w2_a", "hada_w2_b"))

    @classmethod
    def is_complete(cls, roles: Collection[str]) -> bool:
        return {role for product in cls.PRODUCTS for role in product} <= set(roles)

    @property
    def rank(self) -> int:
        return self.tensors["hada_w1_b"].shape[0]

    @property
    def shape(self) -> tuple[int, int]:
        return self._size(0)

    def delta(self) -> Tensor:
        (w1_a, w1_b), (w2_a, w2_b) = (
            (self.tensors[left].float(), self.tensors[right].float()) for left, right in self.PRODUCTS
        )
        return (w1_a @ w1_b).mul_(w2_a @ w2_b).mul_(self.scale)

    def product_problem(self) -> str | None:
        problem = LayerFactors.product_problem(self)
        if problem is None and self._size(0) != self._size(1):
            return f"the two products are of sizes {list(self._size(0))} and {list(self._size(1))}"
        return problem

    def _size(self, product: int) -> tuple[int, int]:
        left, right = self.PRODUCTS[product]
        return self.tensors[left].shape[0], self.tensors[right].shape[1]


class LohaAdapter(DenseAdapter):
    """delta = alpha / rank * (w1_a @ w1_b) * (w2_a @ w2_b); `hada_w2_a` starts at zero."""

    def __init__(
        self, path: str, in_features: int, out_features: int, *, rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__(path, in_features, out_features, rank=rank, alpha=alpha)
        generator = generator_for(seed, "loha", path)

        def normal(rows: int, columns: int, deviation: float) -> nn.Parameter:
            return nn.Parameter(torch.randn(rows, columns, generator=generator) * deviation)

        self.hada_w1_a = normal(out_features, rank, 0.1)
        self.hada_w1_b = normal(rank, in_features, 1.0)
        self.hada_w2_b = normal(rank, in_features, 1.0)
        self.hada_w2_a = nn.Parameter(torch.zeros(out_features, rank))

    def change(self, dtype: torch.dtype) -> Tensor:
        first = self.hada_w1_a.to(dtype) @ self.hada_w1_b.to(dtype)
        return first * (self.hada_w2_a.to(dtype) @ self.hada_w2_b.to(dtype))

    def factors(self) -> LohaFactors:
        roles = ("hada_w1_a", "hada_w1_b", "hada_w2_b", "hada_w2_a")  # the zero one last
        return LohaFactors({role: self.get_parameter(role).detach() for role in roles}, self.scale)
