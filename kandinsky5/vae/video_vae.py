"""Pixels to scaled latents and back: diffusers' HunyuanVideo VAE, called window by window.

Source: time windows and the scaling of the latents as in kandinskylab/kandinsky-5:kandinsky/models/vae.py.
diffusers' own framewise coding and tiling stay off: they append partial windows, which changes the last
latents of most clip lengths and the tiles at the borders.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dataset.geometry import FRAMES_PER_LATENT, PIXELS_PER_LATENT, round_frames
from kandinsky5.configs.vae import MIN_TILE_PX
from kandinsky5.vae.attention import FrameCausalMidBlock
from kandinsky5.vae.files import check_vae_file, read_vae, vae_fingerprint, vae_from_config
from kandinsky5.vae.tiles import TileGrid, Tiling, map_tiles, map_windows
from modules.errors import DataError
from modules.logs import get_logger

__all__ = [
    "MIN_TILE_PX",
    "VideoVAE",
    "check_vae_file",
    "load_vae",
    "pixels_to_uint8",
    "square_tiles",
    "uint8_to_pixels",
    "vae_fingerprint",
    "vae_from_config",
]

log = get_logger(__name__)

_FRAME_WINDOWS = Tiling(17, 8)
_LATENT_WINDOWS = Tiling(5, 2)
# What a later window adds once its first entry is dropped: 16 frames or 4 latents, half of them overlapping.
_KEPT_FRAMES = Tiling(16, 8)
_KEPT_LATENTS = Tiling(4, 2)
_TILE_OVERLAP_PX = 32
_FALLBACK_TILE_PX = 272
_LOGVAR_RANGE = (-30.0, 20.0)  # as diffusers' DiagonalGaussianDistribution


class VideoVAE:
    """A loaded VAE, without gradients: clips as pixels to the latents the DiT is trained on, and back."""

    def __init__(self, model: Any, fingerprint: str = "") -> None:
        """`model` is diffusers' `AutoencoderKLHunyuanVideo`; `fingerprint` identifies its weights."""
        model.requires_grad_(False).eval()
        model.encoder.mid_block = FrameCausalMidBlock(model.encoder.mid_block)
        model.decoder.mid_block = FrameCausalMidBlock(model.decoder.mid_block)
        self._model = model
        self.fingerprint = fingerprint
        self.scaling_factor: float = model.config.scaling_factor

    @property
    def dtype(self) -> torch.dtype:
        return self._model.quant_conv.weight.dtype

    @property
    def device(self) -> torch.device:
        return self._model.quant_conv.weight.device

    @property
    def weight_bytes(self) -> int:
        return sum(p.nbytes for p in self._model.parameters())

    def to(self, device: torch.device | str) -> VideoVAE:
        """Move the weights; returns itself."""
        self._model.to(device)
        return self

    def encode(
        self, pixels: Tensor, generators: Sequence[torch.Generator], *, tile_px: int | None = None
    ) -> Tensor:
        """Encode clips into the latents the DiT is trained on, one draw from the posterior each.

        Args:
            pixels: [B, 3, F_px, H_px, W_px], RGB in [-1, 1]; F_px = 4k + 1; H_px, W_px multiples of 8.
            generators: one on the CPU per clip, so that a draw depends neither on batch nor device.
            tile_px: tile side in pixels; None encodes frames whole. Tiles save memory, seams blur slightly.
        Returns:
            [B, 16, F, H, W], float32 on the VAE's device, already multiplied by the VAE's scaling factor.
        Raises:
            DataError: a size is not allowed.
        """
        mean, logvar = self.encode_moments(pixels, tiles=square_tiles(tile_px)).chunk(2, dim=1)
        std = torch.exp(0.5 * logvar.clamp(*_LOGVAR_RANGE))
        noise = [torch.randn(mean.shape[1:], generator=generator) for generator in generators]
        return (mean + std * torch.stack(noise).to(mean.device)) * self.scaling_factor

    @torch.no_grad()
    def encode_moments(self, pixels: Tensor, *, tiles: TileGrid | None = None) -> Tensor:
        """The posterior's mean and log-variance, unscaled.

        [B, 3, F_px, H_px, W_px] -> [B, 32, F, H, W] float32; `tiles` is in pixels.
        """
        _check_pixel_shape(pixels)
        latent_tiles = tiles.scaled(1, PIXELS_PER_LATENT) if tiles else None

        def encode_window(window: Tensor) -> Tensor:
            window = window.to(self.device, self.dtype)
            if tiles is None or latent_tiles is None:
                return self._encode_whole(window)
            return map_tiles(self._encode_whole, window, tiles, latent_tiles)

        return torch.cat(list(map_windows(encode_window, pixels, _FRAME_WINDOWS, _KEPT_LATENTS)), dim=2)

    def decode(self, latents: Tensor, *, tile_px: int | None = None) -> Tensor:
        """Scaled latents [B, 16, F, H, W] -> pixels [B, 3, 4F-3, 8H, 8W] float32, about [-1, 1]."""
        return torch.cat(list(self.decode_windows(latents, tiles=square_tiles(tile_px))), dim=2)

    @torch.no_grad()
    def decode_windows(self, latents: Tensor, *, tiles: TileGrid | None = None) -> Iterator[Tensor]:
        """`decode` in pieces of 8 to 17 frames, so that a long video is never in memory as floats as a whole.

        Yields [B, 3, frames, 8H, 8W] float32 in order. `tiles` is in pixels.
        """
        latent_tiles = tiles.scaled(1, PIXELS_PER_LATENT) if tiles else None

        def decode_window(window: Tensor) -> Tensor:
            window = (window.to(self.device).float() / self.scaling_factor).to(self.dtype)
            if tiles is None or latent_tiles is None:
                return self._decode_whole(window)
            return map_tiles(self._decode_whole, window, latent_tiles, tiles)

        yield from map_windows(decode_window, latents, _LATENT_WINDOWS, _KEPT_FRAMES)

    def _encode_whole(self, pixels: Tensor) -> Tensor:
        return self._model.quant_conv(self._model.encoder(pixels)).float()

    def _decode_whole(self, latents: Tensor) -> Tensor:
        return self._model.decoder(self._model.post_quant_conv(latents)).float()


