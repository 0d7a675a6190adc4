"""source_fps: which frames stay at 24 a second, seen by frames that carry their number as brightness."""

from __future__ import annotations

import itertools
import math
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest

from dataset.clips import load_clip, plan_clips
from dataset.config.config import VideoDatasetConfig, load_dataset_config
from dataset.media.frames import own_rate, resample_by_time
from dataset.media.videos import probe_video
from dataset.sources.listing import list_items
from modules.errors import ConfigError
from tests.dataset.media_tools import numbered_frames, numbers_of, write_video

NTSC = Fraction(1000, 1001)
RATES = {
    "23.976": 24 * NTSC,
    "24": Fraction(24),
    "25": Fraction(25),
    "29.97": 30 * NTSC,
    "30": Fraction(30),
    "50": Fraction(50),
    "59.94": 60 * NTSC,
    "60": Fraction(60),
}
COUNT = 60


def plan(folder: Path, source_fps: Any, **settings: Any) -> Any:
    """The plan of a folder of videos, whole clips."""
    for path in folder.glob("*.m*"):
        path.with_suffix(".txt").write_text("caption", encoding="utf-8")
    dataset = VideoDatasetConfig(
        index=0,
        origin="d.toml",
        cache_directory=folder / "cache",
        video_directory=folder,
        caption_extension=".txt",
        resolution=(64, 48),
        source_fps=source_fps,
        frame_extraction="full",
        **settings,
    )
    return plan_clips(dataset, list_items(dataset), nabla_resize=False)


def first_of_slots(times: list[Fraction]) -> list[int]:
    """The first frame of each 1/24 s, counted by hand."""
    slots: dict[int, int] = {}
    for number, time in enumerate(times):
        slots.setdefault(math.floor(24 * time), number)
    return sorted(slots.values())


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
@pytest.mark.parametrize("name", RATES)
def test_auto_keeps_the_first_frame_of_each_slot_and_the_speed(
    tmp_path: Path, name: str, suffix: str
) -> None:
    """mp4 has exact times, Matroska whole milliseconds; both give the same frames."""
    rate = RATES[name]
    write_video(tmp_path / f"a{suffix}", numbered_frames(COUNT), fps=rate)
    assert probe_video(tmp_path / f"a{suffix}").fps == rate
    made = plan(tmp_path, "auto")
    (clip,) = made.clips
    expected = first_of_slots([number / rate for number in range(COUNT)])
    kept = numbers_of(load_clip(clip))
    assert kept == list(clip.frame_numbers) == expected[: clip.num_frames]
    assert clip.num_frames == (len(expected) - 1) // 4 * 4 + 1
    speed = (kept[-1] - kept[0]) / rate / Fraction(clip.num_frames - 1, 24)
    print(f"{name:7} {suffix} {COUNT} -> {len(expected)} frames, speed {float(speed):.4f}: {kept[:12]} ...")
    assert abs(speed - 1) < Fraction(1, 50)
    assert clip.fps == "auto -> 24"
    assert not made.notes


def test_auto_follows_the_times_of_a_clip_of_variable_rate(tmp_path: Path) -> None:
    steps = [20, 20, 60, 33, 17, 100, 16, 17, 17, 50] * 6  # milliseconds
    times = [0, *itertools.accumulate(steps)][:COUNT]
    write_video(tmp_path / "a.mkv", numbered_frames(COUNT), pts_ms=times)
    (clip,) = plan(tmp_path, "auto").clips
    # A stamp may have been rounded down by half a millisecond.
    expected = first_of_slots([Fraction(2 * time + 1, 2000) if time else Fraction(0) for time in times])
    kept = numbers_of(load_clip(clip))
    assert kept == expected[: clip.num_frames]
    assert clip.fps == "time stamps -> 24"
    duration = Fraction(times[kept[-1]] - times[kept[0]], 1000)
    print(f"variable {COUNT} -> {len(expected)} frames in {float(duration)} s: {kept[:12]} ...")


def test_a_stamp_that_was_rounded_down_is_in_the_slot_that_it_belongs_to() -> None:
    stamps = [Fraction(round(1000 * number / 24), 1000) for number in range(240)]
    assert len(resample_by_time(stamps)) < 240
    assert resample_by_time(stamps, tick=Fraction(1, 1000)) == list(range(240))


@pytest.mark.parametrize("rate", RATES.values(), ids=list(RATES))
@pytest.mark.parametrize("count", [9, 25, 240, 5000])
def test_the_rate_is_that_from_which_stamps_were_rounded(rate: Fraction, count: int) -> None:
    stamps = [Fraction(round(1000 * number / rate), 1000) for number in range(count)]
    assert own_rate(stamps, Fraction(1, 1000), rate) == rate
    assert own_rate(stamps, Fraction(1, 1000), rate.limit_denominator(400)) == rate
    if count >= 240:  # long enough to tell 23.976 from 24
        assert own_rate(stamps, Fraction(1, 1000), None) == rate
        assert own_rate(stamps, Fraction(1, 1000), Fraction(90000)) == rate  # a header that says anything


def test_a_rate_that_no_list_knows_is_the_average() -> None:
    times = [Fraction(number, 7) for number in range(9)]
    assert own_rate(times, Fraction(1, 1000), None) == 7
    assert own_rate(times[:1], Fraction(1, 1000), Fraction(25)) == 25
    assert own_rate(times[:1], Fraction(1, 1000), None) is None


def test_rates_that_do_not_fit_the_dataset_file_are_named(tmp_path: Path) -> None:
    for name, rate in (("a", 60), ("b", 25), ("c", 60), ("d", 24)):
        write_video(tmp_path / f"{name}.mp4", numbered_frames(13), fps=rate)
    (unset,) = plan(tmp_path, None).notes
    assert "3 videos are not at 24 frames a second (2 at 60, 1 at 25)" in unset
    assert 'source_fps = "auto"' in unset
    (given,) = plan(tmp_path, 60.0).notes
    assert "source_fps is 60, but 2 videos have another rate" in given
    assert "b.mp4 (25), d.mp4 (24)" in given
    assert not plan(tmp_path, "auto").notes


def test_videos_slower_than_the_model_are_named(tmp_path: Path) -> None:
    write_video(tmp_path / "slow.mp4", numbered_frames(13), fps=16)
    (note,) = plan(tmp_path, "auto").notes
    assert "1 video has fewer than 24 frames a second" in note
    assert "slow.mp4 (16)" in note


@pytest.mark.parametrize(
    ("value", "is_right"), [('"auto"', True), ("30", True), ('"Auto"', False), ("true", False)]
)
def test_source_fps_is_a_rate_or_auto(tmp_path: Path, value: str, is_right: bool) -> None:
    (tmp_path / "d.toml").write_text(
        f'[[datasets]]\nvideo_directory = "v"\ncaption_extension = ".txt"\nsource_fps = {value}\n',
        encoding="utf-8",
    )
    if is_right:
        (dataset,) = load_dataset_config(tmp_path / "d.toml").datasets
        assert isinstance(dataset, VideoDatasetConfig)
        assert dataset.resampling is not None
        assert (dataset.resampling.source_name, dataset.resampling.target_fps) == (value.strip('"'), 24)
        return
    with pytest.raises(ConfigError, match='"auto" for each file'):
        load_dataset_config(tmp_path / "d.toml")
