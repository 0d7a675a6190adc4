"""Recognises out-of-memory errors of host memory from any library."""

from __future__ import annotations

import errno
import re
from collections.abc import Iterator

_NO_MEMORY_ON_WINDOWS = (8, 14, 1455)
"""ERROR_NOT_ENOUGH_MEMORY, ERROR_OUTOFMEMORY, ERROR_COMMITMENT_LIMIT ("the paging file is too small")."""
_MESSAGES = re.compile(
    r"DefaultCPUAllocator"  # torch
    r"|not enough memory: you tried to allocate"  # torch on Windows
    r"|can't start new thread|can't allocate lock"  # Python
    r"|ThreadPoolBuildError"  # Rust, which the tokenizers are written in
    r"|std::bad_alloc|bad allocation"
    r"|Cannot allocate memory"  # ENOMEM in the words of the C library, as safetensors and torch quote them
    r"|os error (?:12|1455)\b|WinError (?:8|14|1455)\b"
)
_BYTES = re.compile(r"allocate (\d+) bytes|mmap (\d+) bytes")
_UNITS = re.compile(r"allocate ([\d.]+ [KMGTP]i?B)")


def is_memory_error(error: BaseException) -> bool:
    """Whether this error itself is an out-of-memory error of the host (not of the device)."""
    if isinstance(error, MemoryError):
        return True
    if isinstance(error, OSError) and (
        error.errno == errno.ENOMEM or getattr(error, "winerror", None) in _NO_MEMORY_ON_WINDOWS
    ):
        return True
    return _MESSAGES.search(str(error)) is not None


def memory_error_behind(error: BaseException) -> BaseException | None:
    """The host out-of-memory error that this error is or was raised from; None if there is none."""
    return next((link for link in _causes(error) if is_memory_error(link)), None)


def asked_size(error: BaseException) -> int | str | None:
    """Size of the failed allocation: bytes, or the library's text with a unit, if reported."""
    found = _BYTES.search(str(error))
    if found is not None:
        return int(found[1] or found[2])
    found = _UNITS.search(str(error))
    return None if found is None else found[1]


def _causes(error: BaseException) -> Iterator[BaseException]:
    link: BaseException | None = error
    while link is not None:
        yield link
        link = link.__cause__
