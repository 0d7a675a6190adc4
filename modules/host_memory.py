"""What memory the machine has beside its devices, and what page-locked memory takes of it."""

from __future__ import annotations

import sys
from pathlib import Path


def available_memory() -> int:
    """Bytes that programs can have, cached files included, where the system tells (Linux), else 0."""
    return _kernel_count("MemAvailable")


def total_memory() -> int:
    """Bytes of memory where the system tells them (Linux), else 0."""
    return _kernel_count("MemTotal")


def _kernel_count(name: str) -> int:
    """A line of /proc/meminfo in bytes; see proc(5)."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def page_locked_size(size: int) -> int:
    """Bytes that torch takes for one page-locked tensor: the next power of two.

    Source: CachingHostAllocator.h of torch 2.13; the setting pinned_max_round_threshold_mb, without limit by
    default, bounds it.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0
