"""The clips that a run is trained on, with their cache files, and the tables that summarise them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dataset.config.config import AnyDatasetConfig
from dataset.geometry import pixel_size, size_label
from dataset.media.files import Content
from dataset.sources.items import SkippedItem
from modules.logs import format_table


@dataclass(frozen=True, kw_only=True, slots=True)
class CachedItem:
    """One clip or image with its two cache files."""

    key: str
    """Dataset number and clip, without any folder: the same on every machine."""
    source: str
    """Base name of the media file, which all its cuts share, in all datasets."""
    dataset_index: int
    content: Content
    """Of the dataset, which decides how its cache names are read."""
    latent_path: Path
    text_path: Path
    num_captions: int
    """Held by `text_path`; one is drawn each time."""
    empty_text_path: Path
    """The cache of the empty caption, for caption dropout."""
    num_frames: int
    """Pixel frames."""
    shape: tuple[int, int, int]
    """(latent_frames, latent_height, latent_width)."""
    mask_path: Path | None = None
    """The cache of its mask; None where it has none, and where masks are not used."""
    prior_text_path: Path | None = None
    """The cache of the caption that its prior term takes; None where it has no such term or takes its own."""
    latent_origin: str = ""
    text_origin: str = ""
    mask_origin: str = ""
    """What the caches were made from, see `cache_origin`."""

    @property
    def bucket(self) -> str:
        """Width x height x frames in pixels."""
        return size_label(*pixel_size(*self.shape[1:]), self.num_frames)


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """Counts of used and skipped items of a dataset, with reasons."""

    index: int
    content: Content
    found: int
    """Media items that the cache scripts saw."""
    used: int
    """Media items with both caches."""
    clips: int
    """Clips cut from them."""
    skipped: tuple[SkippedItem, ...]
    buckets: tuple[tuple[str, int], ...]
    """("width x height x frames", clips without repeats)."""
    batches: int
    """Batches per epoch."""


def summarise(
    dataset: AnyDatasetConfig, items: Sequence[CachedItem], skipped: Sequence[SkippedItem]
) -> DatasetSummary:
    """The summary of a dataset of which `items` are used."""
    buckets = Counter(item.bucket for item in items)
    used = len({item.source for item in items})
    return DatasetSummary(
        index=dataset.index,
        content=dataset.content,
        found=used + len(skipped),
        used=used,
        clips=len(items),
        skipped=tuple(skipped),
        buckets=tuple(sorted(buckets.items())),
        batches=sum(-(-count * dataset.num_repeats // dataset.batch_size) for count in buckets.values()),
    )


def reasons_in_short(skipped: Sequence[SkippedItem]) -> str:
    """How many items were skipped for each reason: "2 no caption, 1 too short"."""
    reasons = Counter(entry.reason for entry in skipped)
    return ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items()))


def summary_table(summaries: Sequence[DatasetSummary]) -> str:
    """Items found, used and skipped by reason per dataset, then clips per bucket, as two text tables."""
    rows: list[list[object]] = []
    buckets: list[list[object]] = []
    for summary in summaries:
        rows.append([
            summary.index,
            summary.content,
            summary.found,
            summary.used,
            summary.clips,
            summary.batches,
            reasons_in_short(summary.skipped) or "none",
        ])
        buckets.extend([summary.index, label, count] for label, count in summary.buckets)
    headers = ["dataset", "content", "found", "used", "clips", "batches", "skipped"]
    return f"{format_table(headers, rows)}\n\n{format_table(['dataset', 'bucket', 'clips'], buckets)}"
