"""The options that cut the VAE's work into pieces, the same for caching and generation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from dataset.geometry import PIXELS_PER_LATENT
from kandinsky5.cli.common import positive_int
from kandinsky5.configs.caching import DEFAULT_TILE_PX, MIN_TILE_PX


def add_vae_tiling_options(add: Callable[..., Any], verb: str) -> None:
    """Add them through a group's `add_argument`; `verb` says what the tiles are for."""
    add("--vae_tiling", action="store_true", help=f"{verb} in spatial tiles of {DEFAULT_TILE_PX} pixels")
    add(
        "--vae_spatial_tile_sample_min_size",
        type=_tile_side,
        metavar="PX",
        help=f"side of the tiles, a multiple of {PIXELS_PER_LATENT}; implies --vae_tiling",
    )
    add(
        "--vae_chunk_size",
        type=positive_int,
        metavar="N",
        help="accepted; windows are the official 17 frames",
    )


def tile_px(args: argparse.Namespace) -> int | None:
    """The side of the tiles in pixels; None without tiles."""
    if args.vae_spatial_tile_sample_min_size is not None:
        return args.vae_spatial_tile_sample_min_size
    return DEFAULT_TILE_PX if args.vae_tiling else None


def _tile_side(word: str) -> int:
    side = int(word)
    if side < MIN_TILE_PX or side % PIXELS_PER_LATENT:
        raise argparse.ArgumentTypeError(
            f"must be a multiple of {PIXELS_PER_LATENT} from {MIN_TILE_PX} on, got {word}"
        )
    return side
