"""VAE options shared by several commands."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from dataset.geometry import PIXELS_PER_LATENT
from kandinsky5.configs.weights import DTYPES
from modules.options import ignored_option, option, positive_int

MIN_TILE_PX = 64
DEFAULT_TILE_PX = 256
VAE_CHUNK_SIZE = {
    "vae_chunk_size": ignored_option(
        "the VAE always uses windows of 17 frames, like the official code", default=None, read=positive_int
    )
}


def vae_dtype_option(**more: Any) -> Any:
    """`--vae_dtype`; the field is the name of a dtype, or None."""
    return option(None, "dtype of the VAE (default: float16; float32 on a CPU)", choices=DTYPES, **more)


def _tile_side(word: str) -> int:
    side = positive_int(word)
    if side < MIN_TILE_PX or side % PIXELS_PER_LATENT:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {PIXELS_PER_LATENT}, at least {MIN_TILE_PX}, got {word}"
        )
    return side


@dataclass(frozen=True, kw_only=True, slots=True)
class TilingOptions:
    """Spatial tiles for encoding and decoding, which save memory."""

    vae_tiling: bool = option(False, f"encode and decode in spatial tiles of {DEFAULT_TILE_PX} pixels")
    vae_spatial_tile_sample_min_size: int | None = option(
        None,
        f"side of the tiles in pixels, a multiple of {PIXELS_PER_LATENT}; implies --vae_tiling",
        _tile_side,
    )

    @property
    def tile_px(self) -> int | None:
        """Side of the tiles in pixels; None without tiles."""
        if self.vae_spatial_tile_sample_min_size is not None:
            return self.vae_spatial_tile_sample_min_size
        return DEFAULT_TILE_PX if self.vae_tiling else None
