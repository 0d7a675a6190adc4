"""Leftover temporary files and folders: their owner, and whether it is still active.

Their names are a prefix and `<machine>-<process>-<rest>`. A process number means something only on its own
machine and in its own container; the files of other machines, which may share a folder, are judged by age.
"""

from __future__ import annotations

import functools
import hashlib
import os
import platform
import re
import secrets
import time
from dataclasses import dataclass
from pathlib import Path

STALE_SECONDS = 24 * 3600.0
"""What another machine has not touched for so long, it does not work on any more."""

_OWNER = re.compile(r"((?P<machine>m[0-9a-f]{8})-)?(?P<process>[0-9]+)-(?P<rest>.*)", re.DOTALL)
# Source: winbase.h; PROCESS_QUERY_LIMITED_INFORMATION, STILL_ACTIVE, ERROR_ACCESS_DENIED.
_WINDOWS_QUERY, _WINDOWS_STILL_ACTIVE, _WINDOWS_ACCESS_DENIED = 0x1000, 259, 5


@dataclass(frozen=True, slots=True)
class Leftover:
    """A temporary file or folder."""

    path: Path
    machine: str
    """"" in the names of earlier versions, which lack it."""
    process: int
    rest: str
    """What follows in the name."""

    def is_abandoned(self) -> bool:
        """Whether the process that made it has ended, or has long not touched it, if it ran elsewhere."""
        if self.machine == machine_mark():
            # A process that finds its own number was given it after another one.
            return self.process == os.getpid() or not process_is_running(self.process)
        try:
            return time.time() - self.path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # finished or removed in the meantime
            return False


def temporary_name(prefix: str, rest: str = "") -> str:
    """A name for a temporary file or folder of this process; random unless `rest` is given."""
    return f"{prefix}{machine_mark()}-{os.getpid()}-{rest or secrets.token_hex(4)}"


def find_leftovers(folder: Path, prefix: str) -> list[Leftover]:
    """The temporary files and folders in a folder, by name."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(prefix):
            match = _OWNER.fullmatch(path.name.removeprefix(prefix))
            if match is not None:
                found.append(Leftover(path, match["machine"] or "", int(match["process"]), match["rest"]))
    return found


@functools.cache
def machine_mark() -> str:
    """A hash of host, boot and container, within which process numbers are unique."""
    parts = [platform.node()]
    for place in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        if place.is_symlink():
            parts.append(str(place.readlink()))
        elif place.is_file():
            parts.append(place.read_text(encoding="ascii"))
    return "m" + hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:8]


def process_is_running(pid: int) -> bool:
    """Whether a process with this id is running."""
    if os.name == "nt":  # os.kill(pid, 0) would end the process there
        return _windows_process_is_running(pid)
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _windows_process_is_running(pid: int) -> bool:
    import ctypes

    kernel = vars(ctypes)["windll"].kernel32  # exists on Windows alone
    handle = kernel.OpenProcess(_WINDOWS_QUERY, False, pid)
    if not handle:
        return kernel.GetLastError() == _WINDOWS_ACCESS_DENIED
    code = ctypes.c_ulong()
    known = kernel.GetExitCodeProcess(handle, ctypes.byref(code))
    kernel.CloseHandle(handle)
    return not known or code.value == _WINDOWS_STILL_ACTIVE
