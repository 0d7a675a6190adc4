"""Amounts of memory are told in a unit that shows something."""

from __future__ import annotations

from modules.byte_sizes import GIB, MIB, size_text, unit_for


def test_small_amounts_are_told_in_mib() -> None:
    assert size_text(14.63 * GIB) == "14.63 GiB"
    assert size_text(GIB // 10 + 1) == "0.10 GiB"
    assert size_text(3 * MIB) == "3.00 MiB"
    assert (unit_for(GIB).number(MIB), unit_for(MIB).number(MIB)) == ("0.00", "1.00")
