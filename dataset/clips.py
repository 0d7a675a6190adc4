"""Plans clips from media headers and decodes them ahead of the encoder.

`plan_clips` lists the clips of a dataset, `cut_batches` groups them, `load_batches` yields their pixels in
order; clips that cannot be decoded come as `LoadedBatch.damaged`.
"""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from dataset.buckets import Size, bucket_sizes, choose_bucket, nabla_size
from dataset.cache.names import LATENT_SUFFIX, image_cache_name, video_cache_name
from dataset.clip_notes import SourceFacts, plan_notes
from dataset.config.config import AnyDatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from dataset.geometry import FPS, PIXEL_STEP
from dataset.media.frame_folders import frame_paths
from dataset.media.frames import cut_scenes, fps_rules
from dataset.media.masks import PlannedMask, plan_mask
from dataset.media.media import (
    CHANGED,
    Frame,
    MediaError,
    check_resized_pixel_count,
    frames_fingerprint,
    is_animated,
    memory_errors,
    probe_image,
    read_image,
    resize_and_crop,
    source_fingerprint,
)
from dataset.media.scenes import require_detector, scene_starts
from dataset.media.videos import VideoInfo, probe_video, read_frames
from dataset.sources.items import SkippedItem, SourceItem, SourceListing
from modules.messages import counted

TOO_SHORT = "too short"
NO_SCENE = "no scene is long enough"
TOO_SMALL = "too small"
TOO_LONG = "aspect ratio beyond the limit"
MIXED_SIZES = "frames of several sizes"

MAX_ASPECT = 8
"""Longest side over shortest of a source; of longer ones most would be cut off."""

SEGMENT_BYTES = 128 * 2**20
"""Pixels that one reading thread may hold: consecutive cuts of a video share one pass up to here."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PlannedClip:
    """One cut of a video, or one image, that is to be encoded."""

    item: SourceItem
    start: int
    """First frame, counted after the change of frame rate; 0 for an image."""
    num_frames: int
    """Pixel frames, 4k+1; 1 for an image."""
    is_image: bool
    source_size: Size
    """(width, height) of the upright source."""
    bucket: Size
    crop: Size
    """Pixel size that is encoded: the bucket, or what --nabla_resize makes of it."""
    frame_numbers: tuple[int, ...]
    """Which frames of the source, in presentation order."""
    fps: str
    """How the frame rate was changed: "all" (not at all), or for example "30 -> 24"."""
    source_fingerprint: str
    """With `treatment` at its end."""
    treatment: str
    """Processing of the decoded pixels that is not the same for all files; "" for nearly all."""
    cache_name: str
    video: VideoInfo | None
    """None for an image and for a folder of frames."""
    mask: PlannedMask | None = None
    """Of the whole source."""

    @property
    def item_key(self) -> str:
        """Names the clip within its dataset, wherever the files lie: seeds its draw from the posterior."""
        return self.cache_name.removesuffix(LATENT_SUFFIX)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(num_frames, height, width) in pixels: clips of one shape can be encoded together."""
        return self.num_frames, self.crop[1], self.crop[0]


