"""DoRA: a weight is split into direction and magnitude; factors change the direction, a vector the magnitude.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (https://arxiv.org/abs/2402.09353),
equation 5; with magnitudes per row of the weight (per output) as PEFT has them, or per column as in LyCORIS's
files with `wd_on_output=False`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor

from networks.factors import LayerFactors, factors_from_roles
from networks.lora_types import MAGNITUDE


@dataclass(frozen=True, slots=True)
class DoraFactors(LayerFactors):
    """W' = m * (W + delta) / ||W + delta||, with the norm of each row (or column); delta is of any kind."""

    @classmethod
    def is_complete(cls, roles: Collection[str]) -> bool:
        return MAGNITUDE in roles and len(roles) > 1

    @property
    def direction(self) -> LayerFactors:
        """The factors without magnitudes."""
        tensors = {role: tensor for role, tensor in self.tensors.items() if role != MAGNITUDE}
        factors = factors_from_roles(tensors, self.scale)
        assert factors is not None
        return factors

    @property
    def magnitude(self) -> Tensor:
        """[out, 1] or [1, in]."""
        return self.tensors[MAGNITUDE]

    @property
    def is_per_row(self) -> bool:
        return self.magnitude.shape[1] == 1

    @property
    def rank(self) -> int:
        return self.direction.rank

    @property
    def is_scaled(self) -> bool:
        return self.direction.is_scaled

    @property
    def shape(self) -> tuple[int, int]:
        return self.direction.shape

    def delta(self) -> Tensor:
        """What is added to the direction: [out, in], float32."""
        return self.direction.delta()

    def change(self, weight: Tensor) -> Tensor:
        turned = self.delta().add_(weight)
        norm = torch.linalg.vector_norm(turned, dim=1 if self.is_per_row else 0, keepdim=True)
        # As in LyCORIS: a row of zeros stays one.
        return turned.mul_(self.magnitude.float() / (norm + torch.finfo(torch.float32).eps)).sub_(weight)

    def product_problem(self) -> str | None:
        problem = self.direction.product_problem()
        expected = (self.shape[0], 1), (1, self.shape[1])
        if problem is None and tuple(self.magnitude.shape) not in expected:
            return f"its magnitudes are {list(self.magnitude.shape)} instead of {list(expected[0])}"
        return problem
