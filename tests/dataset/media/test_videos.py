"""Videos: the right frames, upright, and damaged files found instead of shortened."""

from __future__ import annotations

import itertools
import shutil
import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from av.stream import Disposition
from PIL import Image

from dataset.media.files import VIDEO_EXTENSIONS
from dataset.media.frames import are_even, resample_by_time
from dataset.media.media import DAMAGED, TOO_LARGE, UNREADABLE, MediaError
from dataset.media.videos import VideoInfo, probe_video, read_frames
from tests.dataset.media_tools import (
    cut_file,
    flip_bytes,
    numbered_frames,
    numbers_of,
    remux,
    set_display_matrix,
    write_video,
)


def read_all(path: Path) -> np.ndarray:
    """Every frame of a video."""
    info = probe_video(path)
    return np.stack([frame for _, frame in read_frames(path, info, range(info.num_frames))])


def refused(path: Path) -> MediaError:
    """The error that a damaged file ends in."""
    with pytest.raises(MediaError) as caught:
        read_all(path)
    assert str(path.parent) not in caught.value.detail
    return caught.value


@pytest.fixture
def bunny(tmp_path: Path, media: Path) -> Path:
    """A private copy of a real clip, with its index in front so that cutting leaves it readable."""
    return remux(media / "bunny_25fps_49f.mp4", tmp_path / "bunny.mp4", movflags="faststart")


def test_a_real_clip_is_described_from_its_packets(media: Path) -> None:
    info = probe_video(media / "bunny_25fps_49f.mp4")
    assert (info.size, info.num_frames, info.fps) == ((640, 360), 49, 25)


@pytest.mark.parametrize(
    ("name", "codec", "options"),
    [
        ("a.mp4", "libx264", {"crf": "4", "bf": "3", "g": "12"}),
        ("a.mp4", "libx264", {"crf": "4", "bf": "3", "g": "10", "x264-params": "open-gop=1"}),
        ("a.mkv", "libx264", {"crf": "4", "bf": "2"}),
        ("a.webm", "libvpx-vp9", {"crf": "4", "b": "0"}),
        ("a.webm", "libvpx", {"crf": "4", "b": "4M", "auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("a.avi", "mpeg4", {}),
        ("a.mpg", "mpeg2video", {"bf": "2", "b": "4M"}),
        ("a.mov", "libx265", {"crf": "4", "x265-params": "log-level=none:open-gop=1"}),
    ],
)
def test_frames_come_in_presentation_order_and_are_all_there(
    tmp_path: Path, name: str, codec: str, options: dict[str, str]
) -> None:
    path = write_video(tmp_path / name, numbered_frames(60), codec=codec, codec_options=options, fps=25)
    assert numbers_of(read_all(path)) == list(range(60))


def test_seeking_to_a_late_frame_gives_the_same_pixels(bunny: Path) -> None:
    everything = read_all(bunny)
    info = probe_video(bunny)
    late = dict(read_frames(bunny, info, [40, 43]))
    assert all(np.array_equal(everything[number], frame) for number, frame in late.items())
    assert sorted(late) == [40, 43]


def test_a_video_that_does_not_start_at_zero_loses_nothing(tmp_path: Path) -> None:
    times = [5000 + 40 * n for n in range(20)]
    path = write_video(tmp_path / "a.mkv", numbered_frames(20), fps=25, pts_ms=times)
    assert numbers_of(read_all(path)) == list(range(20))


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"crf": "4", "bf": "3", "g": "12"}),
        ("libx265", {"crf": "4", "x265-params": "log-level=none:open-gop=1:keyint=12:min-keyint=12"}),
    ],
)
def test_frames_before_an_edit_list_are_not_shown(
    tmp_path: Path, codec: str, options: dict[str, str]
) -> None:
    """What cutting without encoding leaves behind: the frames from the last key frame on, hidden."""
    source = write_video(tmp_path / "a.mp4", numbered_frames(50), fps=25, codec=codec, codec_options=options)
    path = remux(source, tmp_path / "b.mp4", start_frame=5, avoid_negative_ts="disabled")
    info = probe_video(path)
    assert info.num_frames == 45
    assert numbers_of(read_all(path)) == list(range(5, 50))
    assert numbers_of(np.stack([frame for _, frame in read_frames(path, info, [40])])) == [45]


