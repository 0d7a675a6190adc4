"""Media file extensions, which files are hidden, and the order of names."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path
from typing import Literal

Content = Literal["video", "image"]
"""The kind of a dataset's media, and of the prompt template that goes with them."""

IMAGE_EXTENSIONS = (
    *(".png", ".jpg", ".jpeg", ".jpe", ".jfif", ".webp", ".bmp", ".gif", ".tif", ".tiff"),
    *(".avif", ".heic", ".heif", ".hif", ".jxl"),
)
VIDEO_EXTENSIONS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".wmv", ".asf", ".flv", ".f4v", ".mpg", ".mpeg"),
    *(".ts", ".mts", ".m2ts", ".3gp", ".3g2", ".ogv", ".vob", ".mxf", ".gif"),
)
UNREAD_EXTENSIONS = (
    *(".3fr", ".arw", ".cr2", ".cr3", ".dng", ".nef", ".nrw", ".orf", ".pef", ".raf", ".raw", ".rw2", ".srw"),
    *(".ai", ".dds", ".eps", ".exr", ".hdr", ".ico", ".j2k", ".jp2", ".pbm", ".pcx", ".pdf", ".pgm", ".ppm"),
    *(".psb", ".psd", ".qoi", ".svg", ".tga", ".xcf"),
    *(".braw", ".divx", ".h264", ".h265", ".hevc", ".insv", ".ivf", ".m2v", ".mjpeg", ".r3d", ".rm", ".rmvb"),
    *(".swf", ".y4m"),
)
"""Pictures and videos of formats that are not read: they are listed as skipped, with or without a caption."""

Kind = Content | Literal["unread"]


def media_extensions(content: Content) -> tuple[str, ...]:
    """The extensions of a dataset's media, in lower case; any case is taken."""
    return VIDEO_EXTENSIONS if content == "video" else IMAGE_EXTENSIONS


def media_kind(path: Path, content: Content) -> Kind | None:
    """What a file is by its extension, in a dataset of this content; None: no picture and no video."""
    extension = path.suffix.lower()
    if extension in media_extensions(content):
        return content
    if extension in UNREAD_EXTENSIONS:
        return "unread"
    other: Content = "image" if content == "video" else "video"
    return other if extension in media_extensions(other) else None


def is_hidden(path: Path) -> bool:
    """Whether a file is one that systems write for themselves, such as `._clip.mp4` of macOS."""
    return path.name.startswith(".")


def natural_order(path: Path) -> tuple[object, ...]:
    """Sorts paths as a person does: frame2 before frame10, and upper case among lower case."""
    return _numbers_by_value(path.stem), _numbers_by_value(path.suffix), path.name


def _numbers_by_value(text: str) -> tuple[tuple[int, str], ...]:
    """Text and numbers by turns, which compare with their like; a number by its length, then its digits."""
    folded = unicodedata.normalize("NFC", text).casefold()
    parts = re.split("([0-9]+)", folded)
    digits = (part.lstrip("0") for part in parts)
    return tuple(
        (len(number), number) if position % 2 else (0, part)
        for position, (part, number) in enumerate(zip(parts, digits, strict=True))
    )
