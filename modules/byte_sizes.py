"""Formats byte counts: in GiB, or in MiB where GiB would round to zero."""

from __future__ import annotations

from dataclasses import dataclass

GIB = 2**30
MIB = 2**20


@dataclass(frozen=True, slots=True)
class ByteUnit:
    """The unit of the sizes in a table."""

    name: str
    size: int

    def number(self, count: float) -> str:
        """Bytes in this unit, with two decimals."""
        return f"{count / self.size:.2f}"


def unit_for(largest: float) -> ByteUnit:
    """The unit for sizes up to so many bytes."""
    return ByteUnit("GiB", GIB) if largest >= GIB / 10 else ByteUnit("MiB", MIB)


def size_text(count: float) -> str:
    """Bytes with their unit, such as `14.63 GiB`."""
    unit = unit_for(count)
    return f"{unit.number(count)} {unit.name}"
