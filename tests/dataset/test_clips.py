"""Plans and pixels: what is encoded, in which order, and what is left out and why."""

from __future__ import annotations

import json
import random
import shutil
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from dataset.cache.index import latent_entry
from dataset.clips import MIXED_SIZES, ClipPlan, PlannedClip, cut_batches, load_batches, load_clip, plan_clips
from dataset.config.config import ImageDatasetConfig, VideoDatasetConfig
from dataset.media.media import read_image
from dataset.sources.listing import list_items
from tests.dataset.media_tools import cut_file, flip_bytes, numbered_frames, numbers_of, remux, write_video


def images(folder: Path, **settings: Any) -> ImageDatasetConfig:
    """A dataset of the images in a folder."""
    return ImageDatasetConfig(
        index=0,
        origin="d.toml",
        cache_directory=folder / "cache",
        image_directory=folder,
        caption_extension=".txt",
        **settings,
    )


def videos(folder: Path, **settings: Any) -> VideoDatasetConfig:
    """A dataset of the videos in a folder."""
    return VideoDatasetConfig(
        index=0,
        origin="d.toml",
        cache_directory=folder / "cache",
        video_directory=folder,
        caption_extension=".txt",
        **{"resolution": (64, 48), **settings},
    )


def plan(
    dataset: ImageDatasetConfig | VideoDatasetConfig, *, nabla_resize: bool = False, num_workers: int = 2
) -> ClipPlan:
    """Captions for everything, then the plan."""
    assert dataset.directory is not None
    for path in list(dataset.directory.iterdir()):
        if path.is_file() and path.suffix != ".txt":
            path.with_suffix(".txt").write_text("caption", encoding="utf-8")
    return plan_clips(dataset, list_items(dataset), nabla_resize=nabla_resize, num_workers=num_workers)


def numbers(clip: PlannedClip) -> list[int]:
    """The frame numbers that a clip of `numbered_frames` shows."""
    return numbers_of(load_clip(clip))


def test_an_image_is_named_by_its_own_size_and_encoded_at_its_bucket(tmp_path: Path) -> None:
    Image.new("RGB", (1920, 1080)).save(tmp_path / "cat 01.png")
    dataset = images(tmp_path, resolution=(512, 512), enable_bucket=True)
    (clip,) = plan(dataset).clips
    assert clip.cache_name == "cat 01_1920x1080_k5.safetensors"
    assert (clip.bucket, clip.crop, clip.shape) == ((672, 384), (672, 384), (1, 384, 672))
    assert clip.item_key == "cat 01_1920x1080"
    (clip,) = plan(dataset, nabla_resize=True).clips
    assert clip.cache_name == "cat 01_1920x1080_k5.safetensors"
    assert load_clip(clip).shape == (1, 384, 768, 3)


def test_a_video_is_named_by_its_cut_and_bucket(tmp_path: Path) -> None:
    write_video(tmp_path / "run.v2.mp4", numbered_frames(30, 192, 108))
    dataset = videos(tmp_path, resolution=(64, 64), enable_bucket=True, target_frames=(1, 25))
    assert [clip.cache_name for clip in plan(dataset).clips] == [
        "run.v2_00000-001_0080x0048_k5.safetensors",
        "run.v2_00000-025_0080x0048_k5.safetensors",
    ]


def test_each_way_of_cutting_shows_the_right_frames(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(40))
    chunk = plan(videos(tmp_path, frame_extraction="chunk", target_frames=(13,))).clips
    assert [numbers(clip) for clip in chunk] == [list(range(s, s + 13)) for s in (0, 13, 26)]
    slide = plan(videos(tmp_path, frame_extraction="slide", target_frames=(25,), frame_stride=10)).clips
    assert [numbers(clip)[0] for clip in slide] == [0, 10]
    full = plan(videos(tmp_path, frame_extraction="full", max_frames=31)).clips
    assert [numbers(clip) for clip in full] == [list(range(29))]