@dataclass(frozen=True, kw_only=True, slots=True)
class ClipPlan:
    """The clips of a dataset to encode."""

    clips: tuple[PlannedClip, ...]
    """Sorted by shape, then name, then start: an order that no folder listing or worker count changes."""
    skipped: tuple[SkippedItem, ...]
    """Items that the listing held and that cannot be used, without the listing's own skipped ones."""
    videos: tuple[SourceVideo, ...]
    """All that could be opened, those without a clip too; empty for images."""
    notes: tuple[str, ...]
    """Log lines: clips too short for some of the lengths, files at another frame rate."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoadedBatch:
    """The pixels of a batch."""

    clips: tuple[PlannedClip, ...]
    pixels: tuple[np.ndarray, ...]
    """For each clip uint8 [F_px, H_px, W_px, 3], RGB."""
    damaged: tuple[SkippedItem, ...]
    """Clips of the batch that could not be decoded; they are not in `clips`."""


# ---------------------------------------------------------------------------------------------- planning


def plan_clips(
    dataset: AnyDatasetConfig, listing: SourceListing, *, nabla_resize: bool, num_workers: int = 1
) -> ClipPlan:
    """Plan the clips of each item from headers; decodes at most one frame per video.

    Args:
        nabla_resize: round the encoded size up to what NABLA needs; names keep the bucket's size.
        num_workers: threads that open files; the result does not depend on it.
    """
    planner = _Planner(dataset, nabla_resize=nabla_resize)
    with ThreadPoolExecutor(max(1, num_workers)) as pool:
        results = list(pool.map(planner.plan, listing.items))
    clips = [clip for result in results for clip in result.clips]
    skipped = tuple(result.skipped for result in results if result.skipped is not None)
    facts = [result.facts for result in results if result.facts is not None]
    clips.sort(key=lambda clip: (clip.shape, clip.item.base_name, clip.start))
    return ClipPlan(
        clips=tuple(clips),
        skipped=skipped,
        videos=tuple(result.source for result in results if result.source is not None),
        notes=tuple(plan_notes(dataset, facts)),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class _ItemResult:
    clips: tuple[PlannedClip, ...] = ()
    skipped: SkippedItem | None = None
    facts: SourceFacts | None = None
    """None if the item could not be probed."""
    source: SourceVideo | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceVideo:
    """A video as it is on the disk, used or not."""

    name: str
    num_frames: int
    seconds: float
    fps: float | None
    """Its own average rate; None where it has none, such as a folder of frames."""


@dataclass(frozen=True, kw_only=True, slots=True)
class _FrameSource:
    """What the cuts of a video or of a folder of frames have in common."""

    item: SourceItem
    size: Size
    frame_numbers: Sequence[int]
    """Of all frames that stay at the target rate."""
    fps: str
    fingerprint: str
    """Of the file or the frames, without `treatment`."""
    treatment: str
    unknown_colour: tuple[str, ...]
    video: VideoInfo | None
    mask: PlannedMask | None
    num_frames: int
    """Of the whole source, whatever its rate."""

    @property
    def summary(self) -> SourceVideo:
        """The video for reports; frames without times count at the model's rate."""
        fps = None if self.video is None or self.video.fps is None else float(self.video.fps)
        seconds = self.num_frames / (fps or FPS)
        return SourceVideo(name=self.item.name, num_frames=self.num_frames, seconds=seconds, fps=fps)


