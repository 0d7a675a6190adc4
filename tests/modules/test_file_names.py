"""A name is refused before hours of work would end at a file that cannot be written."""

from __future__ import annotations

import pytest

from modules.file_names import MAX_NAME_BYTES, name_problem


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "is empty"),
        (" ", "is empty"),
        ("a/b", "plain file name"),
        ("a?", "plain file name"),
        ("a\0b", "U+0000"),
        ("a\nb", "U+000A"),
        ("a\x7fb", "U+007F"),
        ("a\u2028b", "U+2028"),
        ("a\udcff", "UTF-8"),
        ("lora.", "end with a dot"),
        ("lora ", "or a space"),
        ("CON", "device"),
        ("nul", "device"),
        ("Aux.v2", "device"),
        ("com¹", "device"),
        ("lpt1 .x", "device"),
    ],
)
def test_names_that_some_system_cannot_write_are_refused(name: str, words: str) -> None:
    assert words in (name_problem(name, room=0) or "")


@pytest.mark.parametrize("name", ["lora", "猫のLoRA v1.2", ".hidden", "console", "com10", "a-con", "👩‍🚀"])
def test_plain_names_of_all_scripts_are_taken(name: str) -> None:
    assert name_problem(name, room=64) is None


def test_the_length_counts_in_bytes() -> None:
    assert name_problem("日" * 63, room=64) is None
    assert "192 bytes long in UTF-8; at most 191" in (name_problem("日" * 64, room=64) or "")
    assert name_problem("x" * MAX_NAME_BYTES, room=0) is None
