"""One clip from its request, stage by stage, with loaded models.

Generation and the samples while training both go through here: prompts to embeddings, images to latents,
noise to latents, latents to frames.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from kandinsky5.model.conditioning import TextConditioning, VelocityModel, condition_frames, pad_text
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.magcache import MagCache
from kandinsky5.model.modulation_table import ModulationTable
from kandinsky5.sampling.images import image_pixels
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.sampling.sampler import (
    GuidedVelocity,
    StepCallback,
    euler_sample,
    finish_image_to_video,
    initial_noise,
    sigma_schedule,
    uses_guidance,
)
from kandinsky5.tasks import NablaParams, Task
from kandinsky5.text.encoders import TextEncoders
from kandinsky5.vae.video_vae import MIN_TILE_PX, VideoVAE, pixels_to_uint8, square_tiles
from modules.dtypes import dtype_name
from modules.errors import DivergedError, ResourceError
from modules.logs import get_logger
from modules.seeding import generator_for

log = get_logger(__name__)

_FIRST_FALLBACK_TILE_PX = 512


@dataclass(frozen=True, slots=True)
class RequestText:
    """What the encoders made of a request's prompts."""

    positive: TextConditioning
    negative: TextConditioning | None
    """None when guidance is 1 and no second pass is run."""


@dataclass(frozen=True, slots=True)
class ClipInputs:
    """A request with its encoded prompts and images."""

    request: VideoRequest
    text: RequestText
    image_latents: Tensor | None
    """What `encode_images` returned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplerSettings:
    """The sampler settings of a run, and the MagCache of one clip."""

    task: Task
    nabla: NablaParams | None
    device: torch.device
    noise_device: torch.device
    """"cpu" gives the same noise on every device."""
    magcache: MagCache | None = None
    """Built for one clip's steps and guidance; None runs all blocks."""


def full_prompt(request: VideoRequest) -> str:
    """The prompt with the trigger words of the LoRAs before it."""
    return " ".join([*(trigger.strip() for trigger in request.triggers), request.prompt]).strip()


def encode_prompts(encoders: TextEncoders, requests: Sequence[VideoRequest]) -> list[RequestText]:
    """Encode the prompts of all requests, each different text once and by itself.

    One text at a time: a caption's embedding must not depend on its neighbours, to the last bit.

    Returns:
        One entry per request, tensors on the CPU.
    """
    known: dict[tuple[str, str], TextConditioning] = {}

    def encode(text: str, request: VideoRequest) -> TextConditioning:
        key = (text, request.content)
        if key not in known:
            known[key] = encoders.encode([text], request.content)[0]
        return known[key]

    return [
        RequestText(
            encode(full_prompt(request), request),
            encode(request.negative_prompt, request) if uses_guidance(request.guidance) else None,
        )
        for request in requests
    ]


def encode_images(vae: VideoVAE, request: VideoRequest, *, tile_px: int | None = None) -> Tensor | None:
    """Encode the conditioning images of a request, each as a clip of one frame.

    Returns:
        [1, 16, 2, H, W] float32 on the CPU (the second is zero without a last image), or None without images.
    """
    if request.image is None:
        return None
    latents = [_encode_image(vae, request, 0, tile_px)]
    latents.append(
        torch.zeros_like(latents[0])
        if request.image_last is None
        else _encode_image(vae, request, 1, tile_px)
    )
    return torch.cat(latents, dim=2)


def _encode_image(vae: VideoVAE, request: VideoRequest, index: int, tile_px: int | None) -> Tensor:
    path = (request.image, request.image_last)[index]
    assert path is not None
    # The last image takes the first one's size: it is cut, never squeezed.
    crop = request.has_own_size or index == 1
    pixels = image_pixels(path, request.height, request.width, crop=crop)
    generator = generator_for(request.seed, "image", index)
    return vae.encode(pixels, [generator], tile_px=tile_px).cpu()