def test_uneven_times_are_kept_and_choose_the_frames(tmp_path: Path) -> None:
    times = [0, 20, 40, 240, 260, 280, 480, 500]
    path = write_video(tmp_path / "a.mkv", numbered_frames(8), pts_ms=times)
    info = probe_video(path)
    assert info.times == tuple(Fraction(t, 1000) for t in times)
    assert not are_even(info.times)
    assert resample_by_time(info.times) == [0, 3, 4, 6, 7]


@pytest.mark.parametrize(
    "matrix",
    [(1, 0, 0, 1), (0, 1, -1, 0), (-1, 0, 0, -1), (0, -1, 1, 0), (-1, 0, 0, 1), (1, 0, 0, -1), (0, 1, 1, 0)],
)
def test_the_display_matrix_is_applied_before_anything_is_measured(
    tmp_path: Path, matrix: tuple[int, int, int, int]
) -> None:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:16, :16] = 255  # top left
    path = write_video(tmp_path / "a.mp4", [frame] * 3)
    set_display_matrix(path, *matrix)
    a, b, c, d = matrix
    width, height = (64, 48) if a else (48, 64)
    assert probe_video(path).size == (width, height)
    shown = read_all(path)[0]
    # The matrix moves the corner (0, 0) of a picture that starts at the origin again afterwards.
    left = (a or c) > 0
    top = (d or b) > 0
    assert shown[4 if top else height - 5, 4 if left else width - 5].min() > 200
    assert shown[height - 5 if top else 4, width - 5 if left else 4].max() < 50


def test_a_quarter_turn_is_clockwise(tmp_path: Path) -> None:
    frame = np.zeros((48, 64, 3), np.uint8)
    frame[:, :32] = 255  # the left half is at the top after a turn clockwise
    path = write_video(tmp_path / "a.mp4", [frame])
    set_display_matrix(path, 0, 1, -1, 0)
    shown = read_all(path)[0]
    assert shown[:24].mean() > 220
    assert shown[-24:].mean() < 30


