"""The frames of a video given as a folder of images, in the order in which they are shown."""

from __future__ import annotations

from pathlib import Path

from dataset.media.files import is_hidden, media_kind, natural_order
from dataset.media.media import DAMAGED, UNREADABLE, MediaError
from modules.messages import names_in_short
from modules.path_kinds import file_problem


def frame_paths(folder: Path) -> list[Path]:
    """The images of a frame folder: hidden files and files that are no pictures are not among them.

    Raises:
        MediaError: there is none, one of them cannot be read, or two files are the same frame. A clip is
            never made of the rest: its frames would not follow each other.
    """
    try:
        entries = [path for path in folder.iterdir() if not is_hidden(path)]
    except OSError as error:
        raise MediaError(folder, UNREADABLE, error.strerror or "read error") from error
    kinds = {path: media_kind(path, "image") for path in sorted(entries, key=natural_order)}
    unread = [path.name for path, kind in kinds.items() if kind == "unread"]
    if unread:
        raise MediaError(folder, UNREADABLE, f"frames of a format that is not read: {names_in_short(unread)}")
    frames = [path for path, kind in kinds.items() if kind == "image"]
    if not frames:
        raise MediaError(folder, UNREADABLE, "the folder holds no images")
    for path in frames:
        problem = file_problem(path)
        if problem is not None:
            raise MediaError(folder, UNREADABLE, f"{path.name}: {problem}")
    _refuse_twins(folder, frames)
    return frames


def _refuse_twins(folder: Path, frames: list[Path]) -> None:
    first: dict[str, Path] = {}
    for path in frames:
        other = first.setdefault(path.stem, path)
        if other is not path:
            raise MediaError(folder, DAMAGED, f"{other.name} and {path.name} are one frame; keep one of them")
