"""Media file extensions, and the frames of a video given as a folder of images."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

Content = Literal["video", "image"]
"""The kind of a dataset's media, and of the prompt template that goes with them."""

IMAGE_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".avif", ".jxl")
VIDEO_EXTENSIONS = (".mp4", ".webm", ".avi", ".mkv", ".mov", ".flv", ".wmv", ".m4v", ".mpg", ".mpeg")


def media_extensions(content: Content) -> tuple[str, ...]:
    """The extensions of a dataset's media, in lower case; any case is taken."""
    return VIDEO_EXTENSIONS if content == "video" else IMAGE_EXTENSIONS


def frame_paths(folder: Path) -> list[Path]:
    """The images of a frame folder in the order they are shown."""
    return sorted(p for p in folder.iterdir() if p.suffix.lower() in IMAGE_EXTENSIONS and p.is_file())
