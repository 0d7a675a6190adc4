"""`--check` of the cache scripts: everything that can be known of a dataset without an encoder.

The findings of a clip stand in the report and on the page of `--preview` alike.
"""

from __future__ import annotations

import hashlib
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from tqdm import tqdm

from dataset.clip_notes import rate_remark
from dataset.clips import ClipPlan, PlannedClip, cut_batches, load_batches
from dataset.config.config import AnyDatasetConfig
from dataset.geometry import LATENT_CHANNELS, PIXELS_PER_LATENT, latent_frame_count, size_label
from dataset.media.scenes import PACKAGE, has_detector, scene_starts
from dataset.sources.items import SourceItem, SourceListing
from kandinsky5.caching.report import Outcome
from modules.byte_sizes import size_text
from modules.files import nearest_existing
from modules.logs import format_table
from modules.messages import MAX_LINES, counted, shortened, visible_name

EMPTY_CAPTION = "empty caption"
SAME_PIXELS = "same pixels"
SCENE_CUT = "scene cut inside"
SHORTER = "only shorter cuts"
LONG_CAPTION = "caption cut off"
OTHER_RATE = "other frame rate"

ShowClip = Callable[[PlannedClip, np.ndarray, Sequence["Finding"]], None]
"""Called with each clip, its pixels uint8 [F_px, H_px, W_px, 3] and what was found."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something about a used item that its owner may want to change."""

    name: str
    """The item's."""
    kind: str
    """The same for all items that it applies to, to group by."""
    detail: str = ""

    def __str__(self) -> str:
        return visible_name(f"{self.name}: {self.detail}" if self.detail else self.name)


@dataclass(slots=True)
class DatasetCheck:
    """What was found in one dataset."""

    outcome: Outcome
    listing: SourceListing
    findings: list[Finding] = field(default_factory=list, init=False)


@dataclass(slots=True)
class ClipCheck(DatasetCheck):
    """What was found in one dataset of which the media were decoded."""

    plan: ClipPlan
    seconds: float = field(default=0.0, init=False)
    """That decoding took."""


class SeenPixels:
    """Tells clips of the same pixels, in whatever file of whatever dataset."""

    def __init__(self) -> None:
        self._first: dict[bytes, str] = {}

    def earlier(self, name: str, pixels: np.ndarray) -> str | None:
        """Which earlier item had the same pixels; None if none had."""
        digest = hashlib.sha256(str(pixels.shape).encode())
        digest.update(np.ascontiguousarray(pixels).data)
        first = self._first.setdefault(digest.digest(), name)
        return None if first == name else first


def check_clips(check: ClipCheck, seen: SeenPixels, num_workers: int, show: ShowClip | None) -> None:
    """Decode every clip of a dataset once, as caching would, and collect what is found.

    Damaged media go to the outcome's skipped items.
    """
    begin = time.monotonic()
    clips: dict[str, list[PlannedClip]] = {}
    for clip in check.plan.clips:
        clips.setdefault(clip.item.name, []).append(clip)
    dataset = check.outcome.dataset
    by_item = {item.name: _of_item(dataset, item, clips.get(item.name, ())) for item in check.listing.items}
    for findings in by_item.values():
        check.findings += findings
    batches = cut_batches(check.plan.clips, 1)
    name = f"dataset {dataset.index}"
    with tqdm(total=len(batches), desc=name, unit="clip") as progress:
        for loaded in load_batches(batches, num_workers=num_workers):
            check.outcome.skipped.extend(loaded.damaged)
            for clip, pixels in zip(loaded.clips, loaded.pixels, strict=True):
                own = list(_of_pixels(clip, pixels, seen))
                check.findings += own
                if show is not None:
                    show(clip, pixels, [*by_item[clip.item.name], *own])
            progress.update(1)
    check.seconds = time.monotonic() - begin


def _of_item(dataset: AnyDatasetConfig, item: SourceItem, clips: Sequence[PlannedClip]) -> list[Finding]:
    found = [Finding(item.name, EMPTY_CAPTION)] if not any(item.captions) else []
    longest = max(getattr(dataset, "target_frames", (1,)))
    lengths = [clip.num_frames for clip in clips if not clip.is_image]
    is_full = getattr(dataset, "frame_extraction", "") == "full"
    if lengths and max(lengths) < longest and not is_full:
        found.append(Finding(item.name, SHORTER, f"{max(lengths)} of {longest} frames"))
    remark = rate_remark(dataset, clips[0].video.fps) if clips and clips[0].video is not None else None
    if remark is not None:
        found.append(Finding(item.name, OTHER_RATE, remark))
    return found


def _of_pixels(clip: PlannedClip, pixels: np.ndarray, seen: SeenPixels) -> Iterator[Finding]:
    earlier = seen.earlier(clip.item.name, pixels)
    if earlier is not None:
        yield Finding(clip.item.name, SAME_PIXELS, f"as {earlier}")
    if len(pixels) > 1 and has_detector():
        starts = scene_starts(pixels)
        if starts:
            frames = ", ".join(str(clip.start + start) for start in starts)
            where = f"frames {clip.start} to {clip.start + clip.num_frames - 1}: new scene at {frames}"
            yield Finding(clip.item.name, SCENE_CUT, where)


# ------------------------------------------------------------------------------------------------ report


