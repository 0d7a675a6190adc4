"""Reads caption files."""

from __future__ import annotations

import re
from pathlib import Path

from dataset.sources.items import CAPTION_NOT_UTF8, CAPTION_UNREADABLE, NO_CAPTION, SkippedItem
from modules.path_kinds import path_kind

MAX_CAPTION_BYTES = 2**20
"""A text file of a million letters is no caption."""


def read_caption(media: Path, path: Path) -> str | SkippedItem:
    """The whole text of a caption file, or why its item is skipped; only regular files are opened."""
    found = path_kind(path)
    if found.kind == "missing" and not path.is_symlink():
        return SkippedItem(name=media.name, reason=NO_CAPTION, detail=f"{path.name} does not exist")
    if found.kind != "file":
        return _unreadable(media, path, found.words)
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_CAPTION_BYTES + 1)
        if len(raw) > MAX_CAPTION_BYTES:
            return _unreadable(media, path, f"is larger than {MAX_CAPTION_BYTES // 2**20} MiB")
        return _caption_text(raw)
    except UnicodeDecodeError as error:
        detail = f"{path.name}, byte {error.start}; save it as UTF-8"
        return SkippedItem(name=media.name, reason=CAPTION_NOT_UTF8, detail=detail, is_failure=True)
    except OSError as error:
        return _unreadable(media, path, error.strerror or "read error")


def _unreadable(media: Path, path: Path, why: str) -> SkippedItem:
    return SkippedItem(
        name=media.name, reason=CAPTION_UNREADABLE, detail=f"{path.name}: {why}", is_failure=True
    )


def _caption_text(raw: bytes) -> str:
    """The caption, with line breaks as on Linux whatever they are in the file.

    Raises:
        UnicodeDecodeError: it is not UTF-8, or only by accident: UTF-16 without its mark, whose Latin letters
            are read as themselves with a NUL beside each. A NUL here and there is part of the caption.
    """
    text = raw.decode("utf-8-sig")
    if raw and raw.count(0) * 4 >= len(raw):
        first = raw.index(0)
        raise UnicodeDecodeError("utf-8", raw, first, first + 1, "every other byte is 0")
    return re.sub("\r\n?", "\n", text).strip()


def caption_lines(text: str) -> tuple[str, ...]:
    """One caption per line; lines without text are no captions, unless there is nothing else."""
    lines = tuple(line.strip() for line in text.split("\n") if line.strip())
    return lines or ("",)
