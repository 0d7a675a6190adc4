"""Frames to files: H.264 video, single images, folders of images; written atomically and reproducibly."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace, Interpolation
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from modules.errors import ResourceError
from modules.files import atomic_writer, sync_folder
from modules.leftovers import find_leftovers, temporary_name

DEFAULT_CRF = 14
_CODEC = "libx264"
_BT709 = 1
"""Colour primaries and transfer function in ITU-T H.273."""
# The encoder's output depends on its number of threads: a fixed one gives equal files on every machine.
_ENCODER_THREADS = "4"
_FRAMES_PREFIX = ".k5frames-"


def check_video_encoder() -> None:
    """Check before the first step that videos can be written.

    Raises:
        ResourceError: this PyAV comes without the H.264 encoder.
    """
    if _CODEC not in av.codecs_available:
        raise ResourceError(
            f"PyAV {av.__version__} has no {_CODEC} encoder: reinstall it with "
            "`pip install --force-reinstall av`, or write frames with --output_type images"
        )


def write_video(
    path: Path,
    frames: np.ndarray,
    *,
    fps: int | Fraction,
    crf: int = DEFAULT_CRF,
    metadata: Mapping[str, str] | None = None,
    replaces: bool = True,
) -> None:
    """Write an .mp4: H.264, yuv420p, BT.709 with limited range, which every player supports.

    Args:
        frames: uint8 [F, H, W, 3], even sides.
        crf: constant quality, 0 (lossless) to 51.
        metadata: stored as JSON in the file's comment.
        replaces: see `atomic_writer`.
    Raises:
        av.FFmpegError, OSError: the encoder or the disk failed; no file is left.
    """
    # bitexact keeps the library's version out of the file, faststart lets players begin before the end.
    options = {"movflags": "faststart", "fflags": "+bitexact"}
    with (
        atomic_writer(path, replaces=replaces) as stream,
        av.open(stream, "w", format="mp4", options=options) as container,
    ):
        if metadata:
            container.metadata["comment"] = json.dumps(dict(metadata), ensure_ascii=False, sort_keys=True)
        video = container.add_stream(
            _CODEC, rate=Fraction(fps), options={"crf": str(crf), "threads": _ENCODER_THREADS}
        )
        video.height, video.width = frames.shape[1:3]
        video.pix_fmt = "yuv420p"
        context = video.codec_context
        context.colorspace, context.color_range = Colorspace.ITU709, ColorRange.MPEG
        context.color_primaries = context.color_trc = _BT709
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24").reformat(
                format="yuv420p",
                src_color_range=ColorRange.JPEG,
                dst_color_range=ColorRange.MPEG,
                dst_colorspace=Colorspace.ITU709,
                interpolation=Interpolation.AREA,  # measured: loses least of the colour
            )
            frame.pts = index
            frame.time_base = 1 / Fraction(fps)
            container.mux(video.encode(frame))
        container.mux(video.encode(None))


def write_png(
    path: Path, pixels: np.ndarray, metadata: Mapping[str, str] | None = None, *, replaces: bool = True
) -> None:
    """Write one image; pixels uint8 [H, W, 3], metadata as text entries."""
    info = PngInfo()
    for key in sorted(metadata or {}):
        info.add_itxt(key, (metadata or {})[key])
    with atomic_writer(path, replaces=replaces) as stream:
        Image.fromarray(pixels).save(stream, format="png", pnginfo=info)


def write_frames(folder: Path, frames: np.ndarray, metadata: Mapping[str, str] | None = None) -> list[Path]:
    """Write frames uint8 [F, H, W, 3] as 00000.png, 00001.png, ... into a new folder, visible once complete.

    Raises:
        FileExistsError: something of that name is there.
        OSError: the disk failed; nothing new is left.
    """
    names = [f"{index:05d}.png" for index in range(len(frames))]
    building = folder.parent / temporary_name(_FRAMES_PREFIX)
    building.mkdir(parents=True)
    try:
        for name, pixels in zip(names, frames, strict=True):
            write_png(building / name, pixels, metadata)
        _rename_folder(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise
    sync_folder(folder.parent)
    return [folder / name for name in names]


def _rename_folder(building: Path, folder: Path) -> None:
    try:
        building.rename(folder)
    except OSError as error:
        # A folder takes the place of an empty one alone; systems differ in what they raise.
        if folder.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(folder)) from error
        raise


def remove_leftover_frames(folder: Path) -> None:
    """Delete the frames that killed processes left half-written in `folder`."""
    for leftover in find_leftovers(folder, _FRAMES_PREFIX):
        if leftover.is_abandoned():
            # What cannot be deleted now is so at the next start.
            shutil.rmtree(leftover.path, ignore_errors=True)