@pytest.mark.parametrize(
    ("fps", "kept"),
    [
        (30.0, [0, 2, 3, 4, 5, 7, 8, 9, 10]),
        (60.0, [0, 3, 5, 8, 10, 13, 15, 18, 20]),
        (25.0, [0, 2, 3, 4, 5, 6, 7, 8, 9]),
        (23.976, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
        (16.0, [0, 1, 2, 3, 4, 5, 6, 7, 8]),
    ],
)
def test_source_fps_drops_exactly_these_frames(tmp_path: Path, fps: float, kept: list[int]) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(25), fps=25)
    (clip,) = plan(videos(tmp_path, target_frames=(9,), source_fps=fps)).clips
    assert numbers(clip) == kept


def test_uneven_clips_are_resampled_by_their_times(tmp_path: Path) -> None:
    times = [t for n in range(6) for t in (240 * n, 240 * n + 20)]
    write_video(tmp_path / "a.mkv", numbered_frames(12), pts_ms=times)
    (clip,) = plan(videos(tmp_path, target_frames=(5,), source_fps=24.0)).clips
    assert clip.fps == "time stamps -> 24"
    # Slots of 41.7 ms: 0 and 20 ms share one, 240 and 260 fall into 5 and 6.
    assert numbers(clip) == [0, 2, 3, 4, 5]


@pytest.mark.parametrize(("total", "used"), [(24, False), (25, True), (26, True)])
def test_a_clip_one_frame_short_is_listed_with_both_numbers(tmp_path: Path, total: int, used: bool) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(total))
    result = plan(videos(tmp_path, target_frames=(25,)))
    assert len(result.clips) == used
    if used:
        assert numbers(result.clips[0]) == list(range(25))
    else:
        (skipped,) = result.skipped
        assert skipped.reason == "too short"
        assert "24 frames" in skipped.detail
        assert "25" in skipped.detail
        assert not skipped.is_failure


def test_a_clip_too_short_for_some_lengths_is_told(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(10), fps=30)
    notes = " ".join(plan(videos(tmp_path, target_frames=(5, 25))).notes)
    assert "1 video is too short for some of target_frames [5, 25]" in notes
    assert "a.mp4 (10 frames)" in notes
    assert "1 video is not at 24 frames a second (1 at 30)" in notes
    assert 'source_fps = "auto"' in notes


def test_damaged_files_are_skipped_and_the_others_planned(tmp_path: Path, media: Path) -> None:
    remux(media / "coffee_pan_24fps_49f.mp4", tmp_path / "good.mp4")
    cut_file(remux(tmp_path / "good.mp4", tmp_path / "cut.mp4", movflags="faststart"), 0.5)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "noise.mp4").write_bytes(np.random.default_rng(0).bytes(9999))
    result = plan(videos(tmp_path, target_frames=(5,)))
    assert [clip.item.base_name for clip in result.clips] == ["good"]
    assert [(s.name, s.is_failure) for s in result.skipped] == [
        ("cut.mp4", True),
        ("empty.mp4", True),
        ("noise.mp4", True),
    ]


def test_a_source_with_hidden_damage_is_left_out_of_the_index_altogether(tmp_path: Path, media: Path) -> None:
    remux(media / "bunny_25fps_49f.mp4", tmp_path / "bad.mp4", movflags="faststart")
    shutil.copy(tmp_path / "bad.mp4", tmp_path / "good.mp4")
    flip_bytes(tmp_path / "bad.mp4", 0.6, 2500)
    result = plan(videos(tmp_path, target_frames=(1, 45)))
    assert len(result.clips) == 4
    loaded = list(load_batches(cut_batches(result.clips, 2), num_workers=2))
    assert [len(batch.clips) for batch in loaded] == [2, 1]
    damaged = [skipped for batch in loaded for skipped in batch.damaged]
    assert [s.name for s in damaged] == ["bad.mp4"]
    digests = {clip.cache_name: "digest" for clip in result.clips}
    entry = latent_entry(result.clips, [*result.skipped, *damaged, *damaged], digests)
    assert [item.name for item in entry.items] == ["good"]
    assert len(entry.skipped) == 1


