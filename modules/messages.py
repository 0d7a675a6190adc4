"""Shared wording of messages: truncated lists, singular and plural."""

from __future__ import annotations

import unicodedata
from collections.abc import Collection

MAX_NAMES = 5
"""In a sentence."""
MAX_LINES = 10
"""Below each other."""


def shortened(entries: Collection[object], limit: int = MAX_NAMES) -> list[str]:
    """The first entries as text and, if there are more, "... and 3 more" as the last one.

    Join them with ", " for a sentence; for lines of their own the limit is MAX_LINES.
    """
    shown = [str(entry) for entry, _ in zip(entries, range(limit), strict=False)]
    return [*shown, f"... and {len(entries) - limit} more"] if len(entries) > limit else shown


def names_in_short(names: Collection[object]) -> str:
    """Names in a sentence: "a, b, c, d, e, ... and 3 more"."""
    return ", ".join(shortened(names))


def lines_in_short(entries: Collection[object]) -> str:
    """Entries on indented lines of their own, the last of which says how many more there are."""
    return "\n".join(f"  {line}" for line in shortened(entries, MAX_LINES))


def counted(count: int, one: str, many: str | None = None) -> str:
    """A number and what it counts: "1 clip", "2 clips".

    Args:
        many: the words after any other number than 1, if they are not `one` and an s.
    """
    return f"{count} {one if count == 1 else many or one + 's'}"


def duration_text(seconds: float) -> str:
    """A length of time for people: "40 s", "25 min", "3.5 h"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"


_STEERING = {"Cc", "Zl", "Zp"}
_DIRECTION = set("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def visible(text: str) -> str:
    """A text for the console: what would steer the terminal or turn its lines round is shown as an escape.

    Names of files and captions are anybody's text. Line feeds and tabs stay.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_escaped(c) if _steers(c) and c not in "\n\t" else c for c in text)


def visible_name(name: str) -> str:
    """A file name within a line: `visible`, and on one line."""
    return "".join(_escaped(c) if _steers(c) else c for c in name)


def _steers(character: str) -> bool:
    return unicodedata.category(character) in _STEERING or character in _DIRECTION


def _escaped(character: str) -> str:
    code = ord(character)
    return f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}"  # none of these lies above U+FFFF
