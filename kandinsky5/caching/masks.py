"""Writes the mask caches of a dataset: no encoder is required, and cached latents stay unchanged."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from torch import Tensor

from dataset.cache.mask_cache import MaskCacheMeta, mask_cache_problem, mask_meta, write_mask_cache
from dataset.cache.names import mask_cache_name
from dataset.clips import PlannedClip
from dataset.config.config import AnyDatasetConfig
from dataset.media.masks import latent_mask
from dataset.media.media import MediaError
from dataset.sources.items import SkippedItem, SourceListing
from kandinsky5.caching.report import CONTINUE_HINT, Outcome
from kandinsky5.configs.caching import CacheRunConfig
from modules.files import disk_errors
from modules.logs import get_logger
from modules.messages import counted, names_in_short

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class MaskWork:
    """One dataset's masks, or this process's share of them."""

    outcome: Outcome
    clips: Sequence[PlannedClip]


def mask_notes(dataset: AnyDatasetConfig, listing: SourceListing) -> Iterator[str]:
    """Log lines on missing and unmatched masks."""
    folder, kind = dataset.mask_directory, dataset.content
    without = [item.name for item in listing.items if item.mask_path is None]
    if folder is not None and without:
        yield (
            f"dataset {dataset.index}: {len(without)} of {len(listing.items)} {kind}s have no mask in "
            f"{folder} and count everywhere: {names_in_short(without)}"
        )
    masks = listing.unmatched_masks
    if masks:
        yield (
            f"dataset {dataset.index}: {counted(len(masks), 'mask')} in {folder} without a {kind} of the "
            f"same name: {names_in_short(masks)}"
        )


def write_masks(work: MaskWork, run: CacheRunConfig) -> None:
    """Create missing and outdated mask caches; without --skip_existing all of them.

    Damaged masks go to the outcome's skipped items: their clips are then not trained on.
    """
    folder = work.outcome.dataset.cache_directory
    stale: list[tuple[PlannedClip, MaskCacheMeta]] = []
    for clip in work.clips:
        if clip.mask is None:
            continue
        meta = mask_meta(clip)
        path = folder / mask_cache_name(clip.cache_name)
        if not run.skip_existing or mask_cache_problem(path, meta) is not None:
            stale.append((clip, meta))
    black = []
    with ThreadPoolExecutor(run.num_workers) as pool:
        masks = pool.map(_load, (clip for clip, _ in stale))
        for (clip, meta), weights in zip(stale, masks, strict=True):
            if isinstance(weights, SkippedItem):
                work.outcome.skipped.append(weights)
                continue
            with disk_errors(folder, CONTINUE_HINT):
                write_mask_cache(folder / mask_cache_name(clip.cache_name), weights, meta)
            work.outcome.encoded += 1
            black += [] if weights.any() else [clip.item_key]
    if black:
        log.warning(
            "dataset %d: %s black throughout, so the masked loss learns nothing from it without "
            "--mask_min_weight: %s",
            work.outcome.dataset.index, counted(len(black), "mask is", "masks are"), names_in_short(black),
        )  # fmt: skip


def _load(clip: PlannedClip) -> Tensor | SkippedItem:
    assert clip.mask is not None
    try:
        return latent_mask(clip.mask, clip.frame_numbers, clip.crop)
    except MediaError as error:
        item, reason = clip.item, f"mask {error.reason}"
        return SkippedItem(name=item.name, reason=reason, detail=error.detail, is_failure=True, key=item.key)
