"""The training objective on a cached batch: random draws, model input and loss."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dataset.cache.cached_dataset import CachedBatch
from kandinsky5.configs.train import ConditioningConfig, LossConfig, TimestepConfig
from kandinsky5.model.conditioning import (
    FrameConditioning,
    TextBatch,
    TextConditioning,
    VelocityModel,
    condition_frames,
    pad_text,
)
from kandinsky5.model.flow_matching import add_noise, draw_noise, flow_matching_loss
from kandinsky5.training.loss.timesteps import draw_sigmas, loss_weight
from modules.seeding import generator_for
from modules.transfers import send


@dataclass(frozen=True, slots=True)
class NoiseDraw:
    """The random draws of a batch, on the CPU."""

    noise: Tensor
    """[B, 16, F, H, W] float32."""
    sigma: Tensor
    """[B] float32."""
    use: Tensor
    """[B] bool, the clips that are shown their first frame in image-to-video tasks."""


@dataclass(frozen=True, slots=True)
class Objective:
    """Losses of batches; everything random is a pure function of (seed, step, item)."""

    model: VelocityModel
    timesteps: TimestepConfig
    conditioning: ConditioningConfig
    is_i2v: bool
    seed: int
    device: torch.device
    loss: LossConfig = field(default_factory=LossConfig)

    def draw(self, batch: CachedBatch, step: int) -> NoiseDraw:
        """Draw noise, sigmas and conditioned clips for a batch in a step."""
        size = (batch.latents.shape[-2], batch.latents.shape[-1])
        quantiles = batch.timestep_quantiles
        return NoiseDraw(
            draw_noise(self.seed, step, batch.item_keys, batch.latents.shape[1:]),
            draw_sigmas(self.timesteps, self.seed, step, batch.item_keys, size, quantiles),
            self._draw_conditioned(batch.item_keys, step),
        )

    def training_losses(self, batch: CachedBatch, draw: NoiseDraw) -> Tensor:
        """One forward pass for the whole batch: weighted losses [B], float32 on the device."""
        weights = batch.loss_mask
        if weights is not None:
            weights = send(weights.clamp_min(self.loss.mask_min_weight), self.device)
        losses = self.losses(batch, draw.noise, draw.sigma, draw.use, weights)
        return losses * self.sigma_weight(draw.sigma)

    def sigma_weight(self, sigma: Tensor) -> Tensor:
        """The loss weight of each clip by its sigma, [B] on the device."""
        return send(loss_weight(self.timesteps, sigma), self.device)

    def losses(
        self, batch: CachedBatch, noise: Tensor, sigma: Tensor, use: Tensor, weights: Tensor | None = None
    ) -> Tensor:
        """Squared velocity error per clip, [B] float32 on the device, for given noise and sigma.

        Args:
            use: [B] bool on the CPU, the clips that are shown their first frame in image-to-video tasks.
            weights: [B, F, H, W] on the device, what each position counts; None means all the same.
        """
        text = self.text(batch)
        frames = self.frames(batch, use)

        def predict_velocity(noisy_latents: Tensor, levels: Tensor) -> Tensor:
            return self.model(noisy_latents, levels, text, frames)

        return flow_matching_loss(
            predict_velocity,
            send(batch.latents, self.device),
            send(noise, self.device),
            send(sigma, self.device),
            None if frames is None else frames.predicted_frames(),
            weights,
        )

    def velocity(self, batch: CachedBatch, noise: Tensor, sigma: Tensor) -> Tensor:
        """The velocity predicted for given noise and sigma, [B, 16, F, H, W] float32 on the device.

        In image-to-video tasks every clip is shown its first frame; frames that do not count are zero.
        """
        frames = self.frames(batch, torch.ones(len(batch.item_keys), dtype=torch.bool))
        noisy_latents = send(add_noise(batch.latents, noise, sigma), self.device)
        predicted = self.model(noisy_latents, send(sigma, self.device), self.text(batch), frames).float()
        if frames is None:
            return predicted
        return predicted * frames.predicted_frames()[:, None, :, None, None]

    def text(self, batch: CachedBatch) -> TextBatch:
        """The captions of a batch as model input."""
        captions = [
            TextConditioning(embeds, pooled)
            for embeds, pooled in zip(batch.text_embeds, batch.pooled_embed, strict=True)
        ]
        return pad_text(captions, device=self.device, dtype=self.model.dit.compute_dtype)

    def frames(self, batch: CachedBatch, use: Tensor) -> FrameConditioning | None:
        """The clean frames that the model is given, in image-to-video tasks."""
        latent_frames = batch.latents.shape[2]
        # A single frame leaves nothing to predict: it is trained as text to video.
        if not self.is_i2v or batch.latents_image is None or latent_frames < 2:
            return None
        return condition_frames(
            send(batch.latents_image, self.device),
            latent_frames,
            mode=self.conditioning.i2v_mode,
            form=self.conditioning.i2v_conditioning,
            use=send(use, self.device),
        )

    def _draw_conditioned(self, item_keys: Sequence[str], step: int) -> Tensor:
        chance = self.conditioning.visual_cond_prob
        drawn = [
            torch.rand((), generator=generator_for(self.seed, "visual_cond", step, key)) for key in item_keys
        ]
        return torch.stack(drawn) < chance