class _Planner:
    """Plans one item after another for a dataset; safe to call from several threads."""

    def __init__(self, dataset: AnyDatasetConfig, *, nabla_resize: bool) -> None:
        self.dataset = dataset
        self.nabla_resize = nabla_resize
        if isinstance(dataset, VideoDatasetConfig) and dataset.scene_cuts != "keep":
            require_detector(f'dataset {dataset.index}: scene_cuts = "{dataset.scene_cuts}"')
        self.buckets = bucket_sizes(dataset.resolution, enable_bucket=dataset.enable_bucket)

    def plan(self, item: SourceItem) -> _ItemResult:
        """The clips of an item, or why it has none."""
        try:
            with memory_errors(item.path):
                if isinstance(self.dataset, ImageDatasetConfig):
                    return self._plan_image(item)
                if item.is_frame_folder:
                    return self._plan_frame_folder(item, self.dataset)
                return self._plan_video(item, self.dataset)
        except MediaError as error:
            return _ItemResult(skipped=_damaged(item, error))

    def _plan_image(self, item: SourceItem) -> _ItemResult:
        info = probe_image(item.path)
        size = info.size
        clip = PlannedClip(
            item=item,
            start=0,
            num_frames=1,
            is_image=True,
            frame_numbers=(0,),
            fps="all",
            source_fingerprint=source_fingerprint(item.path) + info.treatment,
            treatment=info.treatment,
            cache_name=image_cache_name(item.base_name, *size),
            video=None,
            mask=_mask(item, size, 1),
            source_size=size,
            **self._sizes(item, size),
        )
        facts = SourceFacts(
            name=item.name,
            is_animated=is_animated(item.path),
            unknown_colour=info.colour.unknown,
        )
        return _ItemResult(clips=(clip,), facts=facts)

    def _plan_video(self, item: SourceItem, dataset: VideoDatasetConfig) -> _ItemResult:
        info = probe_video(item.path)
        numbers, fps = _kept(dataset, info.times, info.fps, info.tick)
        source = _FrameSource(
            item=item,
            size=info.size,
            frame_numbers=numbers,
            fps=fps,
            fingerprint=source_fingerprint(item.path),
            treatment=info.treatment,
            unknown_colour=info.colour.unknown,
            video=info,
            mask=_mask(item, info.size, info.num_frames),
            num_frames=info.num_frames,
        )
        return self._cut(source, dataset)

    def _plan_frame_folder(self, item: SourceItem, dataset: VideoDatasetConfig) -> _ItemResult:
        paths = frame_paths(item.path)
        numbers, fps = _kept(dataset, [Fraction(number) for number in range(len(paths))])
        info = probe_image(paths[0])
        source = _FrameSource(
            item=item,
            size=info.size,
            frame_numbers=numbers,
            fps=fps,
            fingerprint=frames_fingerprint(paths),
            treatment=info.treatment,
            unknown_colour=info.colour.unknown,
            video=None,
            mask=_mask(item, info.size, len(paths)),
            num_frames=len(paths),
        )
        return self._cut(source, dataset)

    def _cut(self, source: _FrameSource, dataset: VideoDatasetConfig) -> _ItemResult:
        item, numbers = source.item, source.frame_numbers
        sizes = self._sizes(item, source.size)
        bucket = sizes["bucket"]
        starts = self._scene_starts(source, sizes["crop"]) if dataset.scene_cuts != "keep" else ()
        clips = tuple(
            PlannedClip(
                item=item,
                start=cut.start,
                num_frames=cut.num_frames,
                is_image=False,
                frame_numbers=tuple(numbers[cut.start : cut.start + cut.num_frames]),
                fps=source.fps,
                source_fingerprint=source.fingerprint + source.treatment,
                treatment=source.treatment,
                cache_name=video_cache_name(item.base_name, cut.start, cut.num_frames, *bucket),
                video=source.video,
                mask=source.mask,
                source_size=source.size,
                **sizes,
            )
            for cut in cut_scenes(len(numbers), dataset.cut_rule, starts, dataset.scene_cuts)
        )
        skipped = None
        if not clips:
            smallest = min(dataset.target_frames)
            scenes = f" in {len(starts) + 1} scenes" if starts else ""
            detail = f"{counted(len(numbers), 'frame')}{scenes}, the smallest of target_frames is {smallest}"
            reason = NO_SCENE if len(numbers) >= smallest else TOO_SHORT
            skipped = SkippedItem(name=item.name, reason=reason, detail=detail, key=item.key)
        facts = SourceFacts(
            name=item.name,
            num_frames=len(numbers) if clips else None,
            video=source.video,
            unknown_colour=source.unknown_colour,
        )
        return _ItemResult(clips=clips, skipped=skipped, facts=facts, source=source.summary)

    def _scene_starts(self, source: _FrameSource, crop: Size) -> tuple[int, ...]:
        """Positions among the source's frame numbers at which another scene begins; decodes all of them."""
        path, numbers = source.item.path, source.frame_numbers
        if source.video is not None:
            return scene_starts(frame for _, frame in read_frames(path, source.video, list(numbers), crop))
        paths = frame_paths(path)
        return scene_starts(read_image(paths[number]) for number in numbers)

    def _sizes(self, item: SourceItem, size: Size) -> dict[str, Size]:
        """`bucket` and `crop` for a source of this size.

        Raises:
            MediaError: the source is too small or too long to be trained on.
        """
        _check_shape(item, size)
        bucket = choose_bucket(
            size, self.dataset.resolution, self.buckets, bucket_no_upscale=self.dataset.bucket_no_upscale
        )
        crop = nabla_size(bucket) if self.nabla_resize else bucket
        check_resized_pixel_count(item.path, size, crop)
        return {"bucket": bucket, "crop": crop}


