"""From noise to latents: schedule, guidance, Euler steps, and what image-to-video adds.

Source: kandinskylab/kandinsky-5:kandinsky/generation_utils.py; latents stay in float32 between steps.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import torch
from einops import rearrange
from torch import Tensor

from kandinsky5.model.conditioning import FrameConditioning, TextBatch, VelocityModel
from kandinsky5.model.flow_matching import VelocityFn
from kandinsky5.model.magcache import MagCache
from kandinsky5.model.modulation_table import ModulationTable

StepCallback = Callable[[int, Tensor], None]
"""(number of finished steps, latents [B, 16, F, H, W]) -> None."""

NORMALISED_FRAMES = 4
REFERENCE_FRAMES = 5
_MEAN_RANGE = (-0.05, 0.1)
_STD_RANGE = (-0.1, 0.25)
"""Limit on shifting the first frames' mean and deviation towards the reference's."""


def sigma_schedule(num_steps: int, shift: float) -> Tensor:
    """num_steps + 1 sigmas from 1 to 0, denser near 1 for a shift above 1; float32 on the CPU."""
    uniform = torch.linspace(1, 0, num_steps + 1, dtype=torch.float32)
    return shift * uniform / (1 + (shift - 1) * uniform)


def initial_noise(
    seed: int,
    latent_shape: tuple[int, int, int, int],
    *,
    device: torch.device | str,
    generator_device: torch.device | str,
) -> Tensor:
    """The official starting noise: one bfloat16 draw in [F, H, W, 16] layout.

    Args:
        latent_shape: (16, F, H, W).
        generator_device: where the draw happens; the same seed gives other numbers on another kind of device.
    Returns:
        [1, 16, F, H, W] float32 on `device`.
    """
    channels, frames, height, width = latent_shape
    generator = torch.Generator(device=generator_device).manual_seed(seed)
    noise = torch.randn(
        frames, height, width, channels, generator=generator, device=generator_device, dtype=torch.bfloat16
    )
    return rearrange(noise, "f h w c -> 1 c f h w").to(device, torch.float32)


def euler_sample(
    predict_velocity: VelocityFn,
    noise: Tensor,
    schedule: Tensor,
    *,
    frames: FrameConditioning | None = None,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Integrate the velocity from sigma 1 to 0.

    Args:
        noise: [B, 16, F, H, W] float32.
        schedule: [steps + 1] decreasing sigmas.
        frames: clean frames, put back before every step; `finish_image_to_video` does it after the last.
    Returns:
        [B, 16, F, H, W] float32.
    """
    latents = noise
    sigmas = schedule.to(noise.device)
    for step, (sigma, next_sigma) in enumerate(pairwise(sigmas), start=1):
        if frames is not None:
            latents = frames.restore(latents)
        velocity = predict_velocity(latents, sigma.expand(len(latents)))
        latents = latents + (next_sigma - sigma) * velocity.float()
        if on_step is not None:
            on_step(step, latents)
    return latents


@dataclass(frozen=True, slots=True)
class GuidedVelocity:
    """The model with classifier-free guidance; one pass per step when the guidance weight is 1."""

    model: VelocityModel
    text: TextBatch
    negative_text: TextBatch | None
    guidance: float
    frames: FrameConditioning | None = None
    magcache: MagCache | None = None
    modulation: ModulationTable | None = None
    """Made for the steps and captions of this run; None computes modulation in every pass."""

    def __call__(self, noisy_latents: Tensor, sigma: Tensor) -> Tensor:
        """(noisy_latents [B, 16, F, H, W], sigma [B]) -> guided velocity [B, 16, F, H, W]."""
        conditional = self._pass(noisy_latents, sigma, self.text)
        if not uses_guidance(self.guidance):
            return conditional
        if self.negative_text is None:
            raise ValueError(f"guidance {self.guidance} needs a negative prompt")
        unconditional = self._pass(noisy_latents, sigma, self.negative_text)
        return unconditional + self.guidance * (conditional - unconditional)

    def _pass(self, noisy_latents: Tensor, sigma: Tensor, text: TextBatch) -> Tensor:
        residual = None if self.magcache is None else self.magcache.next_pass()
        with nullcontext() if self.modulation is None else self.modulation.next_pass():
            return self.model(noisy_latents, sigma, text, self.frames, residual)


def uses_guidance(guidance: float) -> bool:
    """Whether the second pass is run."""
    return abs(guidance - 1.0) > 1e-6


def normalise_first_frames(latents: Tensor) -> Tensor:
    """Move each of the first four latent frames of an image-to-video clip towards the next five.

    latents [B, 16, F, H, W] -> the same shape. Mean and unbiased deviation run over channels and positions.
    Clips below five latent frames have no reference frames and are returned unchanged.
    """
    if latents.shape[2] <= NORMALISED_FRAMES:
        return latents
    source = latents[:, :, :NORMALISED_FRAMES]
    reference = latents[:, :, NORMALISED_FRAMES : NORMALISED_FRAMES + REFERENCE_FRAMES]
    mean = source.mean(dim=(1, 3, 4), keepdim=True)
    std = source.std(dim=(1, 3, 4), keepdim=True)
    target_mean = reference.mean(dim=(1, 2, 3, 4), keepdim=True)
    target_std = reference.std(dim=(1, 2, 3, 4), keepdim=True)
    target_mean = target_mean.clamp(mean + _MEAN_RANGE[0], mean + _MEAN_RANGE[1])
    target_std = target_std.clamp(std + _STD_RANGE[0], std + _STD_RANGE[1])
    normalised = (source - mean) / std * target_std + target_mean
    return torch.cat([normalised, latents[:, :, NORMALISED_FRAMES:]], dim=2)


def finish_image_to_video(latents: Tensor, frames: FrameConditioning) -> Tensor:
    """Post-process latents as the official pipeline does: given frames restored, first ones normalised."""
    return normalise_first_frames(frames.restore(latents))
