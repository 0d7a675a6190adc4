"""Base of LoHa and LoKr adapters, whose change is materialised as a full weight in the compute dtype."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from networks.lora import Adapter


class DenseAdapter(Adapter, ABC):
    """An adapter whose change is computed as a weight-sized matrix."""

    @abstractmethod
    def change(self, dtype: torch.dtype) -> Tensor:
        """The change without scale: [out, in] in `dtype`, differentiable."""

    def forward_with(
        self, base: nn.Module, x: Tensor, multiplier: float, step_seed: tuple[int, ...]
    ) -> Tensor:
        base_output = base(x)
        scale = self.multiplier_now(multiplier, step_seed) * self.scale
        summed = torch.addmm(
            base_output.reshape(-1, self.out_features),
            x.reshape(-1, self.in_features),
            self.change(x.dtype).t(),
            alpha=scale,
        )
        return summed.view(base_output.shape)
