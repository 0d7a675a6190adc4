"""Builds and parses cache file names.

The names are musubi-tuner's, so that its caches and ours can share a folder. For an image the size in
the name is that of the source; for a video it is the bucket's.
"""

from __future__ import annotations

import hashlib
import re
import sys
import unicodedata
from dataclasses import dataclass

from dataset.media.files import Content

LATENT_SUFFIX = "_k5.safetensors"
MASK_SUFFIX = "_k5_mask.safetensors"
TEXT_SUFFIX = "_k5_te.safetensors"
PREVIEW_FOLDER = "k5_preview"
"""Beside the caches: clips to look at, which are no media of a dataset."""

_MAX_BASE_BYTES = 200
"""File systems allow 255: the rest is for suffixes up to `_SSSSSSSS-FFFFFF_WWWWWxHHHHH_k5.safetensors`."""

_LATENT_NAME = re.compile(
    r"(?P<base>.+?)(?:_(?P<start>\d{5,})-(?P<frames>\d{3,})(?:-\d+)?)?_(?P<width>\d{4,})x(?P<height>\d{4,})"
    + re.escape(LATENT_SUFFIX),
    re.DOTALL,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentName:
    """The parts of the name of a latent cache."""

    base_name: str
    """As in the name: shortened when the media's own name is very long."""
    start: int | None
    num_frames: int | None
    """First frame and number of pixel frames; None for an image."""
    width: int
    height: int


def cache_base_name(base_name: str) -> str:
    """The item's part of its cache names: the base name, or for a very long one its start and a hash."""
    raw = base_name.encode("utf-8", "surrogatepass")
    if len(raw) <= _MAX_BASE_BYTES:
        return base_name
    digest = hashlib.sha256(raw).hexdigest()[:16]
    return raw[: _MAX_BASE_BYTES - 17].decode("utf-8", "ignore") + "~" + digest


def image_cache_name(base_name: str, width: int, height: int) -> str:
    """The latent cache of an image; width and height are the source's, upright."""
    return f"{cache_base_name(base_name)}_{width:04d}x{height:04d}{LATENT_SUFFIX}"


def video_cache_name(base_name: str, start: int, num_frames: int, width: int, height: int) -> str:
    """The latent cache of a cut; width and height are the bucket's."""
    cut = f"{start:05d}-{num_frames:03d}"
    return f"{cache_base_name(base_name)}_{cut}_{width:04d}x{height:04d}{LATENT_SUFFIX}"


def text_cache_name(base_name: str) -> str:
    """The text cache of an item: one for all cuts of a video."""
    return f"{cache_base_name(base_name)}{TEXT_SUFFIX}"


def mask_cache_name(latent_name: str) -> str:
    """The mask cache that belongs to a latent cache."""
    return latent_name.removesuffix(LATENT_SUFFIX) + MASK_SUFFIX


def empty_text_cache_name(content: Content) -> str:
    """The text cache of the empty caption, which caption dropout swaps in."""
    return f"k5_empty_{content}.safetensors"


def prior_text_cache_name(content: Content) -> str:
    """The text cache of a dataset's `prior_caption`."""
    return f"k5_prior_{content}.safetensors"


def parse_latent_name(name: str, content: Content) -> LatentName | None:
    """Parse the name of a latent cache; None if it does not belong to a dataset of this content."""
    match = _LATENT_NAME.fullmatch(name)
    if match is None:
        return None
    base, start, frames = match["base"], match["start"], match["frames"]
    if content == "video" and start is None:
        return None
    if content == "image" and start is not None:
        # An image may be called `a_00000-001`: for an image dataset all of it is the base name.
        base = name.removesuffix(LATENT_SUFFIX).rpartition("_")[0]
        start = frames = None
    return LatentName(
        base_name=base,
        start=None if start is None else int(start),
        num_frames=None if frames is None else int(frames),
        width=int(match["width"]),
        height=int(match["height"]),
    )


def name_key(name: str) -> str:
    """Equal for names that are one file on this system: Windows and macOS ignore upper and lower case.

    Accents are coded in two ways, which look alike everywhere.
    """
    composed = unicodedata.normalize("NFC", name)
    if sys.platform not in ("win32", "darwin"):
        return composed
    return unicodedata.normalize("NFC", composed.casefold())
