"""Exponential moving average (EMA) of a network's factors."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def decay_at(step: int, decay: float) -> float:
    """EMA decay at optimizer step `step`, counted from 1, with a warm-up.

    A LoRA starts at zero; without the ramp its average would stay near zero for 1 / (1 - decay) steps.
    Source: min(decay, (1 + n) / (10 + n)), as TensorFlow's ExponentialMovingAverage with num_updates.
    """
    return min(decay, (1 + step) / (10 + step))


class WeightAverage:
    """average <- d * average + (1 - d) * weights, factor by factor, float32 on the factors' device.

    Args:
        values: the average so far, by parameter name; None starts from the current weights.
    """

    def __init__(self, network: nn.Module, decay: float, values: Mapping[str, Tensor] | None = None) -> None:
        self.decay = decay
        self._parameters = dict(network.named_parameters())
        start = self._parameters if values is None else values
        self._values = {
            name: start[name].detach().to(device=parameter.device, dtype=torch.float32, copy=True)
            for name, parameter in self._parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Update the averages with the weights after optimizer step `step`, counted from 1."""
        share = 1.0 - decay_at(step, self.decay)
        torch._foreach_lerp_(list(self._values.values()), list(self._parameters.values()), share)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Within the block the network holds the averages, afterwards its own weights again."""
        trained = {name: parameter.detach().clone() for name, parameter in self._parameters.items()}
        try:
            self._put(self._values)
            yield
        finally:
            self._put(trained)

    @torch.no_grad()
    def _put(self, values: Mapping[str, Tensor]) -> None:
        for name, parameter in self._parameters.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name, for a saved state."""
        return dict(self._values)
