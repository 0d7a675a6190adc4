"""What is written can be read back."""

from __future__ import annotations

import json
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from kandinsky5.sampling.video_files import write_frames, write_png, write_video


def moving_gradient(num_frames: int, height: int, width: int) -> np.ndarray:
    """uint8 [F, H, W, 3]."""
    rows, columns = np.mgrid[0:height, 0:width]
    frames = [
        np.stack([columns * 2 + 4 * t, rows * 2, rows + columns + 3 * t], axis=-1) % 256
        for t in range(num_frames)
    ]
    return np.stack(frames).astype(np.uint8)


def test_a_video_reads_back_with_its_frames_rate_size_and_colours(tmp_path: Path) -> None:
    frames = moving_gradient(17, 96, 64)
    path = tmp_path / "動画.mp4"
    write_video(path, frames, fps=24, metadata={"prompt": "猫"})
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        read = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
        assert stream.codec_context.name == "h264"
        assert stream.pix_fmt == "yuv420p"
        assert (stream.average_rate, len(read), stream.frames) == (24, 17, 17)
        assert json.loads(container.metadata["comment"]) == {"prompt": "猫"}
    assert read[0].shape == (96, 64, 3)
    assert np.abs(read[0].astype(int) - frames[0]).mean() < 3


@pytest.mark.parametrize("num_frames", [1, 2])
def test_short_videos_have_all_their_frames(tmp_path: Path, num_frames: int) -> None:
    write_video(tmp_path / "v.mp4", moving_gradient(num_frames, 32, 32), fps=12)
    with av.open(str(tmp_path / "v.mp4")) as container:
        assert len(list(container.decode(video=0))) == num_frames


def test_the_same_frames_give_the_same_bytes(tmp_path: Path) -> None:
    frames = moving_gradient(9, 64, 64)
    for name in ("a.mp4", "b.mp4"):
        write_video(tmp_path / name, frames, fps=24, metadata={"b": "1", "a": "2"})
    content = (tmp_path / "a.mp4").read_bytes()
    assert content == (tmp_path / "b.mp4").read_bytes()
    assert b"Lavf6" not in content  # no version of the muxing library


def test_quality_follows_crf(tmp_path: Path) -> None:
    frames = moving_gradient(5, 64, 64)
    sizes = []
    for crf in (5, 40):
        write_video(tmp_path / f"{crf}.mp4", frames, fps=24, crf=crf)
        sizes.append((tmp_path / f"{crf}.mp4").stat().st_size)
    assert sizes[0] > sizes[1]


def test_a_failed_encode_leaves_no_file_and_keeps_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "v.mp4"
    path.write_bytes(b"old")
    with pytest.raises((av.FFmpegError, ValueError)):
        write_video(path, moving_gradient(2, 33, 33), fps=24)  # H.264 with yuv420p takes even sides only
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_images_carry_their_pixels_and_settings(tmp_path: Path) -> None:
    frames = moving_gradient(3, 16, 16)
    write_png(tmp_path / "one.png", frames[0], {"prompt": "猫"})
    with Image.open(tmp_path / "one.png") as image:
        assert np.array_equal(np.asarray(image), frames[0])
        assert image.info["prompt"] == "猫"
    paths = write_frames(tmp_path / "many", frames)
    assert [path.name for path in paths] == ["00000.png", "00001.png", "00002.png"]
