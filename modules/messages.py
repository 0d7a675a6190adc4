"""Shared wording of messages: truncated lists, singular and plural."""

from __future__ import annotations

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
