"""LoKr: the change of a weight is a Kronecker product of a small matrix and a larger one.

Source: Yeh et al. 2023, "Navigating Text-To-Image Customization" (https://arxiv.org/abs/2309.14859).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from modules.seeding import generator_for
from networks.dense_adapter import DenseAdapter
from networks.factors import LokrFactors


def split_size(size: int, factor: int = -1) -> tuple[int, int]:
    """Two factors of `size`, the smaller first: 512 -> (16, 32); with factor 4 -> (4, 128).

    Args:
        factor: the wanted smaller part, or its limit where it does not divide; -1 for the most even pair.
    """
    limit = math.isqrt(size)
    if factor > 0:
        if size % factor == 0:
            return min(factor, size // factor), max(factor, size // factor)
        limit = min(limit, factor)
    small = next(part for part in range(limit, 0, -1) if size % part == 0)
    return small, size // small


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
