"""The cache of a clip's mask: loss weights per latent position, in a file beside the latents."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataset.cache.files import (
    CacheMeta,
    checked_header,
    read_cached,
    written_metadata,
)
from modules.errors import CacheError, NewerCacheError
from modules.tensor_files import TensorFileHeader, write_tensors

if TYPE_CHECKING:  # training reads caches and needs no media libraries
    from dataset.clips import PlannedClip


@dataclass(frozen=True, kw_only=True, slots=True)
class MaskCacheMeta(CacheMeta):
    """Everything that a mask cache depends on."""

    width: int
    height: int
    """Pixels that are encoded."""
    frames: str
    """A hash of the source's frame numbers."""
    mask_fingerprint: str


def mask_meta(clip: PlannedClip) -> MaskCacheMeta:
    """Metadata that an up-to-date mask cache of this clip has; requires a clip with a mask."""
    assert clip.mask is not None
    numbers = ",".join(map(str, clip.frame_numbers))
    return MaskCacheMeta(
        width=clip.crop[0],
        height=clip.crop[1],
        frames=f"{clip.num_frames}-{hashlib.sha256(numbers.encode()).hexdigest()[:16]}",
        mask_fingerprint=clip.mask.fingerprint,
    )


def mask_cache_problem(path: Path, expected: MaskCacheMeta) -> str | None:
    """Reason to (re)build the mask cache at `path`; None if it is complete and up to date.

    Raises:
        NewerCacheError: it was made by a newer version of this program.
    """
    if not path.is_file():
        return "no file"
    try:
        _key_and_shape(path)
    except NewerCacheError:
        raise
    except CacheError as error:
        return str(error)
    return expected.difference(checked_header(path)[0].metadata)


def inspect_mask_cache(path: Path) -> tuple[tuple[int, int, int], TensorFileHeader]:
    """The shape (latent_frames, latent_height, latent_width) of a mask cache, and its header.

    Raises:
        CacheError: it is damaged or foreign.
    """
    return _key_and_shape(path)[1], checked_header(path)[0]


def _key_and_shape(path: Path) -> tuple[str, tuple[int, int, int]]:
    header, _ = checked_header(path)
    keys = [key for key in header.tensors if key.startswith("loss_mask_")]
    shape = header.tensors[keys[0]].shape if keys else ()
    if len(keys) != 1 or len(shape) != 3:
        raise CacheError(f"{path}: holds no mask of a clip")
    return keys[0], (shape[0], shape[1], shape[2])


def write_mask_cache(path: Path, weights: Tensor, meta: MaskCacheMeta) -> None:
    """Write one mask cache as a whole file; weights [F, H, W] within 0 .. 1."""
    shape = "x".join(map(str, weights.shape))
    tensors = {f"loss_mask_{shape}_float32": weights.to(torch.float32).contiguous()}
    write_tensors(path, tensors, written_metadata(meta))


def read_mask_cache(path: Path) -> Tensor:
    """Read a mask: [F, H, W], float32 within 0 .. 1.

    Raises:
        CacheError: it is damaged or foreign.
    """
    (weights,) = read_cached(path, _key_and_shape(path)[0])
    return weights.float()
