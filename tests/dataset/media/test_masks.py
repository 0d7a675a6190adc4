"""Masks: which one belongs to a clip, what is refused, and what of it reaches the size of the latents."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.clips import PlannedClip, load_clip, plan_clips
from dataset.config.config import AnyDatasetConfig, load_dataset_config
from dataset.media.masks import latent_mask
from dataset.sources.items import MISSING_FILE
from dataset.sources.listing import list_items
from modules.errors import ConfigError, DataError
from tests.dataset.media.icc import grey_profile
from tests.dataset.media_tools import write_video


def make_dataset(folder: Path, extra: str = "") -> AnyDatasetConfig:
    """Videos in `clips`, their masks in `masks`."""
    (folder / "clips").mkdir(exist_ok=True)
    (folder / "masks").mkdir(exist_ok=True)
    (folder / "d.toml").write_text(
        f"[[datasets]]\nvideo_directory = '{(folder / 'clips').as_posix()}'\ncaption_extension = '.txt'\n"
        f"mask_directory = '{(folder / 'masks').as_posix()}'\ncache_directory = '{folder.as_posix()}'\n"
        f"resolution = [64, 48]\ntarget_frames = [5, 9]\n{extra}",
        encoding="utf-8",
    )
    return load_dataset_config(folder / "d.toml").datasets[0]


def add_clip(folder: Path, name: str, frames: list[np.ndarray], fps: int = 24) -> None:
    write_video(folder / "clips" / f"{name}.mp4", frames, fps=fps)
    (folder / "clips" / f"{name}.txt").write_text("a clip", encoding="utf-8")


def gradients(count: int, width: int = 100, height: int = 60) -> list[np.ndarray]:
    """Frames that differ everywhere, in space and time."""
    y, x = np.mgrid[0:height, 0:width]
    return [
        np.stack([(2 * x + 5 * number + y) % 250] * 3, axis=2).astype(np.uint8) for number in range(count)
    ]


def clips_of(dataset: AnyDatasetConfig) -> list[PlannedClip]:
    return list(plan_clips(dataset, list_items(dataset), nabla_resize=False).clips)


def weights_of(clip: PlannedClip) -> torch.Tensor:
    assert clip.mask is not None
    return latent_mask(clip.mask, clip.frame_numbers, clip.crop)


def test_a_mask_is_cut_resized_and_timed_as_its_clip_is(tmp_path: Path) -> None:
    """The clip as its own mask: the brightness of what is encoded, averaged as the latents lie."""
    dataset = make_dataset(tmp_path, "source_fps = 30\nframe_extraction = 'chunk'\n")
    add_clip(tmp_path, "a", gradients(20), fps=30)
    (tmp_path / "masks" / "a.mp4").write_bytes((tmp_path / "clips" / "a.mp4").read_bytes())
    clips = clips_of(dataset)
    assert [(clip.start, clip.num_frames) for clip in clips] == [(0, 5), (5, 5), (10, 5), (0, 9)]
    for clip in clips:
        shown = torch.from_numpy(load_clip(clip)).double().mean(dim=3) / 255
        blocks = shown.reshape(-1, 6, 8, 8, 8).mean(dim=(2, 4))  # [F_px, H, W]
        expected = [blocks[0], *(blocks[i : i + 4].mean(dim=0) for i in range(1, len(blocks), 4))]
        torch.testing.assert_close(weights_of(clip).double(), torch.stack(expected), rtol=0, atol=1e-6)


def test_white_is_exactly_one_and_a_still_masks_every_frame(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    add_clip(tmp_path, "a", gradients(9))
    Image.new("L", (100, 60), 255).save(tmp_path / "masks" / "a.png")
    for clip in clips_of(dataset):
        assert torch.equal(weights_of(clip), torch.ones((clip.num_frames + 3) // 4, 6, 8))


def test_a_mask_is_read_by_its_range_and_profile(tmp_path: Path) -> None:
    """Limited range white is 1, and half the light by a linear profile is sRGB's level 188."""
    dataset = make_dataset(tmp_path)
    for name in ("a", "b"):
        add_clip(tmp_path, name, gradients(9))
    Image.new("L", (100, 60), 128).save(tmp_path / "masks" / "a.png", icc_profile=grey_profile(lambda x: x))
    write_video(tmp_path / "masks" / "b.mp4", [np.full((60, 100, 3), 255, np.uint8)] * 9)
    for clip in clips_of(dataset):
        expected = 188 / 255 if clip.item.base_name == "a" else 1.0
        torch.testing.assert_close(
            weights_of(clip), torch.full(((clip.num_frames + 3) // 4, 6, 8), expected), rtol=0, atol=1e-6
        )


def test_a_folder_of_frames_masks_frame_by_frame(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    add_clip(tmp_path, "a", gradients(9, 64, 48))
    (tmp_path / "masks" / "a").mkdir()
    for number in range(9):
        picture = np.zeros((48, 64), np.uint8)
        picture[:, :36] = 255 if number == 2 else 0
        Image.fromarray(picture).save(tmp_path / "masks" / "a" / f"{number}.png")
    weights = weights_of(clips_of(dataset)[-1])
    assert weights.shape == (3, 6, 8)
    assert (
        weights[1, 0].tolist() == [0.25] * 4 + [0.125] + [0.0] * 3
    )  # one frame of four, the fifth half covered
    assert not weights[[0, 2]].any()


@pytest.mark.parametrize(
    ("size", "count", "detail"),
    [
        ((64, 48), 9, "a.mp4 is 64x48, what it masks 100x60"),
        ((100, 60), 8, "a.mp4 has 8 frames, what it masks 9"),
    ],
)
def test_a_mask_of_another_size_or_length_is_listed_and_its_clip_left_out(
    tmp_path: Path, size: tuple[int, int], count: int, detail: str
) -> None:
    dataset = make_dataset(tmp_path)
    for name in "ab":
        add_clip(tmp_path, name, gradients(9))
    write_video(tmp_path / "masks" / "a.mp4", gradients(count, *size))
    plan = plan_clips(dataset, list_items(dataset), nabla_resize=False)
    assert {clip.item.base_name for clip in plan.clips} == {"b"}
    (skipped,) = plan.skipped
    assert (skipped.name, skipped.reason, skipped.detail) == ("a.mp4", "mask does not fit", detail)
    assert skipped.is_failure


def test_a_mask_that_cannot_be_opened_says_that_it_is_the_mask(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    add_clip(tmp_path, "a", gradients(9))
    (tmp_path / "masks" / "a.png").write_bytes(b"no picture")
    (skipped,) = plan_clips(dataset, list_items(dataset), nabla_resize=False).skipped
    assert skipped.reason == "mask cannot be opened"


def test_items_without_a_mask_and_masks_without_an_item_are_known(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    for name in "ab":
        add_clip(tmp_path, name, gradients(5))
    for name in ("b", "typo"):
        Image.new("L", (100, 60)).save(tmp_path / "masks" / f"{name}.png")
    listing = list_items(dataset)
    assert [item.mask_path is None for item in listing.items] == [True, False]
    assert listing.unmatched_masks == ("typo.png",)


def test_a_mask_folder_that_cannot_be_right_is_refused(tmp_path: Path) -> None:
    dataset = make_dataset(tmp_path)
    add_clip(tmp_path, "a", gradients(5))
    for folder, message in (("nowhere", "no such folder"), ("clips", "into a folder of their own")):
        with pytest.raises(ConfigError, match=rf"mask_directory .*{folder}: .*{message}"):
            list_items(replace(dataset, mask_directory=tmp_path / folder))
    for name in ("a.png", "a.jpg"):
        Image.new("L", (100, 60)).save(tmp_path / "masks" / name)
    with pytest.raises(DataError, match=r"a\.jpg and a\.png are masks of the same name"):
        list_items(dataset)


def test_a_jsonl_line_names_its_mask(tmp_path: Path) -> None:
    make_dataset(tmp_path)
    add_clip(tmp_path, "a", gradients(5))
    Image.new("L", (100, 60)).save(tmp_path / "masks" / "other name.png")
    entry = {"video_path": "clips/a.mp4", "caption": "x", "mask_path": "masks/other name.png"}
    (tmp_path / "v.jsonl").write_text(json.dumps(entry), encoding="utf-8")
    (tmp_path / "d.toml").write_text(
        f"[[datasets]]\nvideo_jsonl_file = '{(tmp_path / 'v.jsonl').as_posix()}'\n"
        f"cache_directory = '{tmp_path.as_posix()}'\n",
        encoding="utf-8",
    )
    dataset = load_dataset_config(tmp_path / "d.toml").datasets[0]
    assert list_items(dataset).items[0].mask_path == tmp_path / "masks" / "other name.png"
    for wrong, message in (
        ("notes.txt", "cannot be the mask"),
        (3, "must be a path"),
        ("http://x/a.png", "URL"),
    ):
        (tmp_path / "notes.txt").touch()
        (tmp_path / "v.jsonl").write_text(json.dumps({**entry, "mask_path": wrong}), encoding="utf-8")
        with pytest.raises(ConfigError, match=rf"line 1: .*{message}"):
            list_items(dataset)
    (tmp_path / "v.jsonl").write_text(json.dumps({**entry, "mask_path": "gone.png"}), encoding="utf-8")
    with pytest.raises(DataError, match=rf"a\.mp4: {MISSING_FILE} \(its mask gone\.png\)"):
        list_items(dataset)
