"""Selects frames of a video: the five extraction modes, its own rate, and resampling to 24 fps.

Pure arithmetic. Source of the rules: kohya-ss/musubi-tuner, with its drifting float sums replaced by exact
fractions.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from dataset.geometry import FPS, round_frames

_MODEL_FPS = Fraction(FPS)

FrameExtraction = Literal["head", "chunk", "slide", "uniform", "full"]
FRAME_EXTRACTIONS: tuple[FrameExtraction, ...] = ("head", "chunk", "slide", "uniform", "full")


@dataclass(frozen=True, slots=True, order=True)
class Cut:
    """A run of frames: the number of the first one, and how many; counted after the change of frame rate."""

    num_frames: int
    start: int


@dataclass(frozen=True, kw_only=True, slots=True)
class CutRule:
    """How a dataset cuts its videos."""

    frame_extraction: FrameExtraction = "head"
    target_frames: tuple[int, ...] = (1,)
    """Lengths to cut, each 4k+1, ascending; unused by `full`."""
    frame_stride: int = 1
    """`slide`: distance between starts."""
    frame_sample: int = 1
    """`uniform`: how many cuts per length."""
    max_frames: int = 129
    """`full`: upper limit."""


SceneCuts = Literal["keep", "split", "avoid"]
SCENE_CUTS: tuple[SceneCuts, ...] = ("keep", "split", "avoid")
"""At a change of scene: nothing is done, each scene is cut by itself, or cuts are moved into one."""


def cut_scenes(total: int, rule: CutRule, starts: Sequence[int], mode: SceneCuts) -> tuple[Cut, ...]:
    """The cuts of a video that changes its scene at `starts`; no cut holds such a change unless mode is keep.

    split: the rule is applied to every scene. avoid: the cuts of the whole video, each moved to the nearest
    place where it lies inside one scene; one for which no scene is long enough is left out, and of `full` the
    longest scene is taken.
    """
    if mode == "keep":
        return cut_frames(total, rule)
    scenes = list(itertools.pairwise([0, *starts, total]))
    if mode == "split" or rule.frame_extraction == "full":
        cuts = {
            Cut(cut.num_frames, first + cut.start)
            for first, end in scenes
            for cut in cut_frames(end - first, rule)
        }
        if mode == "split":
            return tuple(sorted(cuts))
        return tuple(sorted(cuts, key=lambda cut: (-cut.num_frames, cut.start))[:1])
    moved = (_moved_into_a_scene(cut, scenes) for cut in cut_frames(total, rule))
    return tuple(sorted({cut for cut in moved if cut is not None}))


def _moved_into_a_scene(cut: Cut, scenes: Sequence[tuple[int, int]]) -> Cut | None:
    places = [
        min(max(cut.start, first), end - cut.num_frames)
        for first, end in scenes
        if end - first >= cut.num_frames
    ]
    start = min(places, key=lambda place: (abs(place - cut.start), place), default=None)
    return None if start is None else Cut(cut.num_frames, start)


def cut_frames(total: int, rule: CutRule) -> tuple[Cut, ...]:
    """The cuts of a video with `total` frames, each once, by length and then by start."""
    if rule.frame_extraction == "full":
        length = round_frames(min(total, rule.max_frames))
        return (Cut(length, 0),) if length >= 1 else ()
    cuts = {
        Cut(length, start)
        for length in rule.target_frames
        if length <= total
        for start in _starts(total, length, rule)
    }
    return tuple(sorted(cuts))


def _starts(total: int, length: int, rule: CutRule) -> Sequence[int]:
    last = total - length
    match rule.frame_extraction:
        case "chunk":
            return range(0, last + 1, length)
        case "slide":
            return range(0, last + 1, rule.frame_stride)
        case "uniform" if rule.frame_sample > 1:
            # Fractions become whole by cutting off, as in upstream's cache names; // is exact.
            return [i * last // (rule.frame_sample - 1) for i in range(rule.frame_sample)]
        case _:
            return (0,)


def resample_even(total: int, source_fps: Fraction, target_fps: Fraction = _MODEL_FPS) -> list[int]:
    """The numbers of the frames kept from an evenly spaced video: the first of each slot of 1/target_fps.

    Frames are only ever dropped. A source slower than the target keeps all of its frames.
    """
    kept: list[int] = []
    last_slot = -1
    for number in range(total):
        slot = int(number * target_fps / source_fps)
        if slot > last_slot:
            kept.append(number)
            last_slot = slot
    return kept


def resample_by_time(
    times: Sequence[Fraction], target_fps: Fraction = _MODEL_FPS, *, tick: Fraction = Fraction(0)
) -> list[int]:
    """The numbers of the frames kept from an unevenly spaced video, by their times in seconds.

    The first frame of each slot of 1/target_fps since the first frame is kept; slots without one are skipped.

    Args:
        tick: the unit that times were rounded to; one that lies half a tick before a slot counts as in it.
    """
    kept: list[int] = []
    last_slot = -1
    for number, time in enumerate(times):
        slot = int((time - times[0] + tick / 2) * target_fps)
        if slot > last_slot:
            kept.append(number)
            last_slot = slot
    return kept


@dataclass(frozen=True, slots=True)
class Resampling:
    """A change of frame rate."""

    source_fps: Fraction | None
    """None: each file's own rate ("auto")."""
    target_fps: Fraction

    @property
    def source_name(self) -> str:
        """The source rate as the dataset file gives it."""
        return "auto" if self.source_fps is None else str(self.source_fps)

    def keep(
        self, times: Sequence[Fraction], own_fps: Fraction | None, tick: Fraction
    ) -> tuple[list[int], str]:
        """The numbers of the frames that stay, and the rule that caches record.

        Args:
            times: of all frames in seconds.
            own_fps: the file's own rate, see `own_rate`.
            tick: unit of the file's clock in seconds.
        """
        evenly, by_time = fps_rules(self)
        fps = self.source_fps or own_fps
        if not are_even(times):
            return resample_by_time(times, self.target_fps, tick=tick), by_time
        return resample_even(len(times), fps or self.target_fps, self.target_fps), evenly


