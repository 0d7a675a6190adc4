"""The small base, loaded as the scripts load it, to sample many prompts in one batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.model.checkpoints import load_dit
from kandinsky5.model.conditioning import (
    FrameConditioning,
    ImageMode,
    VelocityModel,
    condition_frames,
    pad_text,
)
from kandinsky5.model.flow_matching import flow_matching_loss
from kandinsky5.sampling.sampler import (
    GuidedVelocity,
    euler_sample,
    finish_image_to_video,
    initial_noise,
    sigma_schedule,
)
from kandinsky5.small_world.judge import judge
from kandinsky5.small_world.score import Shares
from kandinsky5.small_world.world import Scene, draw
from kandinsky5.tasks import Task, get_task
from kandinsky5.text.encoders import TextEncoders, load_text_encoders
from kandinsky5.vae.video_vae import VideoVAE, load_vae

TASK = get_task("k5-small-t2v")

PROMPTS = tuple(
    Scene(shape, colour, motion)
    for shape, colour, motion in (
        ("circle", "red", "left"),
        ("square", "blue", "up"),
        ("triangle", "green", "right"),
        ("circle", "yellow", "down"),
        ("square", "purple", "grows"),
        ("triangle", "cyan", "shrinks"),
        ("circle", "blue", "still"),
        ("square", "red", "right"),
        ("triangle", "yellow", "up"),
        ("circle", "green", "shrinks"),
    )
)
"""Ten scenes with every shape, colour and motion of the base; chosen before anything was generated."""


@dataclass(frozen=True, slots=True)
class SmallBase:
    """DiT, VAE and encoders in float32 on the CPU."""

    dit: Any
    vae: VideoVAE
    encoders: TextEncoders

    @classmethod
    def load(cls, task: Task = TASK, dit_path: Path | None = None) -> SmallBase:
        """From the files of a task; `dit_path` replaces its DiT."""
        dit = load_dit(
            dit_path or task.dit_path,
            task.dit_params,
            device=torch.device("cpu"),
            compute_dtype=torch.float32,
        )
        config = TextEncodersConfig(
            text_encoder_qwen=str(task.text_encoder_qwen_path),
            text_encoder_clip=str(task.text_encoder_clip_path),
        )
        encoders = load_text_encoders(config, device="cpu", dtype=torch.bfloat16)
        return cls(dit, load_vae(task.vae_path, dtype=torch.float32, device="cpu"), encoders)


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How clips are sampled; the defaults are the task's."""

    steps: int = TASK.steps
    guidance: float = TASK.guidance
    shift: float = TASK.scheduler_scale
    latent_frames: int = 5


@cache
def small_base() -> SmallBase:
    """Loaded once for all tests."""
    return SmallBase.load()


@torch.no_grad()
def sample(
    base: SmallBase,
    scenes: Sequence[Scene],
    seeds: Sequence[int],
    sampling: Sampling | None = None,
    *,
    images: Tensor | None = None,
    image_mode: ImageMode = "first",
) -> Tensor:
    """One clip per scene and seed, [B, 3, F, 64, 64], all in one batch.

    Args:
        images: [B, 3, 2, 64, 64], the first and the last frame, for image to video.
    """
    how = sampling or Sampling()
    content = "image" if how.latent_frames == 1 else "video"
    shape = (16, how.latent_frames, 8, 8)
    noise = torch.cat([initial_noise(seed, shape, device="cpu", generator_device="cpu") for seed in seeds])
    captions = base.encoders.encode([scene.caption() for scene in scenes], content)
    negative = base.encoders.encode([base.encoders.templates.negative_prompt], content) * len(scenes)
    frames = None
    if images is not None:
        frames = _given_frames(base, images, how.latent_frames, image_mode)
    velocity = GuidedVelocity(
        VelocityModel(base.dit, TASK.scale_factor),
        pad_text(captions, device="cpu", dtype=torch.float32),
        pad_text(negative, device="cpu", dtype=torch.float32),
        how.guidance,
        frames,
    )
    sampled = euler_sample(velocity, noise, sigma_schedule(how.steps, how.shift), frames=frames)
    if frames is not None:
        sampled = finish_image_to_video(sampled, frames)
    return torch.cat([base.vae.decode(part) for part in sampled.split(8)]).clamp(-1, 1)


def _given_frames(base: SmallBase, images: Tensor, latent_frames: int, mode: ImageMode) -> FrameConditioning:
    """images [B, 3, 2, 64, 64], first and last -> what the model is given of them."""
    ends = [base.vae.encode_moments(images[:, :, i : i + 1])[:, :16] for i in (0, 1)]
    latents = torch.cat(ends, dim=2) * base.vae.scaling_factor
    return condition_frames(latents, latent_frames, mode=mode)


def shares(scenes: Sequence[Scene], clips: Tensor) -> Shares:
    """The shares of clips that show their scene."""
    return Shares.of_verdicts(scenes, [judge(clip) for clip in clips])


@cache
def _drawn_clips() -> tuple[Tensor, Tensor]:
    """A clip of each of `PROMPTS`, and their latents."""
    clips, vae = draw(PROMPTS, torch.Generator().manual_seed(0)), small_base().vae
    return clips, vae.encode_moments(clips)[:, :16] * vae.scaling_factor


@torch.no_grad()
def velocity_error(base: SmallBase, *, sigma: float = 0.9, with_image: bool = False) -> float:
    """The mean loss over drawn clips of `PROMPTS` on fixed noise, where the caption decides much.

    Args:
        with_image: with the first frame given.
    """
    clips, latents = _drawn_clips()
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(1))
    captions = base.encoders.encode([scene.caption() for scene in PROMPTS], "video")
    text = pad_text(captions, device="cpu", dtype=torch.float32)
    frames = _given_frames(base, clips[:, :, [0, -1]], latents.shape[2], "first") if with_image else None
    model = VelocityModel(base.dit, TASK.scale_factor)
    losses = flow_matching_loss(
        lambda noisy, levels: model(noisy, levels, text, frames),
        latents,
        noise,
        torch.full((len(PROMPTS),), sigma),
        None if frames is None else frames.predicted_frames(),
    )
    return float(losses.mean())
