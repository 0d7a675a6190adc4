"""What a path leads to, found without opening it: only regular files are ever opened."""

from __future__ import annotations

import difflib
import errno
import os
import re
import stat
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from modules.file_names import MAX_NAME_BYTES

Kind = Literal["file", "folder", "missing", "special", "unreachable"]
"""`special`: a pipe, a socket or a device, whose opening or reading may never end."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
"""A model of the Hugging Face hub, where no folder has this name."""
_MAX_PATH_CHARACTERS = 4095
_IS_IT_TEXT = "Is this a caption or a prompt in the place of a path?"
_SPECIAL = {
    stat.S_IFIFO: "a named pipe, not a file",
    stat.S_IFSOCK: "a socket, not a file",
    stat.S_IFCHR: "a device, not a file",
    stat.S_IFBLK: "a device, not a file",
}


@dataclass(frozen=True, slots=True)
class PathKind:
    """The kind of thing that a path leads to, links followed."""

    kind: Kind
    words: str
    """For a message: "no such file"; "" for a regular file."""


def path_kind(path: Path) -> PathKind:
    """What `path` leads to; whatever the path is, this neither opens it nor raises."""
    try:
        mode = path.stat().st_mode
    except OSError as error:
        return _unreached(path, error)
    except ValueError as error:  # a NUL, or half a character
        return PathKind("unreachable", f"is no possible path ({error})")
    if stat.S_ISREG(mode):
        return PathKind("file", "")
    if stat.S_ISDIR(mode):
        return PathKind("folder", "is a folder, not a file")
    return PathKind("special", _SPECIAL.get(stat.S_IFMT(mode), "not a regular file"))


def file_problem(path: Path) -> str | None:
    """Why a path cannot be opened as a file, for a message; None if it is a regular file."""
    found = path_kind(path)
    return None if found.kind == "file" else found.words


def missing_problem(path: Path, what: str = "file or folder") -> str | None:
    """Why the path of an option leads nowhere, with the nearest name beside it; None if it leads somewhere.

    Args:
        what: is expected there.
    """
    found = path_kind(path)
    if found.kind in ("file", "folder"):
        return None
    if found.kind != "missing" or os.path.islink(path):  # noqa: PTH114 - never raises
        return found.words
    return f"no such {what}{nearest_name(path)}"


def nearest_name(path: Path) -> str:
    """Text to append to a message about a missing path: "; did you mean a/b?", or nothing."""
    parts = path.parts
    for count in range(1, len(parts) + 1):  # the first part that is not there
        step = Path(*parts[:count])
        if path_kind(step).kind == "missing":
            try:
                names = [entry.name for entry in step.parent.iterdir()]
            except OSError:
                return ""
            nearest = difflib.get_close_matches(step.name, names, n=1)
            return f"; did you mean {step.parent.joinpath(nearest[0], *parts[count:])}?" if nearest else ""
    return ""


def name_length_problem(path: Path) -> str | None:
    """What makes a path too long for this system, with a hint at text in its place; None if nothing does."""
    if sys.platform != "win32" and len(str(path)) > _MAX_PATH_CHARACTERS:
        return f"is no path: it has {len(str(path))} characters. {_IS_IT_TEXT}"
    for part in path.parts:
        size = _name_size(part)
        if size > MAX_NAME_BYTES:
            unit = "bytes" if _counts_bytes() else "characters"
            return (
                f"is no path: {part[:40]}... has {size} {unit}, file names have at most {MAX_NAME_BYTES}. "
                f"{_IS_IT_TEXT}"
            )
    return None


def _counts_bytes() -> bool:
    return sys.platform not in ("win32", "darwin")  # NTFS and APFS count UTF-16 units


def _name_size(name: str) -> int:
    # A byte that is no UTF-8 is one character in Python and becomes one "?" here.
    return (
        len(name.encode("utf-8", "replace"))
        if _counts_bytes()
        else len(name.encode("utf-16-le", "replace")) // 2
    )


def _unreached(path: Path, error: OSError) -> PathKind:
    if error.errno in {errno.ENOENT, errno.ENOTDIR}:
        return PathKind("missing", "a link that leads nowhere" if os.path.islink(path) else "no such file")  # noqa: PTH114 - never raises
    if error.errno == errno.ELOOP:
        return PathKind("unreachable", "a link that leads in a circle")
    if error.errno == errno.ENAMETOOLONG:
        return PathKind("unreachable", name_length_problem(path) or "is longer than paths may be here")
    return PathKind("unreachable", f"cannot be read: {error.strerror or error}")
