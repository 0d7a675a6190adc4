"""Prior preservation: keeps the LoRA close to the base model on captions without the subject.

The target is the base model's own prediction on the same noisy latents, so no further images are needed. On
a clip's own caption such a term would only undo the training; it is taken on another one: the empty caption,
the dataset's `prior_caption`, or the captions of datasets marked `is_prior`.

Source: the idea of a class prior is that of Ruiz et al. 2022, "DreamBooth"; taking the old model's answers in
place of old data is that of Li and Hoiem 2016, "Learning without Forgetting".
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedBatch
from kandinsky5.model.conditioning import TextBatch, TextConditioning, pad_text
from kandinsky5.model.flow_matching import add_noise, mean_squared_error
from kandinsky5.training.loss.objective import NoiseDraw, Objective
from modules.transfers import send
from networks.lora import LoRANetwork


def passes(batch: CachedBatch) -> tuple[bool, ...]:
    """The forward and backward passes of a batch, in order: whether each is that of the prior term."""
    if batch.is_prior:
        return (True,)
    return (False,) if batch.prior_text is None else (False, True)


@dataclass(frozen=True, slots=True)
class PriorPreservation:
    """The prior term of batches."""

    objective: Objective
    network: LoRANetwork
    weight: float

    def losses(self, batch: CachedBatch, draw: NoiseDraw) -> Tensor:
        """Weighted squared difference from the base model per clip, [B], float32 on the device.

        One forward pass without the LoRA and without gradients, then one with both. Masks are ignored: no
        part of the picture may drift. Frames that are given to the model do not count.
        """
        objective = self.objective
        device = objective.device
        sigma = send(draw.sigma, device)
        noisy = add_noise(send(batch.latents, device), send(draw.noise, device), sigma)
        text = self._text(batch)
        frames = objective.frames(batch, draw.use)
        # Around the wrapper for several processes: nothing is exchanged in this pass.
        base = replace(objective.model, runner=None)
        with torch.no_grad(), self.network.disabled():
            target = base(noisy, sigma, text, frames).float()
        predicted = objective.model(noisy, sigma, text, frames)
        losses = mean_squared_error(predicted, target, None if frames is None else frames.predicted_frames())
        return self.weight * losses * objective.sigma_weight(draw.sigma)

    def _text(self, batch: CachedBatch) -> TextBatch:
        if batch.prior_text is None:  # a dataset marked is_prior: its own captions
            return self.objective.text(batch)
        caption = TextConditioning(batch.prior_text.text_embeds, batch.prior_text.pooled_embed)
        dtype = self.objective.model.dit.compute_dtype
        return pad_text([caption] * len(batch.item_keys), device=self.objective.device, dtype=dtype)
