"""Reports the host memory of the machine and the size of pinned allocations."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from pathlib import Path

CGROUP_ROOT = Path("/sys/fs/cgroup")
CGROUPS = Path("/proc/self/cgroup")
"""The control groups of this process; see cgroups(7)."""


def available_memory() -> int:
    """Bytes available to this program, cached files included; 0 except on Linux and Windows.

    In a container it is bounded by the container's limit.
    """
    if sys.platform == "win32":
        return _windows_memory().available
    free = (max(limit - used, 0) for limit, used in _cgroup_limits())
    return min((_kernel_count("MemAvailable"), *free))


def total_memory() -> int:
    """Bytes of physical memory; 0 except on Linux and Windows."""
    if sys.platform == "win32":
        return _windows_memory().total
    return min((_kernel_count("MemTotal"), *(limit for limit, _ in _cgroup_limits())))


def _kernel_count(name: str) -> int:
    """A line of /proc/meminfo in bytes; see proc(5)."""
    if sys.platform != "linux":
        return 0
    lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)


def _cgroup_limits() -> Iterator[tuple[int, int]]:
    """(limit, use) of this process's control group and those around it, in bytes, where one has a limit.

    Source: "Memory Interface Files" in the kernel's cgroup-v2.rst, memory.txt of cgroup-v1. Cached files
    count as used there although they give way.
    """
    if sys.platform != "linux":
        return
    for folder, (limit_name, use_name, cached_name) in _cgroup_folders():
        try:
            limit = (folder / limit_name).read_text(encoding="ascii").strip()
            use = int((folder / use_name).read_text(encoding="ascii"))
            counts = (folder / "memory.stat").read_text(encoding="ascii").split()
        except OSError:  # the root has no limits, and a container may hide what is around it
            continue
        if limit != "max":
            cached = int(counts[counts.index(cached_name) + 1]) if cached_name in counts else 0
            yield int(limit), use - cached


def _cgroup_folders() -> Iterator[tuple[Path, tuple[str, str, str]]]:
    """Folders with the names of the files for limit and use and of the line for cached files."""
    if not CGROUPS.is_file():
        return
    for line in CGROUPS.read_text(encoding="utf-8").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            root, names = CGROUP_ROOT, ("memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            root = CGROUP_ROOT / "memory"
            names = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        place = root / path.lstrip("/")
        for folder in (place, *place.parents):
            if folder.is_relative_to(root):
                yield folder, names


class _WindowsMemory(ctypes.Structure):
    """MEMORYSTATUSEX of the Windows API."""

    _fields_ = (
        ("length", ctypes.c_uint32),
        ("load", ctypes.c_uint32),
        *(
            (name, ctypes.c_uint64)
            for name in (
                "total",
                "available",
                "total_page_file",
                "available_page_file",
                "total_virtual",
                "available_virtual",
                "available_extended",
            )
        ),
    )
    total: int
    available: int


def _windows_memory() -> _WindowsMemory:
    status = _WindowsMemory(length=ctypes.sizeof(_WindowsMemory))
    if not ctypes.windll.kernel32.GlobalMemoryStatusEx(ctypes.byref(status)):  # type: ignore[attr-defined]
        raise ctypes.WinError()  # type: ignore[attr-defined]
    return status


def page_locked_size(size: int) -> int:
    """Bytes that torch allocates for one pinned tensor: the next power of two.

    Source: CachingHostAllocator.h of torch 2.13; the setting pinned_max_round_threshold_mb, without limit by
    default, bounds it.
    """
    return 1 << (size - 1).bit_length() if size > 0 else 0
