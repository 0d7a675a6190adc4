"""LoHa: the change of a weight is the element-wise product of two low-rank matrices.

Source: Hyeon-Woo et al. 2021, "FedPara: Low-Rank Hadamard Product" (https://arxiv.org/abs/2108.06098).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from modules.seeding import generator_for
from networks.dense_adapter import DenseAdapter
from networks.factors import LohaFactors


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
