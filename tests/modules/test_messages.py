"""Lists in messages end with how many entries are not shown; numbers agree with what they count."""

from __future__ import annotations

from modules.messages import counted, lines_in_short, names_in_short, shortened


def test_a_short_list_is_shown_whole_and_a_long_one_says_how_many_are_left() -> None:
    assert names_in_short(["a", "b"]) == "a, b"
    assert names_in_short(list("abcde")) == "a, b, c, d, e"
    assert names_in_short(dict.fromkeys("abcdefg", 0)) == "a, b, c, d, e, ... and 2 more"
    assert not names_in_short([])


def test_lines_are_indented_and_there_may_be_ten() -> None:
    assert lines_in_short([1, 2]) == "  1\n  2"
    assert lines_in_short(range(13)).splitlines()[-2:] == ["  9", "  ... and 3 more"]
    assert shortened(range(3), 2) == ["0", "1", "... and 1 more"]


def test_numbers_agree_with_what_they_count() -> None:
    assert [counted(n, "clip") for n in (0, 1, 2)] == ["0 clips", "1 clip", "2 clips"]
    assert counted(1, "item was skipped", "items were skipped") == "1 item was skipped"
    assert counted(2, "item was skipped", "items were skipped") == "2 items were skipped"
