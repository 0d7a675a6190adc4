"""What memory the machine has beside its devices, and what page-locked memory takes of it."""

from __future__ import annotations

import os
import sys


def free_memory() -> int:
    """Bytes of free memory where the system tells them (Linux), else 0."""
    return _pages("SC_AVPHYS_PAGES")


def total_memory() -> int:
    """Bytes of memory where the system tells them (Linux), else 0."""
    return _pages("SC_PHYS_PAGES")


def _pages(name: str) -> int:
    if sys.platform != "linux":
        return 0
    return os.sysconf(name) * os.sysconf("SC_PAGE_SIZE")


def page_locked_size(size: int) -> int:
    """Bytes that torch takes for one page-locked tensor: the next power of two.

    Source: CachingHostAllocator.h of torch 2.13; the setting pinned_max_round_threshold_mb, without limit by
    default, bounds it.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0
