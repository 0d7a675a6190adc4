"""`--latent_path`: pixels from a latent file that an earlier run saved."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch

from dataset.geometry import pixel_frame_count
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.models import ModelLoader
from kandinsky5.generation.outputs import Content, OutputNames, read_latents, write_outputs
from kandinsky5.model.precision import check_vae
from kandinsky5.sampling.pipeline import decode_frames
from kandinsky5.vae.video_vae import check_vae_file
from modules.errors import ConfigError
from modules.logs import get_logger
from modules.parsing import whole_number

log = get_logger(__name__)


def decode_saved_latents(config: GenerateConfig, path: Path, device: torch.device) -> None:
    """Decode a latent file that an earlier run saved; no DiT and no text encoder is touched.

    Raises:
        ConfigError: the output type needs no decoding, or contradicts the number of frames.
        ModelFileError: the file or the VAE cannot be used.
        ResourceError: the device's libraries cannot compute the VAE.
    """
    if config.output.output_type == "latent":
        raise ConfigError("--latent_path decodes a latent: use --output_type video or images")
    latents, metadata = read_latents(path)
    check_vae(config.vae.vae_dtype, device)
    check_vae_file(config.models.vae)
    names = OutputNames(config.output, makes_many=False)
    seed = whole_number(metadata.get("seeds", "")) or 0
    num_frames = pixel_frame_count(latents.shape[2])
    problems = names.problems(num_frames)
    if problems:
        raise ConfigError(problems)
    if config.output.output_type in {"both", "latent_images"}:
        log.info("the latent is in %s already and is not written again", path)
    vae = ModelLoader(config, (), device, None).vae()
    frames = decode_frames(vae, latents, tile_px=config.vae.tile_px)
    content = Content(
        frames=frames[: len(frames) - config.output.trim_tail_frames],
        latents=None,
        fps=config.output.fps,
        crf=config.output.crf,
        metadata={} if config.output.no_metadata else metadata,
        latent_metadata={},
    )
    written = write_outputs(lambda: replace(names.paths(seed, num_frames), latent=None), content)
    for result in written:
        log.info("wrote %s", result)