def _check_shape(item: SourceItem, size: Size) -> None:
    short, long = sorted(size)
    problems = [f"{size[0]}x{size[1]}"]
    if short < PIXEL_STEP:
        problems.append(f"both sides must be {PIXEL_STEP} pixels or more")
    if long > MAX_ASPECT * short:
        problems.append(f"an aspect ratio of {long / short:.4g}:1 is beyond {MAX_ASPECT}:1")
    if len(problems) > 1:
        reason = TOO_SMALL if short < PIXEL_STEP else TOO_LONG
        raise MediaError(item.path, reason, ", ".join(problems))


def _mask(item: SourceItem, size: Size, num_frames: int) -> PlannedMask | None:
    if item.mask_path is None:
        return None
    try:
        return plan_mask(item.mask_path, size, num_frames)
    except MediaError as error:
        raise MediaError(item.mask_path, f"mask {error.reason}", error.detail) from error


def _damaged(item: SourceItem, error: MediaError) -> SkippedItem:
    name, reason, detail = item.name, error.reason, error.detail
    return SkippedItem(name=name, reason=reason, detail=detail, is_failure=True, key=item.key)


def _kept(
    dataset: VideoDatasetConfig,
    times: Sequence[Fraction],
    own_fps: Fraction | None = None,
    tick: Fraction = Fraction(0),
) -> tuple[Sequence[int], str]:
    """The frame numbers that stay at the target rate, and the rule that caches record.

    A folder of frames has no times: its frames follow each other evenly, at `source_fps` or the target rate.
    """
    if dataset.resampling is None:
        return range(len(times)), fps_rules(None)[0]
    return dataset.resampling.keep(times, own_fps, tick)


def cut_batches(clips: Sequence[PlannedClip], batch_size: int) -> tuple[tuple[PlannedClip, ...], ...]:
    """Cut the full sorted list into batches of one shape; the last of a shape may be smaller.

    Cut before leaving out what is cached already and before sharing out to processes, so that the batch a
    clip is encoded in never changes.
    """
    batches: list[tuple[PlannedClip, ...]] = []
    for _, group in itertools.groupby(clips, key=lambda clip: clip.shape):
        members = tuple(group)
        batches.extend(members[i : i + batch_size] for i in range(0, len(members), batch_size))
    return tuple(batches)


# ---------------------------------------------------------------------------------------------- pixels


def load_clip(clip: PlannedClip) -> np.ndarray:
    """Decode one clip: uint8 [F_px, H_px, W_px, 3], RGB; its first and last frame are clip[0] and clip[-1].

    Raises:
        MediaError: the source is damaged or has changed since planning.
    """
    return _load_frames((clip,)).clip(clip)


def load_batches(
    batches: Iterable[Sequence[PlannedClip]], *, num_workers: int = 1, segment_bytes: int = SEGMENT_BYTES
) -> Iterator[LoadedBatch]:
    """Decode batches in order, `num_workers` threads ahead of the caller.

    Neighbouring cuts of one video are decoded in one pass. The pixels do not depend on the keywords.

    Args:
        segment_bytes: pixels that one thread may hold: so much of a video is decoded in one pass.
    """
    batches = [tuple(batch) for batch in batches]
    segments = _segments(itertools.chain.from_iterable(batches), segment_bytes)
    clips = _in_order(segments, max(1, num_workers))
    for batch in batches:
        good: list[tuple[PlannedClip, np.ndarray]] = []
        damaged: list[SkippedItem] = []
        for clip in batch:
            result = next(clips)()
            if isinstance(result, SkippedItem):
                damaged.append(result)
            else:
                good.append((clip, result))
        yield LoadedBatch(
            clips=tuple(clip for clip, _ in good),
            pixels=tuple(pixels for _, pixels in good),
            damaged=tuple(damaged),
        )


_Segment = tuple[PlannedClip, ...]
_Load = Callable[[], "np.ndarray | SkippedItem"]


@dataclass(frozen=True, slots=True)
class _Pass:
    """The pixels that one pass over a source gave."""

    numbers: np.ndarray
    """[N], ascending."""
    pixels: np.ndarray
    """uint8 [N, H_px, W_px, 3]."""

    def clip(self, clip: PlannedClip) -> np.ndarray:
        """The frames of a clip: a view where they follow each other, else a copy.

        Raises:
            MediaError: there is no memory for the copy.
        """
        places = np.searchsorted(self.numbers, clip.frame_numbers)
        if places[-1] - places[0] == len(places) - 1:
            return self.pixels[places[0] : places[-1] + 1]
        with memory_errors(clip.item.path):
            return self.pixels[places]


