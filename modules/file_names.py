"""Names that files can have on every system."""

from __future__ import annotations

import unicodedata

MAX_NAME_BYTES = 255
"""Of ext4, XFS and others; APFS and NTFS count fewer units per name."""
_FORBIDDEN = '/\\:*?"<>|'
_UNSEEN = {"Cc": "a control character", "Zl": "a line separator", "Zp": "a paragraph separator"}
_DEVICES = {
    # Source: "Naming Files, Paths, and Namespaces", learn.microsoft.com/windows/win32/fileio/naming-a-file
    *("CON", "PRN", "AUX", "NUL", "CONIN$", "CONOUT$"),
    *(f"{port}{number}" for port in ("COM", "LPT") for number in "0123456789¹²³"),
}


def name_problem(name: str, *, room: int) -> str | None:
    """What keeps a name from being the beginning of file names on Linux, macOS or Windows; None if nothing.

    Args:
        room: bytes that are added to the name.
    """
    if not name.strip():
        return "is empty"
    if any(character in _FORBIDDEN for character in name):
        return f"must be a plain file name without folders and without any of {_FORBIDDEN}"
    for character in name:
        kind = _UNSEEN.get(unicodedata.category(character))
        if kind is not None:
            return f"holds {kind}, U+{ord(character):04X}"
    try:
        size = len(name.encode("utf-8"))
    except UnicodeEncodeError as error:
        return f"is no text that can be written in UTF-8: {error.reason}"
    if size + room > MAX_NAME_BYTES:
        return f"is {size} bytes long in UTF-8; at most {MAX_NAME_BYTES - room} leave room for what is added"
    if name.endswith((".", " ")):
        return "must not end with a dot or a space"
    if name.partition(".")[0].rstrip().upper() in _DEVICES:
        return "is the name of a device on Windows"
    return None
