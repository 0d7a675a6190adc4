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
    weights: Tensor | None = None,
) -> Tensor:
    """Squared error of the velocity, averaged per clip.

    Args:
        predict_velocity: the model, with text and conditioning bound.
        latents, noise: [B, 16, F, H, W] float32.
        sigma: [B] float32.
        predicted_frames: [B, F] bool, the frames that count; None means all.
        weights: [B, F, H, W] float32, what each position counts; None means all the same.
    Returns:
        [B] float32; the caller weights and averages it.
    Source: kandinskylab/kandinsky-5-lora-train, the same sign as the official sampler's.
    """
    velocity = noise - latents  # d(noisy_latents) / d(sigma)
    predicted = predict_velocity(add_noise(latents, noise, sigma), sigma)
    return mean_squared_error(predicted, velocity, predicted_frames, weights)


def mean_squared_error(
    predicted: Tensor,
    target: Tensor,
    predicted_frames: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor:
    """Weighted mean of the squared difference per clip, [B] float32; the arguments are those of the loss.

    The sum of weighted errors is divided by the sum of the weights: equal weights are no weights, and a small
    mask moves the LoRA as much as a large one. Weights that are all 0 give 0. Weights of exactly 1 give the
    unweighted result bit for bit.
    """
    error = (predicted.float() - target).square()
    if weights is not None:
        error = error * weights[:, None]
    if predicted_frames is None:
        mean = error.mean(dim=(1, 2, 3, 4))
        return mean if weights is None else mean / _not_zero(weights.mean(dim=(1, 2, 3)))
    counts = predicted_frames.to(error.dtype)
    mean = (error.mean(dim=(1, 3, 4)) * counts).sum(dim=1)
    if weights is not None:
        counts = counts * weights.mean(dim=(2, 3))
    return mean / (counts.sum(dim=1) if weights is None else _not_zero(counts.sum(dim=1)))


def _not_zero(total: Tensor) -> Tensor:
    return total.clamp_min(torch.finfo(total.dtype).tiny)