def test_odd_sizes_are_read(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mkv", numbered_frames(3, 85, 49))
    assert probe_video(path).size == (85, 49)
    assert read_all(path).shape == (3, 49, 85, 3)


def test_an_empty_file_and_noise_cannot_be_opened(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    path.write_bytes(b"")
    assert refused(path).detail == "the file is empty"
    path.write_bytes(np.random.default_rng(0).bytes(20_000))
    assert refused(path).reason == UNREADABLE


def test_sound_alone_is_no_video(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    assert refused(path).detail == "holds no video"


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8, 0.97])
@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_a_cut_file_is_damaged_before_anything_is_decoded(bunny: Path, suffix: str, share: float) -> None:
    path = remux(
        bunny, bunny.with_name(f"cut{suffix}"), **({"movflags": "faststart"} if suffix != ".mkv" else {})
    )
    cut_file(path, share)
    with pytest.raises(MediaError) as caught:
        probe_video(path)
    assert caught.value.reason in {DAMAGED, UNREADABLE}


@pytest.mark.parametrize(("name", "codec"), [("a.avi", "mpeg4"), ("a.webm", "libvpx-vp9"), ("a.flv", "flv")])
def test_other_containers_do_not_get_shorter_either(tmp_path: Path, name: str, codec: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (40, 48, 64, 3), dtype=np.uint8)
    path = write_video(tmp_path / name, list(noise), codec=codec)
    assert len(read_all(path)) == 40
    cut_file(path, 0.6)
    assert refused(path).reason in {DAMAGED, UNREADABLE}


@pytest.mark.parametrize("start", [0.5, 0.6, 0.75])
def test_frames_that_the_decoder_had_to_guess_are_refused(bunny: Path, start: float) -> None:
    flip_bytes(bunny, start, 2500)
    assert refused(bunny).reason == DAMAGED


def test_damage_behind_the_wanted_frames_is_not_decoded(bunny: Path) -> None:
    """`head` must not pay for the rest of the file."""
    flip_bytes(bunny, 0.75, 2500)
    info = probe_video(bunny)
    assert len(list(read_frames(bunny, info, range(5)))) == 5


def test_a_video_keeps_its_frames_when_renamed_to_an_odd_name(tmp_path: Path, media: Path) -> None:
    for name in ("日本 語 🐈.mp4", "-dash %d [x].mp4", "file:colon.mp4"):
        path = Path(shutil.copy(media / "coffee_pan_24fps_49f.mp4", tmp_path / name))
        assert probe_video(path).num_frames == 49


@pytest.mark.parametrize("tag", ["00:00:0000000001/0", "00:00:1e999999999", "::", "an hour"])
def test_a_duration_tag_that_is_no_time_promises_nothing(tmp_path: Path, tag: str) -> None:
    path = write_video(tmp_path / "a.mkv", numbered_frames(5))
    content = path.read_bytes()
    start = content.index(b"00:00:00.")  # FFmpeg reserves 18 characters
    path.write_bytes(content[:start] + tag.encode().ljust(18, b"\0") + content[start + 18 :])
    with av.open(str(path)) as container:
        assert container.streams.video[0].metadata["DURATION"] == tag
    assert numbers_of(read_all(path)) == list(range(5))


def test_every_listed_video_container_is_read(tmp_path: Path) -> None:
    codecs = {".wmv": "wmv2", ".flv": "flv", ".ogv": "libvpx", ".webm": "libvpx", ".mpg": "mpeg2video"}
    codecs |= dict.fromkeys((".mpeg", ".mts", ".vob", ".mxf"), "mpeg2video")
    codecs |= {".avi": "mpeg4", ".asf": "wmv2"}
    for extension in VIDEO_EXTENSIONS:
        path = tmp_path / f"a{extension}"
        frames = numbered_frames(6)
        if extension == ".gif":
            images = [Image.fromarray(frame) for frame in frames]
            images[0].save(path, save_all=True, append_images=images[1:], duration=40)
        else:
            codec = codecs.get(extension, "libx264")
            options = {"b": "4M", "qmin": "1", "qmax": "4"} if codec != "libx264" else None
            write_video(path, frames, codec=codec, codec_options=options)
        path = path.rename(tmp_path / f"b{extension.upper()}")
        info = probe_video(path)
        assert info.num_frames == 6, extension
        assert numbers_of(read_all(path)) == list(range(6)), extension


@pytest.mark.parametrize(
    ("name", "codec"),
    [
        ("a.mp4", "libx264"),
        ("a.mkv", "libx264"),
        ("a.webm", "libvpx-vp9"),
        ("a.webm", "libvpx"),
        ("a.wmv", "msmpeg4"),
        ("a.avi", "mpeg4"),
        ("a.flv", "flv"),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_the_shortest_videos_are_whole(tmp_path: Path, name: str, codec: str, count: int) -> None:
    path = write_video(tmp_path / name, numbered_frames(count), codec=codec)
    assert probe_video(path).num_frames == count
    assert len(read_all(path)) == count


def test_a_start_after_zero_is_not_missed_at_the_end(tmp_path: Path) -> None:
    """Fragmented files with B-frames start late and count that into their length."""
    path = tmp_path / "a.mp4"
    options = {"movflags": "dash+frag_keyframe+global_sidx"}
    write_video(path, numbered_frames(40), codec_options={"bf": "3", "g": "12"}, container_options=options)
    with av.open(str(path)) as container:
        assert container.streams.video[0].start_time
    assert probe_video(path).num_frames == 40


def test_a_last_frame_that_is_shown_long_is_not_the_end_of_a_cut_file(tmp_path: Path) -> None:
    """As screen recordings end; FLV has no other word on it than the length of the whole."""
    path = tmp_path / "a.flv"
    write_video(path, numbered_frames(6), codec="flv", pts_ms=[0, 40, 80, 120, 160, 200])
    content = bytearray(path.read_bytes())
    at = content.index(b"duration") + len(b"duration") + 1
    content[at : at + 8] = struct.pack(">d", 2.5)
    path.write_bytes(content)
    assert probe_video(path).num_frames == 6


def with_cover(path: Path, *, has_video: bool) -> Path:
    """An MP4 with a white cover picture, listed last by its reader, and a black clip of 3 frames or none."""
    with av.open(str(path), "w") as container:

        def add(codec: str, brightness: int, count: int) -> list[av.Packet]:
            stream = container.add_stream(codec, rate=24)
            stream.width, stream.height = 64, 48
            stream.pix_fmt = "yuvj420p" if codec == "mjpeg" else "yuv420p"
            if codec == "mjpeg":
                stream.disposition = Disposition.attached_pic
            picture = np.full((48, 64, 3), brightness, np.uint8)
            frames = [av.VideoFrame.from_ndarray(picture, format="rgb24") for _ in range(count)]
            for number, frame in enumerate(frames):
                frame.pts = number
            return [packet for frame in (*frames, None) for packet in stream.encode(frame)]

        plan = [("mjpeg", 255, 1)] + ([("libx264", 0, 3)] if has_video else [])
        packets = [add(*entry) for entry in plan]
        for packet in itertools.chain(*packets):
            container.mux(packet)
    return path


def test_a_cover_picture_leaves_the_video_alone(tmp_path: Path) -> None:
    path = with_cover(tmp_path / "a.mp4", has_video=True)
    assert probe_video(path).num_frames == 3
    assert read_all(path).mean() < 20


def test_a_song_with_a_cover_picture_is_no_video(tmp_path: Path) -> None:
    path = with_cover(tmp_path / "a.mp4", has_video=False)
    assert refused(path).detail == "holds no video but a cover picture"


def test_hidden_colours_of_transparent_video_are_not_seen(tmp_path: Path) -> None:
    path = tmp_path / "a.mov"
    pixels = np.zeros((48, 64, 4), np.uint8)
    pixels[:, :32] = (255, 0, 0, 255)
    pixels[:, 32:] = (0, 255, 0, 0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("qtrle", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "argb"
        container.mux(
            stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgba").reformat(format="argb"))
        )
        container.mux(stream.encode())
    shown = read_all(path)[0]
    assert shown[10, 10].tolist() == [255, 0, 0]
    assert shown[10, 50].tolist() == [255, 255, 255]
    assert probe_video(path).treatment == "-over-white"


def test_pixels_that_are_not_square_are_scaled_to_the_shape_that_is_shown(tmp_path: Path) -> None:
    def shown(aspect: Fraction, *, turned: bool = False) -> tuple[VideoInfo, np.ndarray]:
        path = write_video(tmp_path / "a.mp4", numbered_frames(2, 64, 64), aspect=aspect)
        if turned:
            set_display_matrix(path, 0, 1, -1, 0)
        return probe_video(path), read_all(path)

    info, plain = shown(Fraction(1))
    assert (info.size, info.treatment) == ((64, 64), "")
    info, wide = shown(Fraction(16, 9))
    assert (info.size, info.treatment, wide.shape) == ((114, 64), "-square114x64", (2, 64, 114, 3))
    assert numbers_of(wide) == [0, 1]
    info, turned = shown(Fraction(16, 9), turned=True)
    assert (info.size, turned.shape) == ((64, 114), (2, 114, 64, 3))
    assert shown(Fraction(3, 4))[0].size == (64, 85)
    info, rounded = shown(Fraction(200, 201))  # what encoders write for sizes that do not divide
    assert info.size == (64, 64)
    assert np.array_equal(rounded, plain)


def test_pixels_of_an_absurd_shape_are_refused(tmp_path: Path) -> None:
    path = write_video(tmp_path / "a.mp4", numbered_frames(1, 640, 480), aspect=Fraction(16, 9))
    content = bytearray(path.read_bytes())
    at = content.index(b"pasp") + 4
    content[at : at + 8] = struct.pack(">II", 3000, 1)
    path.write_bytes(content)
    assert refused(path).reason == TOO_LARGE
