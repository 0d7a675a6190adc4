"""Unfinished files and folders of other processes: whose they are, and whether anybody still works on them.

Their names are a prefix and `<machine>-<process>-<rest>`. A process number tells something on its own machine
alone, and in its own container: of other machines, which may share a folder, only the age does.
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
class Stray:
    """An unfinished file or folder."""

    path: Path
    machine: str
    """"" where the name does not say it, as earlier versions did not."""
    process: int
    rest: str
    """What follows in the name."""

    def is_abandoned(self) -> bool:
        """Whether the process that made it has ended, or has long not touched it, if it ran elsewhere."""
        if self.machine == machine_mark():
            # A process that finds its own number has got it after another one.
            return self.process == os.getpid() or not process_is_running(self.process)
        try:
            return time.time() - self.path.stat().st_mtime > STALE_SECONDS
        except FileNotFoundError:  # somebody has finished or removed it meanwhile
            return False


def stray_name(prefix: str, rest: str = "") -> str:
    """A name for something unfinished of this process; a random one unless `rest` is given."""
    return f"{prefix}{machine_mark()}-{os.getpid()}-{rest or secrets.token_hex(4)}"


def find_strays(folder: Path, prefix: str) -> list[Stray]:
    """What lies in a folder under unfinished names."""
    found = []
    for path in sorted(folder.iterdir()) if folder.is_dir() else ():
        if path.name.startswith(prefix):
            match = _OWNER.fullmatch(path.name.removeprefix(prefix))
            if match is not None:
                found.append(Stray(path, match["machine"] or "", int(match["process"]), match["rest"]))
    return found


@functools.cache
def machine_mark() -> str:
    """Names where process numbers come from, without telling it: host, its start, and container."""
    parts = [platform.node()]
    for place in (Path("/proc/sys/kernel/random/boot_id"), Path("/proc/self/ns/pid")):
        if place.is_symlink():
            parts.append(str(place.readlink()))
        elif place.is_file():
            parts.append(place.read_text(encoding="ascii"))
    return "m" + hashlib.sha256("\n".join(parts).encode("utf-8")).hexdigest()[:8]


def process_is_running(pid: int) -> bool:
    """Whether a process with this number lives."""
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
