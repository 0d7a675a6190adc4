"""What became of the items of each dataset, as numbers and as the tables a training begins with."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from dataset.cache.names import Content
from dataset.sources import SkippedItem
from modules.logs import format_table


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetSummary:
    """What became of one dataset's items."""

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


def summary_table(summaries: Sequence[DatasetSummary]) -> str:
    """Items found, used and skipped by reason per dataset, then clips per bucket, as two text tables."""
    rows: list[list[object]] = []
    buckets: list[list[object]] = []
    for summary in summaries:
        reasons = Counter(entry.reason for entry in summary.skipped)
        skipped = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
        rows.append([
            summary.index,
            summary.content,
            summary.found,
            summary.used,
            summary.clips,
            summary.batches,
            skipped,
        ])
        buckets.extend([summary.index, label, count] for label, count in summary.buckets)
    headers = ["dataset", "content", "found", "used", "clips", "batches", "skipped"]
    return f"{format_table(headers, rows)}\n\n{format_table(['dataset', 'bucket', 'clips'], buckets)}"