def load_vae(path: Path, *, dtype: torch.dtype, device: torch.device | str) -> VideoVAE:
    """Load a VAE from a diffusers folder (itself or its `vae/`), a .safetensors or the original .pt file.

    Raises:
        ModelFileError: no usable file, or the tensors are not those of this VAE.
    """
    log.info("loading the VAE")
    model = read_vae(path, dtype=dtype, device=torch.device(device))
    return VideoVAE(model, vae_fingerprint(path))


def square_tiles(tile_px: int | None) -> TileGrid | None:
    """Tiles of about `tile_px` (rounded down to a multiple of 8, at least 64) that overlap by 32 pixels."""
    if tile_px is None:
        return None
    size = max(MIN_TILE_PX, tile_px // PIXELS_PER_LATENT * PIXELS_PER_LATENT)
    side = Tiling(size, size - _TILE_OVERLAP_PX)
    return TileGrid(side, side)


def encode_or_tile(
    vae: VideoVAE, pixels: Tensor, generators: Sequence[torch.Generator], *, tile_px: int | None
) -> Tensor:
    """`vae.encode`; if whole frames do not fit in GPU memory, retry with tiles, which is logged.

    Drawing starts after the encoder has run, so the second attempt makes the same draw.
    """
    try:
        return vae.encode(pixels, generators, tile_px=tile_px)
    except torch.OutOfMemoryError:
        if tile_px is not None:
            raise
    torch.cuda.empty_cache()
    log.warning(
        "frames of %d x %d do not fit into GPU memory whole; encoding them in tiles of %d pixels "
        "(--vae_spatial_tile_sample_min_size chooses another size, --batch_size 1 may avoid tiles)",
        pixels.shape[-1],
        pixels.shape[-2],
        _FALLBACK_TILE_PX,
    )
    return vae.encode(pixels, generators, tile_px=_FALLBACK_TILE_PX)


def uint8_to_pixels(frames: Tensor) -> Tensor:
    """uint8 [..., F_px, H_px, W_px, 3] -> float32 [..., 3, F_px, H_px, W_px] in [-1, 1]."""
    return frames.movedim(-1, -4).float() / 127.5 - 1


def pixels_to_uint8(pixels: Tensor) -> Tensor:
    """Pixels in [-1, 1] to uint8 of the same shape: clamped, then truncated as the official code does."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).to(torch.uint8)


def _check_pixel_shape(pixels: Tensor) -> None:
    num_frames, height, width = pixels.shape[2:]
    problems = []
    if num_frames % FRAMES_PER_LATENT != 1:
        lower = max(1, round_frames(num_frames))
        problems.append(f"{num_frames} frames cannot be encoded: 4k + 1 are needed, for example {lower}")
    if height % PIXELS_PER_LATENT or width % PIXELS_PER_LATENT or not height or not width:
        problems.append(
            f"frames of {width} x {height} cannot be encoded: both sides must be multiples of "
            f"{PIXELS_PER_LATENT}"
        )
    if problems:
        raise DataError(problems)
