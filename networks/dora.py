"""DoRA: a weight is split into direction and magnitude; factors change the direction, a vector the magnitude.

Source: Liu et al. 2024, "DoRA: Weight-Decomposed Low-Rank Adaptation" (https://arxiv.org/abs/2402.09353),
equation 5; with magnitudes per row of the weight (per output) as PEFT has them, or per column as in LyCORIS's
files with `wd_on_output=False`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.quantised_linear import StoredLinear
from networks.factors import LayerFactors, factors_from_roles
from networks.lora import Adapter, LoraFactors, frozen_layer, frozen_weight, initial_down
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

    def norm(self) -> Tensor:
        """||delta||_F of the direction, float64 []: the change as a whole depends on the weight."""
        return self.direction.norm()

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


def foldable(layer: LayerFactors) -> bool:
    """Whether the scale can be put into lora_up, so that every reader needs the factors alone."""
    return isinstance(layer, LoraFactors) or (
        isinstance(layer, DoraFactors) and layer.is_per_row and isinstance(layer.direction, LoraFactors)
    )


class DoraAdapter(Adapter):
    """y = g * (W x + scale * up(down(x))) + bias with g = dora_scale / ||W + scale * up @ down||, per output.

    The norm counts as a constant in the backward pass (section 4.3 of the paper). Its square is
    ||W||^2 + 2 * scale * up . (W @ down^T) + ||scale * up @ down||^2 for each row, so that no matrix of the
    weight's size is made. `dora_scale` starts as ||W||, which makes the first step change nothing.
    """

    def __init__(
        self, path: str, in_features: int, out_features: int, *, rank: int, alpha: float, seed: int
    ) -> None:
        super().__init__(path, in_features, out_features, rank=rank, alpha=alpha)
        self.lora_down = nn.Parameter(initial_down(path, rank, in_features, seed))
        self.lora_up = nn.Parameter(torch.zeros(out_features, rank, dtype=torch.float32))
        self.dora_scale = nn.Parameter(torch.ones(out_features, 1, dtype=torch.float32))
        # No buffers, which distributed training would send around in every step; `_apply` moves them.
        self._weight_norm = torch.ones(out_features, dtype=torch.float32)
        self._direction_norm = self._weight_norm

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        super()._apply(fn, recurse)
        self._weight_norm, self._direction_norm = fn(self._weight_norm), fn(self._direction_norm)
        return self

    @torch.no_grad()
    def bind(self, layer: nn.Module) -> None:
        """Read the norms of the weight's rows, which the magnitudes start from."""
        norm = torch.linalg.vector_norm(frozen_weight(layer), dim=1, dtype=torch.float32)
        self._weight_norm = norm.to(self.dora_scale.device)
        self._direction_norm = self._weight_norm
        self.dora_scale.copy_(self._weight_norm[:, None])

    def forward_with(
        self, base: nn.Module, x: Tensor, multiplier: float, step_seed: tuple[int, ...]
    ) -> Tensor:
        layer = frozen_layer(base)
        output = base(x)
        # Under other adapters the change is still that of the frozen layer, as when all are merged.
        plain = output if layer is base else layer(x)
        if layer.bias is not None:
            plain = plain - layer.bias
        norm = self._measure(layer, x.dtype)
        gain = torch.where(norm > 0, self.dora_scale[:, 0] / norm, 1.0)  # [out], float32
        hidden = self.drop_ranks(F.linear(x, self.lora_down.to(x.dtype)), step_seed)  # [..., rank]
        strength = self.multiplier_now(multiplier, step_seed)
        own = F.linear(hidden, self.lora_up.to(x.dtype)) * (gain * (strength * self.scale)).to(x.dtype)
        return torch.addcmul(output + own, plain, (strength * (gain - 1.0)).to(x.dtype))

    @torch.no_grad()
    def _measure(self, layer: nn.Module, dtype: torch.dtype) -> Tensor:
        """||W + scale * up @ down|| per row: [out], float32."""
        down = self.lora_down.to(dtype)
        if isinstance(layer, StoredLinear):
            crossed = layer.unrounded_product(down)
        else:
            crossed = F.linear(down, layer.get_parameter("weight"))
        added = 2.0 * self.scale * (self.lora_up * crossed.t().float()).sum(dim=1) + self._added_square()
        square = self._weight_norm.square().clamp(min=torch.finfo(torch.float32).tiny)
        # As a factor of ||W||: without a change the quotient with the first magnitudes is exactly 1.
        self._direction_norm = self._weight_norm * (1.0 + added / square).clamp(min=0.0).sqrt()
        return self._direction_norm

    def _added_square(self) -> Tensor:
        """||scale * up @ down||^2 per row: [out], float32."""
        gram = self.lora_down @ self.lora_down.t()
        return self.scale**2 * ((self.lora_up @ gram) * self.lora_up).sum(dim=1)

    def factors(self) -> DoraFactors:
        roles = ("lora_down", MAGNITUDE, "lora_up")  # the zero one last
        return DoraFactors({role: self.get_parameter(role).detach() for role in roles}, self.scale)

    @torch.no_grad()
    def change_norm(self) -> Tensor:
        """||g (W + delta) - W||_F, with the norms of W + delta that the last step has measured."""
        magnitude, norm = self.dora_scale[:, 0].double(), self._direction_norm.double()
        added, weight = self._added_square().double(), self._weight_norm.double()
        gain = torch.where(norm > 0, magnitude / norm, 1.0)
        square = (magnitude - norm).square() + (gain - 1.0) * (norm**2 + added - weight**2) + added
        return square.sum().clamp(min=0.0).sqrt()
