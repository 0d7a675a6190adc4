"""A loss that can be compared between checks: the same clips, noise and noise levels, LoRA on and off."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from dataset.cached_dataset import BatchPlan, CachedDataset
from kandinsky5.flow_matching import draw_noise
from kandinsky5.objective import Objective
from networks.lora import LoRANetwork

SIGMAS = (0.125, 0.375, 0.625, 0.875)
"""The middles of four equal bins of noise levels."""
_SEED = 0
"""Fixed, not the run's, so that runs with different seeds can be compared."""


class Validation:
    """Measures a dataset; the base model's numbers are taken once."""

    def __init__(self, data: CachedDataset, objective: Objective, network: LoRANetwork) -> None:
        self._data = data
        self._plans = self._distinct(data.epoch_batches(1))
        self._objective = objective
        self._network = network
        self._base: list[list[float]] | None = None

    @staticmethod
    def _distinct(plans: Sequence[BatchPlan]) -> list[BatchPlan]:
        """Every set of clips once (datasets may repeat them), in the order of the dataset file."""
        by_clips = {tuple(sorted(set(plan.items))): plan for plan in plans}
        return [by_clips[clips] for clips in sorted(by_clips)]

    def measure(self) -> dict[str, Any]:
        """Mean losses with and without the LoRA: per dataset, per noise level, and over all.

        No gradient is recorded, no random stream moves, and the network is left in training mode.
        """
        self._network.eval()
        try:
            if self._base is None:
                with self._network.disabled():
                    self._base = self._losses()
            return self._summary(self._losses(), self._base)
        finally:
            self._network.train()

    @torch.no_grad()
    def _losses(self) -> list[list[float]]:
        """Per clip and noise level, on the order of the batches."""
        rows = []
        for plan in self._plans:
            batch = self._data.load_batch(plan)
            count = len(batch.item_keys)
            use = torch.ones(count, dtype=torch.bool)
            levels = []
            for level, sigma in enumerate(SIGMAS):
                noise = draw_noise(_SEED, level, batch.item_keys, batch.latents.shape[1:])
                levels.append(self._objective.losses(batch, noise, torch.full((count,), sigma), use))
            rows += torch.stack(levels, dim=1).tolist()
        return rows

    def _summary(self, losses: list[list[float]], base: list[list[float]]) -> dict[str, Any]:
        indexes = [self._data.items[i].dataset_index for plan in self._plans for i in plan.items]
        pairs = (("loss", torch.tensor(losses)), ("base_loss", torch.tensor(base)))
        owner = torch.tensor(indexes)
        return {
            **{name: float(values.mean()) for name, values in pairs},
            "sigmas": list(SIGMAS),
            **{f"{name}_per_sigma": values.mean(dim=0).tolist() for name, values in pairs},
            "datasets": [
                {"dataset": index, **{name: float(values[owner == index].mean()) for name, values in pairs}}
                for index in sorted(set(indexes))
            ],
        }
