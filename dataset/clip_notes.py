"""Log lines on a dataset's sources: what was found in them that a user may not expect."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction

from dataset.config.config import AnyDatasetConfig, VideoDatasetConfig
from dataset.geometry import round_frames
from dataset.media.videos import VideoInfo
from modules.messages import counted, names_in_short

_RATE_TOLERANCE = Fraction(2, 100)
"""By how much rates may differ without a remark."""


@dataclass(frozen=True, kw_only=True, slots=True)
class SourceFacts:
    """What was found in an image, a video or a folder of frames."""

    name: str
    num_frames: int | None = None
    """At the target rate, of a video that clips are cut from; None of all else."""
    video: VideoInfo | None = None
    """None of images and folders of frames."""
    is_animated: bool = False
    """An image file that holds several pictures."""
    unknown_colour: tuple[str, ...] = ()
    """What the file says about its colours that cannot be converted."""


def plan_notes(dataset: AnyDatasetConfig, sources: Sequence[SourceFacts]) -> Iterator[str]:
    """The remarks on a dataset's sources, one per kind."""
    notes = [*_picture_notes(sources)]
    if isinstance(dataset, VideoDatasetConfig):
        notes += [*_length_notes(dataset, sources), *_shape_notes(sources), *_rate_notes(dataset, sources)]
    yield from (f"dataset {dataset.index}: {note}" for note in notes)


def _picture_notes(sources: Sequence[SourceFacts]) -> Iterator[str]:
    animated = [source.name for source in sources if source.is_animated]
    if animated:
        yield (
            f"{counted(len(animated), 'image holds', 'images hold')} several "
            f"pictures, of which the first is used: {names_in_short(animated)}"
        )
    unknown = [f"{s.name} ({' and '.join(s.unknown_colour)})" for s in sources if s.unknown_colour]
    if unknown:
        yield (
            f"the colours of {counted(len(unknown), 'file')} may be off, because what it says about them "
            f"cannot be converted: {names_in_short(unknown)}"
        )


def _length_notes(dataset: VideoDatasetConfig, sources: Sequence[SourceFacts]) -> Iterator[str]:
    longest = round_frames(1) if dataset.frame_extraction == "full" else max(dataset.target_frames)
    short = [(s.name, s.num_frames) for s in sources if s.num_frames is not None and s.num_frames < longest]
    if short:
        name, num_frames = short[0]
        yield (
            f"{counted(len(short), 'video is', 'videos are')} too short for some of "
            f"target_frames {list(dataset.target_frames)}, so that only shorter clips are cut, "
            f"for example {name} ({num_frames} frames)"
        )


def _shape_notes(sources: Sequence[SourceFacts]) -> Iterator[str]:
    known = [(s.name, s.video) for s in sources if s.video is not None]
    flat = [(name, video) for name, video in known if video.square != video.stored]
    if flat:
        name, video = flat[0]
        stored, square = ("{}x{}".format(*size) for size in (video.stored, video.square))
        yield (
            f"{counted(len(flat), 'video has', 'videos have')} pixels that are not "
            f"square and will be scaled to the shape that players show, for example {name} "
            f"({stored} to {square})"
        )
    woven = [name for name, video in known if video.is_interlaced]
    if woven:
        yield (
            f"{counted(len(woven), 'video is', 'videos are')} interlaced and will be deinterlaced: "
            f"{names_in_short(woven)}"
        )
    bright = [name for name, video in known if video.colour.colour.is_hdr]
    if bright:
        yield (
            f"{counted(len(bright), 'video is', 'videos are')} HDR and will be tone-mapped to SDR: "
            f"{names_in_short(bright)}"
        )


def _rate_notes(dataset: VideoDatasetConfig, sources: Sequence[SourceFacts]) -> Iterator[str]:
    rates = [(s.name, s.video.fps) for s in sources if s.video is not None and s.video.fps is not None]
    target, given = Fraction(str(dataset.target_fps)), dataset.source_fps
    if given is None:
        other = [fps for _, fps in rates if _differ(fps, target)]
        if other:
            yield (
                f"{counted(len(other), 'video is', 'videos are')} not at {_shown(target)} frames a second "
                f"({_counted_rates(other)}), and without source_fps every frame is used as it is, so that "
                f'motion changes its speed. source_fps = "auto" takes each file\'s own rate and drops frames '
                f"down to {_shown(target)} a second"
            )
        return
    if dataset.resampling is not None and dataset.resampling.source_fps is not None:
        source = dataset.resampling.source_fps
        wrong = [f"{name} ({_shown(fps)})" for name, fps in rates if _differ(source, fps)]
        if wrong:
            yield (
                f"source_fps is {_shown(source)}, but {counted(len(wrong), 'video has', 'videos have')} "
                f"another rate, so that motion changes its speed: {names_in_short(wrong)}. "
                f'source_fps = "auto" takes each file\'s own rate'
            )
    slow = [f"{name} ({_shown(fps)})" for name, fps in rates if fps < target * (1 - _RATE_TOLERANCE)]
    if slow:
        yield (
            f"{counted(len(slow), 'video has', 'videos have')} fewer than {_shown(target)} frames a second; "
            f"no frame is made up, so that motion becomes faster: {names_in_short(slow)}"
        )


def rate_remark(dataset: AnyDatasetConfig, fps: Fraction | None) -> str | None:
    """What makes the motion of a video with this rate change its speed; None if nothing does."""
    if fps is None or not isinstance(dataset, VideoDatasetConfig):
        return None
    target = Fraction(str(dataset.target_fps))
    if dataset.source_fps is None:
        is_used_as_it_is = _differ(fps, target)
        return f"{_shown(fps)} frames a second, trained as {_shown(target)}" if is_used_as_it_is else None
    source = None if dataset.resampling is None else dataset.resampling.source_fps
    if source is not None and _differ(source, fps):
        return f"{_shown(fps)} frames a second, source_fps is {_shown(source)}"
    if fps < target * (1 - _RATE_TOLERANCE):
        return f"{_shown(fps)} frames a second, trained as {_shown(target)}"
    return None


def _differ(fps: Fraction, other: Fraction) -> bool:
    return abs(fps - other) > _RATE_TOLERANCE * other


def _counted_rates(rates: Sequence[Fraction]) -> str:
    """For example "2 at 30, 1 at 59.94", the most frequent first."""
    return names_in_short([f"{count} at {fps}" for fps, count in Counter(map(_shown, rates)).most_common()])


def _shown(fps: Fraction) -> str:
    return f"{round(float(fps), 3):g}"