def fps_rules(resampling: Resampling | None) -> tuple[str, ...]:
    """What caches record of a change of rate: for evenly spaced clips, then for those cut by time."""
    if resampling is None:
        return ("all",)
    target = resampling.target_fps
    return f"{resampling.source_name} -> {target}", f"time stamps -> {target}"


_COMMON_RATES = (
    *(Fraction(rate) for rate in (24, 25, 30, 50, 60, 120, 48, 100, 240, 15, 12, 20, 10)),
    *(Fraction(rate * 1000, 1001) for rate in (24, 30, 60, 120, 48, 240)),
)


def own_rate(times: Sequence[Fraction], tick: Fraction, declared: Fraction | None) -> Fraction | None:
    """A file's frame rate by its time stamps: their average, or the rate that they were rounded from.

    Args:
        times: of all frames in seconds, ascending.
        tick: the unit that they were rounded to.
        declared: the rate in the file's header, which is taken where it fits the stamps, and for one frame.
    """
    if len(times) < 2 or times[-1] <= times[0]:
        return declared
    steps, duration = len(times) - 1, times[-1] - times[0]
    fitting = [rate for rate in _COMMON_RATES if abs(steps / rate - duration) <= tick]
    if declared and abs(steps / declared - duration) <= tick:
        # FFmpeg's guesses are fractions that lie close to the rate itself, as 19001/317 to 60000/1001.
        return next((rate for rate in fitting if abs(rate - declared) < declared / 2500), declared)
    return min(fitting, key=lambda rate: abs(steps / rate - duration), default=steps / duration)


def are_even(times: Sequence[Fraction]) -> bool:
    """Whether frame times are evenly spaced, to within what rounding to the file's clock explains.

    Containers round times (Matroska to whole milliseconds), so each time may lie up to 1 ms, or a tenth of a
    frame if that is more, from its place on the straight line from the first to the last frame.
    """
    if len(times) < 3:
        return True
    spacing = (times[-1] - times[0]) / (len(times) - 1)
    slack = max(Fraction(1, 1000), spacing / 10)
    return all(abs(time - (times[0] + i * spacing)) <= slack for i, time in enumerate(times))
