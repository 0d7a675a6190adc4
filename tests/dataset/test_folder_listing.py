"""Folders as people have them: what looks like media is used or named with a reason; nothing hangs."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

import numpy as np
import pytest
from PIL import Image

from dataset.clips import load_clip, plan_clips
from dataset.config.config import AnyDatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from dataset.confinement import Confinement
from dataset.media.files import IMAGE_EXTENSIONS, UNREAD_EXTENSIONS, VIDEO_EXTENSIONS, natural_order
from dataset.media.frame_folders import frame_paths
from dataset.media.media import MediaError, probe_image
from dataset.media.videos import probe_video
from dataset.sources.items import (
    CAPTION_UNREADABLE,
    IS_FOLDER,
    MISSING_FILE,
    NOT_A_FILE,
    OTHER_CONTENT,
    UNKNOWN_FORMAT,
    SourceListing,
)
from dataset.sources.listing import list_items
from modules.errors import ConfigError
from tests.dataset.media_tools import numbered_frames, numbers_of, write_video


@contextmanager
def no_hang(seconds: int = 20) -> Iterator[None]:
    """A failure instead of a wait without end."""

    def late(_number: int, _frame: FrameType | None) -> None:
        raise AssertionError("it hangs")

    before = signal.signal(signal.SIGALRM, late)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


def image_set(folder: Path) -> ImageDatasetConfig:
    return ImageDatasetConfig(
        index=0,
        origin="dataset.toml line 2",
        cache_directory=folder / "cache",
        image_directory=folder,
        caption_extension=".txt",
    )


def video_set(folder: Path) -> VideoDatasetConfig:
    return VideoDatasetConfig(
        index=1,
        origin="dataset.toml line 5",
        cache_directory=folder / "cache",
        video_directory=folder,
        caption_extension=".txt",
    )


def add(folder: Path, *names: str, caption: bool = True) -> None:
    for name in names:
        (folder / name).write_bytes(b"x")
        if caption:
            (folder / name).with_suffix(".txt").write_text("a cat", encoding="utf-8")


def used(listing: SourceListing) -> list[str]:
    return [item.path.name for item in listing.items]


def reasons(listing: SourceListing) -> dict[str, str]:
    return {entry.name: entry.reason for entry in listing.skipped}


def special_files(folder: Path) -> list[str]:
    """A pipe, a socket, a device and links that never end, by name."""
    os.mkfifo(folder / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        here = Path.cwd()
        os.chdir(folder)  # the path of a socket must be short
        server.bind("socket")
        os.chdir(here)
    (folder / "device").symlink_to("/dev/zero")
    (folder / "circle").symlink_to("circle")
    return ["pipe", "socket", "device", "circle"]


def test_files_of_formats_that_are_not_read_are_listed_with_their_reason(tmp_path: Path) -> None:
    add(tmp_path, "good.png", "scan.psd", "clip.mp4", "page.docx", "bare")
    add(tmp_path, "raw.CR2", caption=False)
    add(tmp_path, "readme.md", "good.json", caption=False)
    (tmp_path / "shot").mkdir()
    (tmp_path / "shot.txt").write_text("frames", encoding="utf-8")
    listing = list_items(image_set(tmp_path))
    assert used(listing) == ["good.png"]
    assert reasons(listing) == {
        "bare": UNKNOWN_FORMAT,
        "clip.mp4": OTHER_CONTENT["video"],
        "page.docx": UNKNOWN_FORMAT,
        "raw.CR2": UNKNOWN_FORMAT,
        "scan.psd": UNKNOWN_FORMAT,
        "shot": IS_FOLDER,
    }
    assert listing.found == 7
    assert len({entry.key for entry in listing.skipped}) == 6
    assert not any(entry.is_failure for entry in listing.skipped)
    assert ".psd" in next(entry.detail for entry in listing.skipped if entry.name == "scan.psd")


def test_what_another_dataset_reads_from_the_folder_is_not_missed(tmp_path: Path) -> None:
    add(tmp_path, "a.png", "b.mp4", "c.psd")
    both: list[AnyDatasetConfig] = [image_set(tmp_path), video_set(tmp_path)]
    for config, name in zip(both, ("a.png", "b.mp4"), strict=True):
        listing = list_items(config, others=both)
        assert (used(listing), reasons(listing)) == ([name], {"c.psd": UNKNOWN_FORMAT})


def test_the_preview_beside_a_clip_is_no_item(tmp_path: Path) -> None:
    add(tmp_path, "a.mp4", "a.jpg", "a.json")
    listing = list_items(video_set(tmp_path))
    assert (used(listing), reasons(listing)) == (["a.mp4"], {})


def test_hidden_files_are_left_out_and_counted(tmp_path: Path) -> None:
    add(tmp_path, "x.png", "._x.png", ".hidden.png")
    (tmp_path / "._x.txt").write_bytes(b"\x00\x05\x16\x07\xff")  # as macOS writes it
    (tmp_path / ".DS_Store").write_bytes(b"x")
    listing = list_items(image_set(tmp_path))
    assert (used(listing), reasons(listing)) == (["x.png"], {})
    (note,) = listing.notes
    assert "4 hidden files are left out: ._x.png, ._x.txt" in note


def test_captions_of_nothing_and_subfolders_with_media_are_said(tmp_path: Path) -> None:
    add(tmp_path, "x.png")
    (tmp_path / "lost.txt").write_text("?", encoding="utf-8")
    for name in ("sub", "cache", "empty"):
        (tmp_path / name).mkdir()
    add(tmp_path / "sub", "y.png")
    add(tmp_path / "cache", "z.png")
    notes = "\n".join(list_items(image_set(tmp_path)).notes)
    assert "1 caption file belongs to no image here: lost.txt" in notes
    assert "1 subfolder with images, not searched" in notes
    assert "sub" in notes.splitlines()[-1]
    assert "cache" not in notes


def test_only_regular_files_are_opened_as_media(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    for name in special_files(tmp_path):
        (tmp_path / name).rename(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text("x", encoding="utf-8")
    (tmp_path / "circle.png").unlink()
    (tmp_path / "circle.png").symlink_to("circle.png")
    with no_hang():
        listing = list_items(image_set(tmp_path))
        config = image_set(tmp_path)
        plan = plan_clips(config, listing, nabla_resize=False)
    assert used(listing) == ["a.png"]
    assert reasons(listing) == dict.fromkeys(
        ("circle.png", "device.png", "pipe.png", "socket.png"), NOT_A_FILE
    )
    assert all(entry.is_failure for entry in listing.skipped)
    assert [entry.name for entry in plan.skipped] == ["a.png"]


def test_only_regular_files_are_opened_as_captions(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    add(tmp_path, "circle.png", "device.png", "gone.png", "pipe.png", "socket.png", caption=False)
    for name in special_files(tmp_path):
        (tmp_path / name).rename(tmp_path / f"{name}.txt")
    (tmp_path / "circle.txt").unlink()
    (tmp_path / "circle.txt").symlink_to("circle.txt")
    (tmp_path / "gone.txt").symlink_to("nowhere")
    add(tmp_path, "folder.png", "large.png", caption=False)
    (tmp_path / "folder.txt").mkdir()
    (tmp_path / "large.txt").write_bytes(b"a" * (2**20 + 1))
    with no_hang():
        listing = list_items(image_set(tmp_path))
    names = ("circle", "device", "folder", "gone", "large", "pipe", "socket")
    assert used(listing) == ["a.png"]
    assert reasons(listing) == {f"{name}.png": CAPTION_UNREADABLE for name in names}
    assert "pipe.txt: a named pipe" in str(listing.skipped[-2])


@pytest.mark.parametrize("content", ["image", "video"])
def test_only_regular_files_are_opened_by_the_readers(tmp_path: Path, content: str) -> None:
    probe = probe_image if content == "image" else probe_video
    for name in special_files(tmp_path):
        with no_hang(), pytest.raises(MediaError, match="cannot be opened"):
            probe(tmp_path / name)


def test_a_jsonl_file_that_names_pipes_or_is_one_does_not_hang(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    names = special_files(tmp_path)
    for name in names[:-1]:
        (tmp_path / name).rename(tmp_path / f"{name}.png")
    (tmp_path / "circle.png").symlink_to("circle.png")
    lines = [
        f'{{"image_path": "{tmp_path.as_posix()}/{name}.png", "caption": "x"}}\n' for name in ("a", *names)
    ]
    (tmp_path / "m.jsonl").write_text("".join(lines), encoding="utf-8")
    os.mkfifo(tmp_path / "n.jsonl")

    def listing(name: str) -> SourceListing:
        config = ImageDatasetConfig(
            index=0, origin="", cache_directory=tmp_path, image_jsonl_file=tmp_path / name
        )
        return list_items(config)

    with no_hang():
        found = listing("m.jsonl")
        with pytest.raises(ConfigError, match="a named pipe"):
            listing("n.jsonl")
    assert used(found) == ["a.png"]
    assert reasons(found) == {f"{name}.png": NOT_A_FILE for name in names}


def test_items_and_frames_come_in_the_order_that_a_person_expects(tmp_path: Path) -> None:
    names = ["2", "10", "a", "B", "c", "frame-1", "frame-02", "frame-3", "frame-10", "frame-10b", "frame-100"]
    assert [p.name for p in sorted(map(Path, reversed(names)), key=natural_order)] == names
    add(tmp_path, *(f"{name}.png" for name in names))
    assert used(list_items(image_set(tmp_path))) == [f"{name}.png" for name in names]
    frames = tmp_path / "frames"
    frames.mkdir()
    for number in (1, 2, 10, 11, 9):
        Image.fromarray(numbered_frames(12)[number]).save(frames / f"f{number}.png")
    (frames / "._f1.png").write_bytes(b"x")
    (frames / "notes.txt").write_bytes(b"x")
    assert [path.name for path in frame_paths(frames)] == [f"f{n}.png" for n in (1, 2, 9, 10, 11)]
    config = VideoDatasetConfig(
        index=0, origin="", cache_directory=tmp_path, video_jsonl_file=tmp_path / "m.jsonl",
        target_frames=(5,), resolution=(64, 48),
    )  # fmt: skip
    (tmp_path / "m.jsonl").write_text(
        f'{{"video_path": "{frames.as_posix()}", "caption": "x"}}', encoding="utf-8"
    )
    (clip,) = plan_clips(config, list_items(config), nabla_resize=False).clips
    assert numbers_of(load_clip(clip)) == [1, 2, 9, 10, 11]


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ("f3.exr", "f3.exr"),
        ("f3.cr2", "format that is not read"),
        ("f2.jpg", "f2.jpg and f2.png are one frame"),
    ],
)
def test_a_clip_is_never_made_of_some_of_its_frames(tmp_path: Path, extra: str, words: str) -> None:
    for name in ("f1.png", "f2.png", extra):
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(MediaError, match=words):
        frame_paths(tmp_path)
    (tmp_path / extra).unlink()
    os.mkfifo(tmp_path / "f3.png")
    with no_hang(), pytest.raises(MediaError, match=r"f3\.png: a named pipe"):
        frame_paths(tmp_path)


@pytest.mark.parametrize(
    "name",
    ["a.ts", "a.MTS", "a.m2ts", "a.3gp", "a.3g2", "a.ogv", "a.vob", "a.mxf", "a.f4v", "a.asf", "a.gif"],
)
def test_videos_of_phones_and_cameras_are_read(tmp_path: Path, name: str) -> None:
    frames = numbered_frames(6)
    path = tmp_path / name
    if name.endswith(".gif"):
        first, *rest = (Image.fromarray(frame) for frame in frames)
        first.save(path, save_all=True, append_images=rest, duration=40)
    else:
        codec = {"a.ogv": "vp8", "a.vob": "mpeg2video", "a.mxf": "mpeg2video", "a.asf": "wmv2"}.get(name)
        write_video(path, frames, codec=codec or "libx264")
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (item,) = list_items(video_set(tmp_path)).items
    assert probe_video(item.path).num_frames == 6


@pytest.mark.parametrize("name", ["a.tif", "a.TIFF", "a.gif", "a.jfif", "a.jpe", "a.heic", "a.heif", "a.hif"])
def test_pictures_of_phones_and_scanners_are_read(tmp_path: Path, name: str) -> None:
    kind = "HEIF" if name.endswith("f") and "h" in name else {"a.heic": "HEIF"}.get(name)
    if kind == "HEIF":
        pytest.importorskip("pillow_heif")
    picture = Image.new("RGB", (64, 48), (200, 40, 60))
    picture.save(tmp_path / name, format=kind or ("JPEG" if "j" in name else None))
    (tmp_path / "a.txt").write_text("x", encoding="utf-8")
    (item,) = list_items(image_set(tmp_path)).items
    assert probe_image(item.path).size == (64, 48)


def test_of_an_animated_image_the_first_picture_is_used_and_a_line_names_it(tmp_path: Path) -> None:
    pictures = [Image.new("RGB", (64, 48), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "b.png", "c.webp"):
        pictures[0].save(tmp_path / name, save_all=True, append_images=pictures[1:])
    pictures[0].save(tmp_path / "d.png")
    for name in "abcd":
        (tmp_path / f"{name}.txt").write_text("x", encoding="utf-8")
    config = image_set(tmp_path)
    plan = plan_clips(config, list_items(config), nabla_resize=False)
    (note,) = plan.notes
    assert "3 images hold several pictures, of which the first is used: a.gif, b.png, c.webp" in note
    for clip in plan.clips:
        assert np.abs(load_clip(clip).reshape(-1, 3).mean(axis=0) - [255, 0, 0]).max() < 8


def test_no_extension_is_both_read_and_not_read() -> None:
    assert not {*IMAGE_EXTENSIONS, *VIDEO_EXTENSIONS} & set(UNREAD_EXTENSIONS)
    assert set(IMAGE_EXTENSIONS) & set(VIDEO_EXTENSIONS) == {".gif"}


def test_a_missing_link_is_still_a_missing_file(tmp_path: Path) -> None:
    add(tmp_path, "a.png")
    (tmp_path / "b.png").symlink_to("gone")
    assert reasons(list_items(image_set(tmp_path))) == {"b.png": MISSING_FILE}


def test_subfolders_are_searched_where_it_is_asked_for(tmp_path: Path) -> None:
    for folder in ("day10/b", "day2", "cache", "masks/day2", "k5_preview", ".hidden", "empty"):
        (tmp_path / folder).mkdir(parents=True)
        add(tmp_path / folder, "a.png")
    add(tmp_path, "top.png")
    add(tmp_path / "day2", "lost.png", caption=False)
    (tmp_path / "day2" / "again").symlink_to(tmp_path)
    (tmp_path / "empty" / "a.png").unlink()
    config = replace(image_set(tmp_path), recursive=True, mask_directory=tmp_path / "masks")
    listing = list_items(config)
    assert [(item.base_name, item.path.relative_to(tmp_path).as_posix()) for item in listing.items] == [
        ("top", "top.png"),
        ("day2~a", "day2/a.png"),
        ("day10~b~a", "day10/b/a.png"),
    ]
    assert [item.mask_path is not None for item in listing.items] == [False, True, False]
    assert [entry.name for entry in listing.skipped] == ["day2~lost.png"]
    assert listing.notes == ("dataset 0: empty~1 caption file belongs to no image here: a.txt",)
    assert listing.unmatched_masks == ()
    assert used(list_items(image_set(tmp_path))) == ["top.png"]
    for name, other in (("settings_hash", image_set(tmp_path).settings_hash),):
        assert getattr(config, name) != other


def test_a_recursive_search_stays_confined(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    inside = tmp_path / "project" / "media" / "sub"
    for folder in (outside, inside):
        folder.mkdir(parents=True)
    add(inside, "a.png")
    config = replace(image_set(tmp_path / "project" / "media"), recursive=True)
    confinement = Confinement.to_folder_of(tmp_path / "project" / "dataset.toml")
    assert [item.base_name for item in list_items(config, confinement=confinement).items] == ["sub~a"]
    (inside / "deep").mkdir()
    (inside / "deep" / "b.png").symlink_to(outside / "b.png")
    with pytest.raises(ConfigError, match="leads out"):
        list_items(config, confinement=confinement)
