"""Which frames are cut and kept, against tables worked out by hand."""

from __future__ import annotations

from fractions import Fraction

import pytest

from dataset.config.config import exact_rate
from dataset.media.frames import (
    CutRule,
    FrameExtraction,
    SceneCuts,
    are_even,
    cut_frames,
    cut_scenes,
    resample_by_time,
    resample_even,
)


def starts(total: int, mode: FrameExtraction, lengths: tuple[int, ...], **rule: int) -> dict[int, list[int]]:
    """Starts by length."""
    result: dict[int, list[int]] = {}
    for cut in cut_frames(total, CutRule(frame_extraction=mode, target_frames=lengths, **rule)):
        result.setdefault(cut.num_frames, []).append(cut.start)
    return result


def test_40_frames_are_cut_as_the_manual_says() -> None:
    assert starts(40, "head", (1, 13, 25)) == {1: [0], 13: [0], 25: [0]}
    assert starts(40, "chunk", (13, 25)) == {13: [0, 13, 26], 25: [0]}
    assert starts(40, "slide", (1, 13, 25), frame_stride=10) == {
        1: [0, 10, 20, 30],
        13: [0, 10, 20],
        25: [0, 10],
    }
    assert starts(40, "uniform", (1, 13, 25), frame_sample=4) == {
        1: [0, 13, 26, 39],
        13: [0, 9, 18, 27],
        25: [0, 5, 10, 15],
    }


@pytest.mark.parametrize(
    ("total", "max_frames", "length"),
    [(20, 31, 17), (25, 31, 25), (35, 31, 29), (121, 129, 121), (150, 129, 129), (3, 129, 1)],
)
def test_full_takes_one_cut_rounded_down(total: int, max_frames: int, length: int) -> None:
    assert starts(total, "full", (1,), max_frames=max_frames) == {length: [0]}


def test_uniform_gives_each_start_once() -> None:
    assert starts(26, "uniform", (25,), frame_sample=4) == {25: [0, 1]}


@pytest.mark.parametrize("mode", ["head", "chunk", "slide", "uniform"])
def test_a_clip_of_the_exact_length_is_cut_and_one_frame_less_is_not(mode: FrameExtraction) -> None:
    rule = {"frame_sample": 3, "frame_stride": 4}
    assert starts(25, mode, (25,), **rule) == {25: [0]}
    assert starts(24, mode, (25,), **rule) == {}


def test_30_fps_keeps_four_of_five_frames_and_never_drifts() -> None:
    kept = resample_even(150, Fraction(30))
    assert kept == [n for n in range(150) if n % 5 != 1]
    assert len(kept) == 120


@pytest.mark.parametrize(
    ("total", "fps", "kept"), [(300, 60.0, 120), (125, 25.0, 120), (240, 23.976, 240), (80, 16.0, 80)]
)
def test_the_number_of_kept_frames_is_known(total: int, fps: float, kept: int) -> None:
    assert len(resample_even(total, exact_rate(fps))) == kept


def test_60_fps_keeps_these_frames() -> None:
    assert resample_even(16, Fraction(60)) == [0, 3, 5, 8, 10, 13, 15]


def test_uneven_times_keep_the_first_frame_of_each_slot() -> None:
    times = [Fraction(ms, 1000) for ms in (0, 20, 40, 240, 260, 280, 480)]
    assert resample_by_time(times) == [0, 3, 4, 6]  # slots of 41.7 ms: 0 0 0 5 6 6 11
    assert not are_even(times)


def test_rounded_clock_times_count_as_even() -> None:
    assert are_even([Fraction(round(n * 1000 / 24), 1000) for n in range(100)])


@pytest.mark.parametrize(
    ("fps", "exact"),
    [
        (30.0, Fraction(30)),
        (29.97, Fraction(30000, 1001)),
        (23.976, Fraction(24000, 1001)),
        (12.5, Fraction(25, 2)),
    ],
)
def test_a_frame_rate_means_its_exact_fraction(fps: float, exact: Fraction) -> None:
    assert exact_rate(fps) == exact


@pytest.mark.parametrize(
    ("mode", "starts", "rule", "expected"),
    [
        ("keep", [10], CutRule(target_frames=(13,)), [(13, 0)]),
        ("split", [10], CutRule(target_frames=(5, 13)), [(5, 0), (5, 10), (13, 10)]),
        ("split", [10], CutRule(target_frames=(9,), frame_extraction="chunk"), [(9, 0), (9, 10), (9, 19)]),
        ("split", [10, 20], CutRule(frame_extraction="full"), [(9, 0), (9, 10), (9, 20)]),
        ("split", [], CutRule(target_frames=(5,)), [(5, 0)]),
        ("avoid", [10], CutRule(target_frames=(5, 13)), [(5, 0), (13, 10)]),
        ("avoid", [10, 12], CutRule(target_frames=(13,), frame_extraction="chunk"), [(13, 12), (13, 13)]),
        ("avoid", [12], CutRule(target_frames=(9,), frame_extraction="slide", frame_stride=8),
         [(9, 0), (9, 12), (9, 16)]),
        ("avoid", [10, 20], CutRule(target_frames=(13,)), []),
        ("avoid", [8, 24], CutRule(frame_extraction="full", max_frames=13), [(13, 8)]),
        ("avoid", [8, 24], CutRule(frame_extraction="full"), [(13, 8)]),
    ],
)  # fmt: skip
def test_cuts_hold_no_change_of_scene(
    mode: SceneCuts, starts: list[int], rule: CutRule, expected: list[tuple[int, int]]
) -> None:
    cuts = cut_scenes(30, rule, starts, mode)
    assert [(cut.num_frames, cut.start) for cut in cuts] == expected
    if mode != "keep":
        assert not any(cut.start < s < cut.start + cut.num_frames for cut in cuts for s in starts)
