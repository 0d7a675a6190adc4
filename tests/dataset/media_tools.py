"""Makes the media that tests need and that are too odd to store."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

NUMBER_STEP = 4
"""Brightness per frame number in `numbered_frames`: up to 61 frames."""


def write_video(
    path: Path,
    frames: Sequence[np.ndarray],
    *,
    fps: int | Fraction = 24,
    codec: str = "libx264",
    pts_ms: Sequence[int] | None = None,
    codec_options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
    aspect: Fraction | None = None,
) -> Path:
    """Encode uint8 RGB frames nearly without loss.

    `pts_ms` gives each frame its own time, `aspect` is the width of a pixel divided by its height.
    """
    options = codec_options or ({"crf": "4", "g": "12"} if codec == "libx264" else {})
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt = "yuv444p" if frames[0].shape[1] % 2 or frames[0].shape[0] % 2 else "yuv420p"
        if aspect is not None:
            stream.codec_context.sample_aspect_ratio = aspect
        if codec == "mpeg4":
            stream.bit_rate = 4_000_000
        if pts_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if pts_ms is not None:
                frame.pts, frame.time_base = pts_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbered_frames(count: int, width: int = 64, height: int = 48) -> list[np.ndarray]:
    """Grey frames whose brightness is their number."""
    return [np.full((height, width, 3), 8 + NUMBER_STEP * number, np.uint8) for number in range(count)]


def numbers_of(pixels: np.ndarray) -> list[int]:
    """The frame numbers that a clip of `numbered_frames` shows."""
    return [round((float(frame.mean()) - 8) / NUMBER_STEP) for frame in pixels]


def remux(source: Path, target: Path, *, start_frame: int = 0, **options: str) -> Path:
    """Copy the stream of a video into another container; time zero may be moved to a later frame."""
    with av.open(str(source)) as reader, av.open(str(target), "w", options=options) as writer:
        stream = reader.streams.video[0]
        copy = writer.add_stream_from_template(stream)
        shift = round(start_frame / stream.average_rate / stream.time_base)
        for packet in reader.demux(stream):
            if packet.dts is not None:
                packet.pts, packet.dts = packet.pts - shift, packet.dts - shift
                packet.stream = copy
                writer.mux(packet)
    return target


def set_display_matrix(path: Path, a: int, b: int, c: int, d: int) -> None:
    """Patch the track header of an mp4; a quarter turn clockwise is (0, 1, -1, 0)."""
    content = bytearray(path.read_bytes())
    start = content.find(b"tkhd") + 4 + 4 + 5 * 4 + 8 + 8  # version 0: five words, reserved, layer and volume
    one = 65536
    content[start : start + 36] = struct.pack(">9i", a * one, b * one, 0, c * one, d * one, 0, 0, 0, 1 << 30)
    path.write_bytes(content)


def flip_bytes(path: Path, start: float, count: int = 400) -> None:
    """Invert bytes from a share of the file on."""
    content = bytearray(path.read_bytes())
    first = int(len(content) * start)
    for position in range(first, first + count, 3):
        content[position] ^= 0xFF
    path.write_bytes(content)


def cut_file(path: Path, share: float) -> None:
    """Keep only the first share of a file."""
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
