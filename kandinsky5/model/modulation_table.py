"""Precomputed modulation for all passes of a sampling run.

It depends on the timestep and on the pooled caption only, and its weights are an eighth of the model: read
once per run instead of once per pass, they cost nothing where they come from host memory. The table is in
host memory, a row per pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor

from kandinsky5.model.dit import NUM_TIMESTEPS, DiffusionTransformer3D
from modules.host_buffer import host_empty


def table_bytes(dit: DiffusionTransformer3D, passes: int) -> int:
    """Host memory of a table."""
    return passes * torch.float32.itemsize * sum(_widths(dit))


def _widths(dit: DiffusionTransformer3D) -> list[int]:
    return [layer.out_layer.out_features for layer in dit.modulation_layers()]


class ModulationTable:
    """The outputs of every modulation layer, in the order of the passes.

    Args:
        sigmas: [steps] float32, the sigma of each step.
        pooled: [1, in_text_dim2] per pass of a step: of the caption, and of the negative one with guidance.
        device: where the model computes.
    """

    def __init__(
        self,
        dit: DiffusionTransformer3D,
        sigmas: Tensor,
        pooled: Sequence[Tensor],
        device: torch.device,
    ) -> None:
        self._device = device
        self._layers = dit.modulation_layers()
        self._next = 0
        passes = len(sigmas) * len(pooled)
        timesteps = (NUM_TIMESTEPS * sigmas.to(device)).repeat_interleave(len(pooled))
        captions = torch.cat(list(pooled)).to(device).repeat(len(sigmas), 1)
        activated_time = F.silu(dit.embed_time(timesteps, captions))  # [passes, E]
        self._widths = _widths(dit)
        self._table = host_empty((passes, sum(self._widths)), torch.float32, pin=device.type == "cuda")
        self.nbytes = self._table.nbytes
        for layer, part in zip(self._layers, self._table.split(self._widths, dim=1), strict=True):
            part.copy_(layer(activated_time).flatten(1))

    @contextmanager
    def next_pass(self) -> Iterator[None]:
        """Within the block the layers return the table's values for the next pass."""
        assert self._next < len(self._table), "the table is made for fewer passes"
        row = self._table[self._next : self._next + 1].to(self._device, non_blocking=True)
        self._next += 1
        for layer, part in zip(self._layers, row.split(self._widths, dim=1), strict=True):
            layer.given = part.unflatten(1, (layer.num_params, -1))
        try:
            yield
        finally:
            for layer in self._layers:
                layer.given = None
