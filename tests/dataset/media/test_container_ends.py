"""Cut files: containers that FFmpeg would read as shorter ones."""

from __future__ import annotations

from pathlib import Path

import av
import pytest

from dataset.media.container_ends import ends_early
from dataset.media.media import DAMAGED, MediaError
from dataset.media.videos import probe_video
from tests.dataset.media_tools import numbered_frames, write_video

FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof"}
INDEXED = {"movflags": "dash+frag_keyframe+global_sidx"}
LIVE = {"live": "1"}


def made(path: Path, options: dict[str, str]) -> tuple[bytes, str]:
    """A video of 24 frames in several fragments, and FFmpeg's name of its container."""
    codec = {".webm": "libvpx-vp9", ".flv": "flv"}.get(path.suffix, "libx264")
    frames = numbered_frames(24)
    codec_options = {"g": "6", "bf": "2"} if codec == "libx264" else {"g": "6"}
    write_video(path, frames, codec=codec, codec_options=codec_options, container_options=options)
    with av.open(str(path)) as container:
        return path.read_bytes(), container.format.name


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("a.mp4", {}),
        ("a.mp4", {"movflags": "faststart"}),
        ("a.mp4", FRAGMENTED),
        ("a.mp4", INDEXED),
        ("a.mov", {}),
        ("a.mkv", {}),
        ("a.mkv", LIVE),
        ("a.webm", {}),
        ("a.webm", LIVE),
        ("a.flv", {}),
        ("a.avi", {}),
    ],
)
def test_whole_files_are_whole_and_so_are_bytes_behind_them(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    path = tmp_path / name
    content, format_name = made(path, options)
    assert not ends_early(path, format_name)
    assert probe_video(path).num_frames == 24
    path.write_bytes(content + bytes(100))
    assert not ends_early(path, format_name)


@pytest.mark.parametrize(("name", "options"), [("a.webm", LIVE), ("a.mkv", LIVE), ("a.mp4", INDEXED)])
def test_a_live_or_indexed_file_is_never_taken_for_a_shorter_one(
    tmp_path: Path, name: str, options: dict[str, str]
) -> None:
    path = tmp_path / name
    content, _ = made(path, options)
    for share in range(4, 40):
        path.write_bytes(content[: len(content) * share // 40])
        try:
            info = probe_video(path)
        except MediaError:
            continue
        assert info.num_frames == 24  # only what lies behind the frames is missing


def test_a_fragment_that_the_file_does_not_hold_is_missed(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    content, format_name = made(path, FRAGMENTED)
    second = content.index(b"moof", content.index(b"moof") + 4) - 4
    data = content.index(b"mdat", second) - 4
    end = data + int.from_bytes(content[data : data + 4], "big")
    for cut in (second + 5, second + 20, data, data + 5, data + 30, end - 1):
        path.write_bytes(content[:cut])
        assert ends_early(path, format_name), cut
    for whole in (second, end):  # nothing promises that there is more
        path.write_bytes(content[:whole])
        assert not ends_early(path, format_name)


def test_an_flv_is_missed_its_end_within_a_tag(tmp_path: Path) -> None:
    path = tmp_path / "a.flv"
    content, _ = made(path, {})
    last = len(content) - 4 - int.from_bytes(content[-4:], "big")
    for cut in (last + 2, last + 8, last + 30, len(content) - 1):
        path.write_bytes(content[:cut])
        with pytest.raises(MediaError) as caught:
            probe_video(path)
        assert caught.value.reason == DAMAGED


def test_index_boxes_that_make_no_sense_promise_nothing(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    for body in (b"", b"\0" * 10, b"\1" + b"\0" * 20, b"\0" * 22 + b"\xff\xff"):
        path.write_bytes((8 + len(body)).to_bytes(4, "big") + b"sidx" + body + b"\0\0\0\x08mdat")
        assert not ends_early(path, "mov,mp4,m4a,3gp,3g2,mj2")