def sample_latents(
    dit: DiffusionTransformer3D,
    inputs: ClipInputs,
    settings: SamplerSettings,
    *,
    on_step: StepCallback | None = None,
) -> Tensor:
    """Run the sampler for one request.

    Args:
        on_step: called after every step.
    Returns:
        [1, 16, F, H, W] float32 on the device of the settings.
    Raises:
        DivergedError: the latents are no longer finite; the message names the step.
    """
    request, text, device = inputs.request, inputs.text, settings.device
    frames = None
    if inputs.image_latents is not None:
        mode = "first" if request.image_last is None else "first_last"
        frames = condition_frames(inputs.image_latents.to(device), request.latent_shape[1], mode=mode)
    batches = [
        None if one is None else pad_text([one], device=device, dtype=dit.compute_dtype)
        for one in (text.positive, text.negative)
    ]
    assert batches[0] is not None
    schedule = sigma_schedule(request.steps, request.scheduler_scale)
    pooled = [batch.pooled_text_embed for batch in batches if batch is not None]

    def after_step(step: int, latents: Tensor) -> None:
        _check_finite(latents, step, request)
        if on_step is not None:
            on_step(step, latents)

    noise = initial_noise(
        request.seed, request.latent_shape, device=device, generator_device=settings.noise_device
    )
    with torch.no_grad():
        velocity = GuidedVelocity(
            VelocityModel(dit, settings.task.scale_factor, settings.nabla),
            batches[0],
            batches[1],
            request.guidance,
            frames,
            settings.magcache,
            ModulationTable(dit, schedule[:-1], pooled, device),
        )
        latents = euler_sample(velocity, noise, schedule, frames=frames, on_step=after_step)
        return latents if frames is None else finish_image_to_video(latents, frames)


def _check_finite(latents: Tensor, step: int, request: VideoRequest) -> None:
    # Waits for the device once per step, which takes seconds anyway, and saves all steps after a bad one.
    if not bool(torch.isfinite(latents).all()):
        raise DivergedError(
            f"step {step} of {request.steps} gave latents that are not finite; try --dtype bfloat16 or "
            "float32, a smaller --guidance or --lora_multiplier"
        )


def decode_frames(vae: VideoVAE, latents: Tensor, *, tile_px: int | None = None) -> np.ndarray:
    """Decode latents [1, 16, F, H, W] into frames uint8 [F_px, H_px, W_px, 3] on the CPU.

    When device memory runs out, decoding is retried with smaller and smaller spatial tiles, which is
    logged; tiles blur seams slightly.

    Raises:
        ResourceError: not even the smallest tiles fit, or the VAE overflows in its dtype.
    """
    while True:
        try:
            return decode_at_tile_size(vae, latents, tile_px)
        except torch.OutOfMemoryError as error:
            smaller = _FIRST_FALLBACK_TILE_PX if tile_px is None else tile_px // 2
            if smaller < MIN_TILE_PX:
                raise ResourceError(
                    f"the VAE ran out of memory even with tiles of {tile_px} pixels; "
                    "try --vae_dtype float16, close other programs on the device, "
                    "or decode later with --latent_path"
                ) from error
        log.warning("the VAE ran out of memory: decoding again in tiles of %d pixels", smaller)
        tile_px = smaller
        if vae.device.type == "cuda":
            torch.cuda.empty_cache()


def decode_at_tile_size(vae: VideoVAE, latents: Tensor, tile_px: int | None) -> np.ndarray:
    """Decode once, without a fallback; see `decode_frames`."""
    pieces = []
    for pixels in vae.decode_windows(latents, tiles=square_tiles(tile_px)):
        if not bool(torch.isfinite(pixels).all()):
            raise ResourceError(
                f"decoding in {dtype_name(vae.dtype)} gave pixels that are not finite: "
                "use --vae_dtype float32"
            )
        pieces.append(rearrange(pixels_to_uint8(pixels), "1 c f h w -> f h w c").cpu())
    return torch.cat(pieces).numpy()
