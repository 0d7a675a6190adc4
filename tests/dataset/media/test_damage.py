"""Damaged and disguised files: each ends in a read or in a named reason, never in a traceback."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.media.media import UNREADABLE, MediaError, memory_errors, probe_image, read_image
from dataset.media.videos import probe_video, read_frames
from tests.dataset.media_tools import numbered_frames, write_video

IMAGES = ("a.png", "a.jpg", "a.webp", "a.avif", "a.gif", "a.tif", "a.bmp", "a.heic")
VIDEOS = {
    "a.mp4": "libx264",
    "a.mkv": "libx264",
    "a.webm": "libvpx-vp9",
    "a.avi": "mpeg4",
    "a.mov": "mpeg4",
    "a.ts": "mpeg2video",
    "b.gif": "gif",
}


def picture(path: Path) -> Path:
    """A picture with detail, in the format of the name."""
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    image = Image.fromarray(noise).resize((96, 72))
    options = {"compression": "tiff_lzw"} if path.suffix == ".tif" else {}
    image.save(path, **options)
    return path


def clip(path: Path) -> Path:
    """A short clip with the codec that the test gives its container."""
    frames = numbered_frames(8)
    if path.suffix == ".gif":
        images = [Image.fromarray(frame) for frame in frames]
        images[0].save(path, save_all=True, append_images=images[1:], duration=40)
        return path
    return write_video(path, frames, codec=VIDEOS[path.name])


def look(path: Path) -> None:
    """Probe and read a whole file as the planner and the loader do."""
    with memory_errors(path):
        if path.name in IMAGES:
            probe_image(path)
            read_image(path)
        else:
            info = probe_video(path)
            for _ in read_frames(path, info, range(info.num_frames)):
                pass


def zeroed(content: bytearray, rng: random.Random) -> None:
    """Overwrite a run of bytes with zeros, as a lost block of a disk reads."""
    start, count = rng.randrange(len(content)), rng.choice((4, 64, 512))
    content[start : start + count] = bytes(len(content[start : start + count]))


def flipped(content: bytearray, rng: random.Random) -> None:
    """Change eight bytes."""
    for _ in range(8):
        content[rng.randrange(len(content))] ^= 1 + rng.randrange(255)


def truncated(content: bytearray, rng: random.Random) -> None:
    """Cut the end off."""
    del content[rng.randrange(len(content)) :]


def header_flipped(content: bytearray, rng: random.Random) -> None:
    """Change two bytes among the first 200."""
    for _ in range(2):
        content[rng.randrange(min(200, len(content)))] ^= 1 << rng.randrange(8)


MUTATIONS: tuple[Callable[[bytearray, random.Random], None], ...] = (
    zeroed,
    flipped,
    truncated,
    header_flipped,
)


def mutate(path: Path, rounds: int) -> int:
    """Look at `rounds` mutants of a file per kind of damage; returns how many were read all the same."""
    content, read = path.read_bytes(), 0
    for mutation in MUTATIONS:
        rng = random.Random(f"{path.name} {mutation.__name__}")
        for _ in range(rounds):
            mutant = bytearray(content)
            mutation(mutant, rng)
            path.write_bytes(mutant)
            with contextlib.suppress(MediaError):
                look(path)
                read += 1
    return read


@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_damaged_bytes_end_in_a_read_or_in_a_named_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    picture(path) if name in IMAGES else clip(path)
    assert mutate(path, rounds=6) < 6 * len(MUTATIONS)


@pytest.mark.slow
@pytest.mark.parametrize("name", [*IMAGES, *VIDEOS])
def test_many_damaged_files_end_in_a_read_or_in_a_named_reason(tmp_path: Path, name: str) -> None:
    path = tmp_path / name
    picture(path) if name in IMAGES else clip(path)
    mutate(path, rounds=150)


def test_an_avif_with_zeroed_bytes_is_one_damaged_image(tmp_path: Path, media: Path) -> None:
    path = tmp_path / "a.avif"
    Image.open(media / "chelsea.jpg").save(path)
    content, failures = path.read_bytes(), 0
    for start in range(2048, 6144, 256):  # libavif raises RuntimeError for some of them and shows others
        path.write_bytes(content[:start] + bytes(512) + content[start + 512 :])
        try:
            look(path)
        except MediaError:
            failures += 1
    assert failures > 0


@pytest.mark.parametrize(
    "start",
    ["ffconcat version 1.0\nfile {}\n", "\n ffconcat version 1.0\nfile {}\n", "#EXTM3U\n#EXTINF:2,\n{}\n"],
)
def test_a_playlist_is_refused_whatever_its_name(tmp_path: Path, start: str) -> None:
    clip(tmp_path / "a.mp4")
    path = tmp_path / "list.mp4"
    path.write_text(start.format("a.mp4"))
    with pytest.raises(MediaError) as caught:
        probe_video(path)
    assert caught.value.reason == UNREADABLE
    assert "playlist" in caught.value.detail


def test_a_picture_or_text_named_as_a_video_is_refused(tmp_path: Path) -> None:
    Image.new("RGB", (64, 48)).save(tmp_path / "a.png")
    (tmp_path / "a.png").rename(tmp_path / "a.mp4")
    (tmp_path / "b.mp4").write_text("1\n00:00:00,000 --> 00:00:01,000\nsubtitles\n")
    for name in ("a.mp4", "b.mp4"):
        with pytest.raises(MediaError) as caught:
            probe_video(tmp_path / name)
        assert caught.value.reason == UNREADABLE