def _segments(clips: Iterable[PlannedClip], most_bytes: int) -> Iterator[_Segment]:
    """Runs of clips that one pass over one source serves without holding more than `most_bytes` of pixels."""
    run: list[PlannedClip] = []
    numbers: set[int] = set()
    for clip in clips:
        union = numbers.union(clip.frame_numbers)
        frame_bytes = clip.crop[0] * clip.crop[1] * 3
        fits = len(union) * frame_bytes <= most_bytes
        if run and (clip.item is not run[0].item or clip.shape != run[0].shape or not fits):
            yield tuple(run)
            run, union = [], set(clip.frame_numbers)
        run.append(clip)
        numbers = union
    if run:
        yield tuple(run)


def _in_order(segments: Iterator[_Segment], num_workers: int) -> Iterator[_Load]:
    """One loader per clip, in order, with the decoding under way in threads."""
    with ThreadPoolExecutor(num_workers) as pool:
        waiting: deque[tuple[_Segment, Future[_Pass | MediaError]]] = deque()
        try:
            # One segment more than threads: all of them work while the caller uses the oldest.
            for segment in itertools.islice(segments, num_workers + 1):
                waiting.append((segment, pool.submit(_try_load, segment)))
            while waiting:
                segment, future = waiting.popleft()
                frames = future.result()
                del future
                yield from (_clip_loader(clip, frames) for clip in segment)
                del frames
                for following in itertools.islice(segments, 1):
                    waiting.append((following, pool.submit(_try_load, following)))
        finally:
            for _, future in waiting:
                future.cancel()


def _clip_loader(clip: PlannedClip, frames: _Pass | MediaError) -> _Load:
    def load() -> np.ndarray | SkippedItem:
        if isinstance(frames, MediaError):
            return _damaged(clip.item, frames)
        try:
            return frames.clip(clip)
        except MediaError as error:
            return _damaged(clip.item, error)

    return load


def _try_load(segment: _Segment) -> _Pass | MediaError:
    try:
        return _load_frames(segment)
    except MediaError as error:
        return error


def _load_frames(clips: _Segment) -> _Pass:
    """All frames that these clips of one source need, at their pixel size."""
    first = clips[0]
    numbers = np.array(sorted({number for clip in clips for number in clip.frame_numbers}))
    path = first.item.path
    with memory_errors(path):
        width, height = first.crop
        pixels = np.empty((len(numbers), height, width, 3), np.uint8)
        for place, frame in enumerate(_source_frames(first, numbers.tolist())):
            pixels[place] = resize_and_crop(frame, first.crop)
    is_folder = first.item.is_frame_folder
    fingerprint = frames_fingerprint(frame_paths(path)) if is_folder else source_fingerprint(path)
    if fingerprint + first.treatment != first.source_fingerprint:
        raise MediaError(first.item.path, CHANGED, "start again when it is complete")
    return _Pass(numbers, pixels)


def _source_frames(clip: PlannedClip, numbers: Sequence[int]) -> Iterator[Frame]:
    """The frames of these numbers, in order; all of them, or an error."""
    if clip.video is not None:
        yield from (frame for _, frame in read_frames(clip.item.path, clip.video, numbers, clip.crop))
        return
    paths = frame_paths(clip.item.path) if clip.item.is_frame_folder else [clip.item.path]
    if len(paths) <= numbers[-1]:
        raise MediaError(clip.item.path, CHANGED, "frames have disappeared")
    for number in numbers:
        frame = read_image(paths[number])
        if (frame.shape[1], frame.shape[0]) != clip.source_size:
            found, expected = f"{frame.shape[1]}x{frame.shape[0]}", "{}x{}".format(*clip.source_size)
            is_mixed = clip.item.is_frame_folder and probe_image(paths[0]).size == clip.source_size
            reason = MIXED_SIZES if is_mixed else CHANGED
            detail = f"{paths[number].name} is {found}, {paths[0].name if is_mixed else 'it was'} {expected}"
            raise MediaError(clip.item.path, reason, detail)
        yield frame