def test_a_missing_video_takes_no_other_of_its_name_out_of_the_index(tmp_path: Path, media: Path) -> None:
    shutil.copy(media / "bunny_25fps_49f.mp4", tmp_path / "x.mp4")
    lines = [{"video_path": str(tmp_path / path), "caption": "c"} for path in ("gone/x.mp4", "x.mp4")]
    jsonl = tmp_path / "list.jsonl"
    jsonl.write_text("\n".join(map(json.dumps, lines)), encoding="utf-8")
    dataset = replace(videos(tmp_path, target_frames=(5,)), video_directory=None, video_jsonl_file=jsonl)
    listing = list_items(dataset)
    assert [entry.name for entry in listing.skipped] == ["x.mp4"]
    clips = plan_clips(dataset, listing, nabla_resize=False).clips
    entry = latent_entry(clips, listing.skipped, {clip.cache_name: "digest" for clip in clips})
    assert [item.name for item in entry.items] == ["x"]
    assert entry.skipped[0].key not in {"", entry.items[0].key}


def test_a_turned_video_takes_the_bucket_of_its_upright_size(tmp_path: Path) -> None:
    from tests.dataset.media_tools import set_display_matrix

    write_video(tmp_path / "a.mp4", numbered_frames(5, 128, 64))
    set_display_matrix(tmp_path / "a.mp4", 0, 1, -1, 0)
    (clip,) = plan(videos(tmp_path, resolution=(96, 96), enable_bucket=True, target_frames=(5,))).clips
    assert clip.bucket[0] < clip.bucket[1]


def test_an_image_too_small_for_no_upscale_is_named_with_its_size(tmp_path: Path) -> None:
    Image.new("RGB", (100, 10)).save(tmp_path / "a.png")
    dataset = images(tmp_path, resolution=(64, 64), enable_bucket=True, bucket_no_upscale=True)
    (skipped,) = plan(dataset).skipped
    assert (skipped.reason, skipped.is_failure) == ("too small", True)
    assert "100x10" in skipped.detail


