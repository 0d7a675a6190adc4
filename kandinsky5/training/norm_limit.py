"""`--scale_weight_norms`: limits the changes after every step, and reports it one step later."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from networks.lora import LoRANetwork

NAMES = ("max_norm/keys_scaled", "max_norm/average_key_norm", "max_norm/max_key_norm")
"""Layers that were cut, and the mean and the largest norm after it; the names are musubi-tuner's."""


class NormLimit:
    """The limit of one network. Its numbers stay on the device and are transferred with the next step's."""

    def __init__(self, network: LoRANetwork, max_norm: float | None, device: torch.device) -> None:
        self._network, self._max_norm = network, max_norm
        self._nothing = torch.empty(0, device=device)
        self.waiting: Tensor = self._nothing
        """[3] float32 on the device, in the order of NAMES; empty when there is nothing to report."""

    def apply(self) -> None:
        """After an optimizer step: cut every layer's change that is larger than the limit."""
        if self._max_norm is None:
            return
        norms = self._network.scale_weight_norms(self._max_norm)
        cut = norms.clamp(max=self._max_norm)
        self.waiting = torch.stack([(norms > self._max_norm).sum().float(), cut.mean(), cut.max()])

    def take(self, values: Sequence[float]) -> dict[str, float]:
        """`waiting` as it arrived on the host, by name; nothing waits any more."""
        self.waiting = self._nothing
        return dict(zip(NAMES, values, strict=True)) if values else {}