def clips_report(check: ClipCheck, bytes_per_number: int) -> str:
    """The report of a dataset of media as text.

    Args:
        bytes_per_number: of the dtype in which its latents would be stored.
    """
    dataset, plan = check.outcome.dataset, check.plan
    need = sum(_latent_bytes(clip, bytes_per_number) for clip in plan.clips)
    pixels = sum(clip.crop[0] * clip.crop[1] * clip.num_frames for clip in plan.clips)
    lines = [*head_lines(check.outcome), *_bucket_lines(dataset, plan), *_length_lines(plan)]
    lines += finding_lines(check.findings)
    if not has_detector() and plan.videos:
        lines.append(f"  scene cuts were not looked for: pip install {PACKAGE}")
    lines.append(_disk_line(dataset.cache_directory, counted(len(plan.clips), "latent cache"), need))
    lines.append(
        f"  time: decoding took {check.seconds:.1f} s; {pixels / 1e9:.3f} gigapixels would be encoded, "
        "whose time depends on the device"
    )
    return "\n".join(lines)


def head_lines(outcome: Outcome) -> Iterator[str]:
    """Items found, used, and skipped by reason with their names."""
    dataset = outcome.dataset
    skipped = list(dict.fromkeys(outcome.skipped))
    used = outcome.found - outcome.num_skipped
    yield f"dataset {dataset.index} ({dataset.content}s): found {outcome.found}, used {used}"
    for reason, count in sorted(Counter(entry.reason for entry in skipped).items()):
        yield f"  skipped, {reason}: {count}"
        entries = [
            visible_name(entry.name) + (f" ({visible_name(entry.detail)})" if entry.detail else "")
            for entry in skipped
            if entry.reason == reason
        ]
        yield from (f"    {line}" for line in shortened(entries, MAX_LINES))


def finding_lines(findings: Sequence[Finding]) -> Iterator[str]:
    """Findings by their kind, with the names of the items."""
    findings = list(dict.fromkeys(findings))
    for kind, count in sorted(Counter(finding.kind for finding in findings).items()):
        yield f"  {kind}: {count}"
        own = [finding for finding in findings if finding.kind == kind]
        yield from (f"    {line}" for line in shortened(own, MAX_LINES))


def _bucket_lines(dataset: AnyDatasetConfig, plan: ClipPlan) -> Iterator[str]:
    buckets = Counter(size_label(*clip.crop, clip.num_frames) for clip in plan.clips)
    rows = [
        [label, count, -(-count * dataset.num_repeats // dataset.batch_size)]
        for label, count in sorted(buckets.items())
    ]
    if rows:
        table = format_table(["bucket", "clips", "batches"], rows)
        yield "\n".join(f"  {line}" for line in table.splitlines())


def _length_lines(plan: ClipPlan) -> Iterator[str]:
    if not plan.videos:
        return
    used: dict[str, set[int]] = {}
    for clip in plan.clips:
        used.setdefault(clip.item.name, set()).update(clip.frame_numbers)
    frames = sum(video.num_frames for video in plan.videos)
    used_frames = sum(len(numbers) for numbers in used.values())
    seconds = sum(video.seconds for video in plan.videos)
    rate = {video.name: video.seconds / max(1, video.num_frames) for video in plan.videos}
    used_seconds = sum(len(numbers) * rate.get(name, 0.0) for name, numbers in used.items())
    share = 100 * used_frames / max(1, frames)
    yield (
        f"  used: {used_frames} of {frames} frames ({share:.0f} %), {_clock(used_seconds)} of "
        f"{_clock(seconds)} minutes"
    )
    rates = Counter("none" if video.fps is None else f"{video.fps:.5g}" for video in plan.videos)
    yield "  frame rates: " + ", ".join(f"{rate} ({count})" for rate, count in sorted(rates.items()))


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{seconds % 60:04.1f}"


def _latent_bytes(clip: PlannedClip, bytes_per_number: int) -> int:
    width, height = (side // PIXELS_PER_LATENT for side in clip.crop)
    frames = latent_frame_count(clip.num_frames) + 2  # with the encodes of its first and last frame
    return LATENT_CHANNELS * frames * height * width * bytes_per_number


def _disk_line(folder: Path, what: str, need: int) -> str:
    free = shutil.disk_usage(nearest_existing(folder)).free
    return f"  disk: {what} of {size_text(need)} together; {size_text(free)} are free in {folder}"


# ---------------------------------------------------------------------------------------------- captions

_TOKEN_BYTES = 2 * 3584 + 1
_POOLED_BYTES = 4 * 768
"""Of a caption in a text cache: per token of Qwen2.5-VL in bfloat16 with its mask, and CLIP's vector."""

CountTokens = Callable[[str], Mapping[str, tuple[int, str]]]
"""Caption -> by encoder its number of tokens and the text that is cut off, "" where all of it fits."""


def check_captions(check: DatasetCheck, count: CountTokens | None) -> int:
    """Collect what is found of captions; returns the bytes that their caches need.

    Args:
        count: None without tokenizers: limits are then not compared.
    """
    need = 0
    for item in check.listing.items:
        if not any(item.captions):
            check.findings.append(Finding(item.name, EMPTY_CAPTION))
        for caption in item.captions:
            counts = {} if count is None else count(caption)
            for encoder, (number, lost) in counts.items():
                if lost:
                    detail = f"{encoder}: {number} tokens, lost: ...{lost[:60].strip()}"
                    check.findings.append(Finding(item.name, LONG_CAPTION, detail))
            tokens = counts["Qwen"][0] if "Qwen" in counts else 0
            need += tokens * _TOKEN_BYTES + _POOLED_BYTES
    return need


def captions_report(check: DatasetCheck, need: int, *, has_tokenizers: bool) -> str:
    """The report of a dataset's captions as text."""
    lines = [*head_lines(check.outcome), *finding_lines(check.findings)]
    if has_tokenizers:
        what = counted(len(check.listing.items), "text cache")
        lines.append(_disk_line(check.outcome.dataset.cache_directory, what, need))
    else:
        lines.append("  tokens were not counted: give --text_encoder_qwen and --text_encoder_clip")
    return "\n".join(lines)
