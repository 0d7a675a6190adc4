"""The training objective: noise, noising and the velocity target."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from modules.seeding import generator_for

VelocityFn = Callable[[Tensor, Tensor], Tensor]
"""(noisy_latents [B, 16, F, H, W], sigma [B]) -> velocity [B, 16, F, H, W]."""


def draw_noise(seed: int, step: int, item_keys: Sequence[str], shape: Sequence[int]) -> Tensor:
    """Standard normal noise for each item of a batch, a pure function of (seed, step, item).

    `shape` is that of one item, [16, F, H, W]; the result is [B, 16, F, H, W], float32 on the CPU, so that
    all devices train on the same noise.
    """
    return torch.stack([
        torch.randn(*shape, generator=generator_for(seed, "noise", step, key)) for key in item_keys
    ])


def add_noise(latents: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """latents, noise [B, 16, F, H, W] and sigma [B] -> (1 - sigma) * latents + sigma * noise."""
    sigma_bcfhw = rearrange(sigma, "b -> b 1 1 1 1")
    return (1 - sigma_bcfhw) * latents + sigma_bcfhw * noise


def flow_matching_loss(
    predict_velocity: VelocityFn,
    latents: Tensor,
    noise: Tensor,
    sigma: Tensor,
    predicted_frames: Tensor | None = None,
) -> Tensor:
    """Squared error of the velocity, averaged per clip.

    Args:
        predict_velocity: the model, with text and conditioning bound.
        latents, noise: [B, 16, F, H, W] float32.
        sigma: [B] float32.
        predicted_frames: [B, F] bool, the frames that count; None means all.
    Returns:
        [B] float32; the caller weights and averages it.
    Source: kandinskylab/kandinsky-5-lora-train, the same sign as the official sampler's.
    """
    noisy_latents = add_noise(latents, noise, sigma)
    velocity = noise - latents  # d(noisy_latents) / d(sigma)
    error = (predict_velocity(noisy_latents, sigma).float() - velocity).square()
    if predicted_frames is None:
        return error.mean(dim=(1, 2, 3, 4))
    per_frame = error.mean(dim=(1, 3, 4))  # [B, F]
    counts = predicted_frames.to(per_frame.dtype)
    return (per_frame * counts).sum(dim=1) / counts.sum(dim=1)
