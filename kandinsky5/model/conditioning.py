"""Builds the DiT's inputs: one function for training, samples and generation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from kandinsky5.model.dit import NUM_TIMESTEPS, BlockResidual, DiffusionTransformer3D
from kandinsky5.tasks import NablaParams
from modules.transfers import send

ConditioningForm = Literal["inference", "channels"]
"""How clean frames are passed to the model.

inference: in place of the noisy ones, as the official pipelines do.
channels: in the condition channels, beside noisy frames, as the official LoRA trainer does.
"""
ImageMode = Literal["first", "first_last"]


@dataclass(frozen=True, slots=True)
class TextConditioning:
    """Encoder outputs of one caption, without padding."""

    text_embeds: Tensor
    """[L, in_text_dim]."""
    pooled_embed: Tensor
    """[in_text_dim2]."""


@dataclass(frozen=True, slots=True)
class TextBatch:
    """The captions of a batch, padded to the longest."""

    text_embed: Tensor
    """[B, L, in_text_dim]."""
    pooled_text_embed: Tensor
    """[B, in_text_dim2]."""
    text_mask: Tensor | None
    """[B, L] bool, true for real tokens; None when all captions have the same length."""


@dataclass(frozen=True, slots=True)
class FrameConditioning:
    """Clean conditioning frames."""

    latents: Tensor
    """[B, 16, F, H, W], clean at the given frames and zero elsewhere."""
    frame_mask: Tensor
    """[B, F] bool, true at the given frames."""
    form: ConditioningForm = "inference"

    def predicted_frames(self) -> Tensor:
        """[B, F] bool: the frames whose velocity counts, in the loss and in the result."""
        return torch.ones_like(self.frame_mask) if self.form == "channels" else ~self.frame_mask

    def restore(self, latents: Tensor) -> Tensor:
        """Put the clean frames back into latents [B, 16, F, H, W]."""
        return torch.where(self._mask_bcfhw(), self.latents.to(latents.dtype), latents)

    def _mask_bcfhw(self) -> Tensor:
        return self.frame_mask[:, None, :, None, None]


def condition_frames(
    image_latents: Tensor,
    latent_frames: int,
    *,
    mode: ImageMode = "first",
    form: ConditioningForm = "inference",
    use: Tensor | None = None,
) -> FrameConditioning:
    """Condition on the first frame of each clip, or on its first and last.

    Args:
        image_latents: [B, 16, 2, H, W], encodes of the first and the last pixel frame, each on its own.
        latent_frames: F of the clips, at least 2: a single frame leaves nothing to predict.
        use: [B] bool, the clips that are conditioned at all; None means every one.
    """
    batch, channels, _, height, width = image_latents.shape
    latents = image_latents.new_zeros(batch, channels, latent_frames, height, width)
    mask = torch.zeros(batch, latent_frames, dtype=torch.bool, device=image_latents.device)
    latents[:, :, 0] = image_latents[:, :, 0]
    mask[:, 0] = True
    if mode == "first_last":
        latents[:, :, -1] = image_latents[:, :, 1]
        mask[:, -1] = True
    if use is not None:
        mask &= use[:, None]
        latents = latents * mask[:, None, :, None, None]
    return FrameConditioning(latents, mask, form)


def pad_text(
    captions: Sequence[TextConditioning], *, device: torch.device | str, dtype: torch.dtype
) -> TextBatch:
    """Stack captions of any lengths, padded on the right to the longest; no mask when none needs it."""
    lengths = [len(caption.text_embeds) for caption in captions]
    longest = max(lengths)
    padded = [
        F.pad(caption.text_embeds, (0, 0, 0, longest - length))
        for caption, length in zip(captions, lengths, strict=True)
    ]
    mask = None
    if min(lengths) != longest:
        mask = send(torch.arange(longest) < torch.tensor(lengths)[:, None], device)
    return TextBatch(
        send(torch.stack(padded), device).to(dtype),
        send(torch.stack([caption.pooled_embed for caption in captions]), device).to(dtype),
        mask,
    )


def build_model_input(noisy_latents: Tensor, frames: FrameConditioning | None, has_channels: bool) -> Tensor:
    """Latents with condition channels and mask, as the patch embedding takes them.

    Args:
        noisy_latents: [B, 16, F, H, W].
        frames: the clean frames given, None for text to video.
        has_channels: whether the model has condition channels and a mask.
    Returns:
        [B, F, H, W, 33], or 16 channels for models without conditioning.
    """
    if frames is not None and not has_channels:
        raise ValueError("this model has no condition channels: it cannot be conditioned on frames")
    noisy = noisy_latents
    condition = torch.zeros_like(noisy)
    mask = torch.zeros_like(noisy[:, :1])
    if frames is not None:
        mask = mask + frames.frame_mask[:, None, :, None, None].to(mask.dtype)
        if frames.form == "inference":
            noisy = frames.restore(noisy)
        else:
            condition = frames.latents.to(noisy.dtype)
    parts = [noisy, condition, mask] if has_channels else [noisy]
    return rearrange(torch.cat(parts, dim=1), "b c f h w -> b f h w c")


@dataclass(frozen=True, slots=True)
class VelocityModel:
    """The DiT with the settings of its task; call it to predict a velocity."""

    dit: DiffusionTransformer3D
    scale_factor: tuple[float, float, float]
    nabla: NablaParams | None = None
    runner: Callable[..., Tensor] | None = None
    """Called in place of the DiT: a trainable network around it, wrapped for several processes."""

    def __call__(
        self,
        noisy_latents: Tensor,
        sigma: Tensor,
        text: TextBatch,
        frames: FrameConditioning | None = None,
        residual: BlockResidual | None = None,
    ) -> Tensor:
        """Predict d(noisy_latents) / d(sigma).

        Args:
            noisy_latents: [B, 16, F, H, W].
            sigma: [B] in [0, 1], float32.
        Returns:
            [B, 16, F, H, W] in the DiT's compute dtype.
        """
        velocity = (self.runner or self.dit)(
            build_model_input(noisy_latents, frames, self.dit.dit_params.visual_cond),
            text.text_embed,
            text.pooled_text_embed,
            NUM_TIMESTEPS * sigma,
            scale_factor=self.scale_factor,
            text_mask=text.text_mask,
            nabla=self.nabla,
            residual=residual,
        )
        return rearrange(velocity, "b f h w c -> b c f h w")