def test_order_and_pixels_do_not_depend_on_workers_or_listing(
    tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("b", "a"):
        shutil.copy(media / "coffee_pan_24fps_49f.mp4", tmp_path / f"{name}.mp4")
    write_video(tmp_path / "c.mp4", numbered_frames(30, 96, 48))
    dataset = videos(tmp_path, frame_extraction="slide", target_frames=(1, 5), frame_stride=7)
    first = plan(dataset, num_workers=1)
    expected = list(load_batches(cut_batches(first.clips, 3), num_workers=1))
    listed = list(Path.iterdir(tmp_path))
    random.Random(0).shuffle(listed)
    monkeypatch.setattr(Path, "iterdir", lambda self: iter(listed))
    second = plan(dataset, num_workers=4)
    found = list(load_batches(cut_batches(second.clips, 3), num_workers=4))
    assert first.clips == second.clips
    for one, other in zip(expected, found, strict=True):
        assert one.clips == other.clips
        assert all(np.array_equal(a, b) for a, b in zip(one.pixels, other.pixels, strict=True))
    for clip in first.clips[:3]:
        pixels = next(p for b in expected for c, p in zip(b.clips, b.pixels, strict=True) if c == clip)
        assert np.array_equal(load_clip(clip), pixels)


def test_neighbouring_cuts_share_one_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import dataset.clips

    write_video(tmp_path / "a.mp4", numbered_frames(60))
    dataset_config = videos(tmp_path, frame_extraction="slide", target_frames=(5,), frame_stride=1)
    clips = plan(dataset_config).clips
    passes: list[int] = []
    decode = dataset.clips.read_frames

    def counted(path: Path, info: Any, numbers: Any, crop: Any) -> Any:
        passes.append(len(numbers))
        return decode(path, info, numbers, crop)

    monkeypatch.setattr(dataset.clips, "read_frames", counted)
    assert sum(len(b.clips) for b in load_batches(cut_batches(clips, 4))) == 56
    assert passes == [60]
    # With little memory there are more passes, and the pixels are the same.
    loaded = load_batches(cut_batches(clips, 4), num_workers=3, segment_bytes=64 * 48 * 3 * 20)
    shown = [numbers_of(pixels) for batch in loaded for pixels in batch.pixels]
    assert shown == [list(range(s, s + 5)) for s in range(56)]
    assert max(passes[1:]) <= 20


def test_leaving_the_loop_early_ends_the_threads(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(20))
    clips = plan(videos(tmp_path, frame_extraction="slide", target_frames=(5,))).clips
    loader = load_batches(cut_batches(clips, 1), num_workers=2)
    next(loader)
    loader.close()  # type: ignore[attr-defined]


def test_batches_have_one_shape_and_keep_the_sorted_order(tmp_path: Path) -> None:
    for number in range(5):
        Image.new("RGB", (64 + 64 * (number % 2), 64)).save(tmp_path / f"{number}.png")
    clips = plan(images(tmp_path, resolution=(64, 64), enable_bucket=True)).clips
    batches = cut_batches(clips, 2)
    assert [[clip.item.base_name for clip in batch] for batch in batches] == [["1", "3"], ["0", "2"], ["4"]]
    assert all(len({clip.shape for clip in batch}) == 1 for batch in batches)


def test_a_file_that_changes_or_disappears_after_planning_is_listed(tmp_path: Path) -> None:
    for name in "abc":
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    clips = plan(images(tmp_path, resolution=(64, 64))).clips
    Image.new("RGB", (64, 64), (9, 9, 9)).save(tmp_path / "a.png")
    (tmp_path / "b.png").unlink()
    (loaded,) = load_batches(cut_batches(clips, 3))
    assert [clip.item.base_name for clip in loaded.clips] == ["c"]
    assert [s.name for s in loaded.damaged] == ["a.png", "b.png"]
    assert all(s.is_failure for s in loaded.damaged)


def test_a_folder_of_frames_is_cut_like_a_video(tmp_path: Path) -> None:
    shot = tmp_path / "shot7"
    shot.mkdir()
    for number, frame in enumerate(numbered_frames(20)):
        Image.fromarray(frame).save(shot / f"{number:04d}.png")
    source = tmp_path / "m.jsonl"
    source.write_text(json.dumps({"video_path": str(shot), "caption": "x"}), encoding="utf-8")
    dataset = VideoDatasetConfig(
        index=0,
        origin="",
        cache_directory=tmp_path / "cache",
        video_jsonl_file=source,
        resolution=(64, 48),
        frame_extraction="chunk",
        target_frames=(9,),
        source_fps=30.0,
    )
    result = plan_clips(dataset, list_items(dataset), nabla_resize=False)
    assert [clip.cache_name for clip in result.clips] == ["shot7_00000-009_0064x0048_k5.safetensors"]
    assert numbers(result.clips[0]) == [0, 2, 3, 4, 5, 7, 8, 9, 10]
    Image.new("RGB", (32, 32)).save(shot / "0003.png")
    (loaded,) = load_batches(cut_batches(result.clips, 1))
    assert "0003.png is 32x32" in loaded.damaged[0].detail


def test_odd_and_long_names_give_cache_names_that_fit(tmp_path: Path) -> None:
    names = ["日本 🐈", "[x]", "100%", "-dash", "é" * 120, "é" * 119 + "e"]
    for name in names:
        Image.new("RGB", (64, 64)).save(tmp_path / f"{name}.png")
    clips = plan(images(tmp_path, resolution=(64, 64))).clips
    cache_names = {clip.cache_name for clip in clips}
    assert len(cache_names) == len(names)
    assert all(len(name.encode()) <= 255 for name in cache_names)


@pytest.mark.parametrize(
    ("size", "reason", "words"),
    [
        ((1, 1), "too small", "1x1, both sides must be 16 pixels or more"),
        ((15, 64), "too small", "15x64"),
        ((1, 2000), "too small", "an aspect ratio of 2000:1 is beyond 8:1"),
        ((1, 30_000), "too small", "1x30000"),
        ((20, 161), "aspect ratio beyond the limit", "20x161, an aspect ratio of 8.05:1 is beyond 8:1"),
        ((161, 20), "aspect ratio beyond the limit", "161x20"),
    ],
)
def test_pictures_of_a_size_that_shows_nothing_are_listed_with_it(
    tmp_path: Path, size: tuple[int, int], reason: str, words: str
) -> None:
    Image.new("RGB", size).save(tmp_path / "odd.png")
    for name, right in (("small.png", (16, 16)), ("long.png", (160, 20))):
        Image.new("RGB", right).save(tmp_path / name)
    made = plan(images(tmp_path, resolution=(64, 64), enable_bucket=True))
    assert sorted(clip.item.path.name for clip in made.clips) == ["long.png", "small.png"]
    (skipped,) = made.skipped
    assert (skipped.name, skipped.reason, skipped.is_failure) == ("odd.png", reason, True)
    assert words in skipped.detail


def test_videos_of_a_size_that_shows_nothing_are_listed_with_it(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(5, 8, 8))
    write_video(tmp_path / "b.mp4", numbered_frames(5, 16, 256))
    write_video(tmp_path / "c.mp4", numbered_frames(5, 16, 16))
    made = plan(videos(tmp_path, target_frames=(5,), enable_bucket=True))
    assert [clip.item.path.name for clip in made.clips] == ["c.mp4"]
    found = {skipped.name: skipped.reason for skipped in made.skipped}
    assert found == {"a.mp4": "too small", "b.mp4": "aspect ratio beyond the limit"}


@pytest.mark.parametrize("error", [MemoryError(), cv2.error("boom")])
def test_a_file_that_the_memory_is_too_small_for_does_not_end_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.new("RGB", (64, 48)).save(tmp_path / name)
    clips = plan(images(tmp_path, resolution=(32, 32))).clips

    def read(path: Path) -> np.ndarray:
        if path.name == "b.png":
            raise error
        return read_image(path)

    monkeypatch.setattr("dataset.clips.read_image", read)
    (loaded,) = load_batches(cut_batches(clips, 3))
    assert [clip.item.path.name for clip in loaded.clips] == ["a.png", "c.png"]
    assert [(bad.name, bad.is_failure) for bad in loaded.damaged] == [("b.png", True)]


def test_a_video_with_flat_pixels_is_planned_at_its_shown_shape_with_a_note(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", numbered_frames(5, 64, 64), aspect=Fraction(16, 9))
    write_video(tmp_path / "b.mp4", numbered_frames(5, 64, 64))
    made = plan(videos(tmp_path, resolution=(64, 64), enable_bucket=True, target_frames=(5,)))
    flat, square = sorted(made.clips, key=lambda clip: clip.item.path.name)
    assert (flat.source_size, flat.bucket, square.bucket) == ((114, 64), (80, 48), (64, 64))
    assert numbers(flat) == numbers(square) == list(range(5))
    assert flat.source_fingerprint.endswith("-square114x64")  # a cache of squeezed pixels no longer fits
    (note,) = made.notes
    assert "1 video has pixels that are not square" in note
    assert "a.mp4 (64x64 to 114x64)" in note


def test_frames_of_several_sizes_are_called_that(tmp_path: Path) -> None:
    (tmp_path / "shot").mkdir()
    for number in range(5):
        Image.new("RGB", (64, 48 if number != 3 else 32)).save(tmp_path / "shot" / f"{number}.png")
    path = tmp_path / "v.jsonl"
    path.write_text(json.dumps({"video_path": str(tmp_path / "shot"), "caption": "x"}), encoding="utf-8")
    dataset = VideoDatasetConfig(
        index=0,
        origin="",
        cache_directory=tmp_path,
        video_jsonl_file=path,
        resolution=(64, 48),
        target_frames=(5,),
    )
    clips = plan_clips(dataset, list_items(dataset), nabla_resize=False).clips
    (loaded,) = load_batches(cut_batches(clips, 1))
    assert [(bad.reason, bad.detail) for bad in loaded.damaged] == [
        (MIXED_SIZES, "3.png is 64x32, 0.png 64x48")
    ]
