"""The change of the prediction by a LoRA: the same clip and noise, LoRA on and off."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedDataset
from kandinsky5.model.flow_matching import draw_noise
from kandinsky5.training.loss.objective import Objective
from networks.lora import LoRANetwork

SIGMAS = (0.25, 0.5, 0.75)
_SEED = 0
"""Fixed, not the run's, so that runs with different seeds can be compared."""


class PredictionChange:
    """Compares predictions on one clip of the training data; the base model's are made once and kept.

    The clip is the first by name in the size that most clips have. It is read here, so that a cache that
    changes later disturbs nothing.
    """

    def __init__(self, data: CachedDataset, objective: Objective, network: LoRANetwork) -> None:
        sizes = Counter(item.bucket for item in data.items)
        chosen = min(range(len(data.items)), key=lambda i: (-sizes[data.items[i].bucket], data.items[i].key))
        (plan,) = [plan for plan in data.measured_batches(batch_size=1) if plan.items == (chosen,)]
        self.bucket = data.items[chosen].bucket
        self._batch = data.load_batch(plan)
        self._objective, self._network = objective, network
        self._base: list[Tensor] | None = None

    def measure(self) -> Mapping[int, float]:
        """Timestep -> ||with - without|| / ||without||, L2 norms over the predicted velocity.

        No gradient is recorded and no random stream moves; the network is left in the mode it was in.
        """
        was_training = self._network.training
        self._network.eval()
        try:
            if self._base is None:
                with self._network.disabled():
                    self._base = [self.predict(sigma).cpu() for sigma in SIGMAS]
            changes = [
                _relative_change(self.predict(sigma), base)
                for sigma, base in zip(SIGMAS, self._base, strict=True)
            ]
        finally:
            self._network.train(was_training)
        values = torch.stack(changes).tolist()
        return {round(1000 * sigma): value for sigma, value in zip(SIGMAS, values, strict=True)}

    @torch.no_grad()
    def predict(self, sigma: float) -> Tensor:
        """The velocity at one sigma, [1, 16, F, H, W] float32 on the device; without gradients."""
        noise = draw_noise(_SEED, 0, self._batch.item_keys, self._batch.latents.shape[1:])
        return self._objective.velocity(self._batch, noise, torch.tensor([sigma]))


def _relative_change(predicted: Tensor, base: Tensor) -> Tensor:
    base = base.to(predicted.device)
    return torch.linalg.vector_norm(predicted - base) / torch.linalg.vector_norm(base)
