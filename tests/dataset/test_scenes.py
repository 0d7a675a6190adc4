"""Scenes of a video: where they change, and datasets whose cuts hold no such change."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.clips import NO_SCENE, load_clip, plan_clips
from dataset.config.config import VideoDatasetConfig
from dataset.media import scenes
from dataset.media.frames import SceneCuts
from dataset.media.scenes import scene_starts
from dataset.sources.listing import list_items
from modules.errors import ResourceError
from tests.dataset.media_tools import write_video

pytest.importorskip("scenedetect")
COLOURS = ((200, 40, 60), (40, 180, 220), (230, 220, 30))


def film(lengths: tuple[int, ...], size: tuple[int, int] = (48, 64)) -> list[np.ndarray]:
    """Scenes of these lengths, each of a colour of its own, in which a bar moves."""
    frames = []
    for colour, length in zip(COLOURS, lengths, strict=False):
        for number in range(length):
            frame = np.full((*size, 3), colour, np.uint8)
            frame[:, number % size[1] : number % size[1] + 4] = 128
            frames.append(frame)
    return frames


@pytest.fixture
def dataset(tmp_path: Path) -> VideoDatasetConfig:
    """A video of scenes of 8, 20 and 7 frames, and the same as a folder of frames."""
    frames = film((8, 20, 7))
    write_video(tmp_path / "film.mp4", frames)
    (tmp_path / "shot").mkdir()
    for number, frame in enumerate(frames):
        Image.fromarray(frame).save(tmp_path / "shot" / f"{number}.png")
    lines = [
        f'{{"video_path": "{(tmp_path / name).as_posix()}", "caption": "x"}}\n'
        for name in ("film.mp4", "shot")
    ]
    (tmp_path / "m.jsonl").write_text("".join(lines), encoding="utf-8")
    return VideoDatasetConfig(
        index=0, origin="", cache_directory=tmp_path, video_jsonl_file=tmp_path / "m.jsonl",
        target_frames=(5, 13), resolution=(64, 48),
    )  # fmt: skip


def test_scenes_start_where_the_picture_changes_and_not_where_something_moves() -> None:
    assert scene_starts(film((8, 20, 7))) == (8, 28)
    assert scene_starts(film((5, 1, 5), (600, 900))) == (5,)
    assert scene_starts(film((30,))) == ()
    assert scene_starts([]) == ()


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("keep", [(5, 0), (13, 0)]),
        ("split", [(5, 0), (5, 8), (5, 28), (13, 8)]),
        ("avoid", [(5, 0), (13, 8)]),
    ],
)
def test_cuts_of_videos_and_of_folders_of_frames(
    dataset: VideoDatasetConfig, mode: SceneCuts, expected: list[tuple[int, int]]
) -> None:
    config = replace(dataset, scene_cuts=mode)
    plan = plan_clips(config, list_items(config), nabla_resize=False)
    for name in ("film", "shot"):
        clips = [clip for clip in plan.clips if clip.item.base_name == name]
        assert sorted((clip.num_frames, clip.start) for clip in clips) == expected
        changes = [scene_starts(load_clip(clip)) for clip in clips]
        assert any(changes) == (mode == "keep")
    assert (config.settings_hash == dataset.settings_hash) == (mode == "keep")


def test_a_video_without_a_scene_of_the_length_is_skipped_by_name(dataset: VideoDatasetConfig) -> None:
    config = replace(dataset, scene_cuts="avoid", target_frames=(21,))
    plan = plan_clips(config, list_items(config), nabla_resize=False)
    assert {(entry.name, entry.reason) for entry in plan.skipped} == {
        ("film.mp4", NO_SCENE),
        ("shot", NO_SCENE),
    }
    assert plan.skipped[0].detail == "35 frames in 3 scenes, the smallest of target_frames is 21"


def test_a_missing_package_is_named_with_its_command(
    dataset: VideoDatasetConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scenes, "PACKAGE", "no_such_package")
    listing = list_items(dataset)
    plan_clips(dataset, listing, nabla_resize=False)
    with pytest.raises(ResourceError, match=r'scene_cuts = "split" needs .* pip install no_such_package'):
        plan_clips(replace(dataset, scene_cuts="split"), listing, nabla_resize=False)
