"""Processes forked from this one, which start at once, and disks that fail at the n-th operation."""

from __future__ import annotations

import errno
import io
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch

Fault = Literal["full", "killed", "count"]

KILLED = 137
_EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree")


def start(action: Callable[[], object], log: Path) -> int:
    """Run `action` in a fork of this process with its own process group; returns its number.

    Its exit code is that of a script: SystemExit's, 0, or 1 with the traceback in `log`.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        _run_and_leave(action, log)
    # Here as well as there: the group must exist when this returns. It may have ended already.
    with suppress(PermissionError, ProcessLookupError):
        os.setpgid(pid, pid)
    return pid


def _run_and_leave(action: Callable[[], object], log: Path) -> NoReturn:
    code = 1
    try:
        os.setpgid(0, 0)
        # A fork has lost torch's thread pool, which two threads at once must not make again.
        torch.set_num_threads(torch.get_num_threads())
        signal.signal(signal.SIGINT, signal.default_int_handler)
        for number in (signal.SIGTERM, signal.SIGHUP):  # `nohup` may have switched one off for the tests
            signal.signal(number, signal.SIG_DFL)
        sys.stdout = sys.stderr = log.open("a", encoding="utf-8")
        for handler in logging.getLogger("k5").handlers:
            if isinstance(handler, logging.StreamHandler):
                handler.stream = sys.stderr  # pytest's may be closed
        action()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 60.0) -> int:
    """Exit code of a process that was started; minus the signal's number if one ended it.

    Raises:
        AssertionError: it has not ended after so many seconds; it is killed.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found, status = os.waitpid(pid, os.WNOHANG)
        if found:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.002)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    raise AssertionError(f"process {pid} did not end within {seconds:g} s")


class FaultyDisk:
    """Counts what a process does to a folder, and lets operation `number` fail.

    Installed for good: only in a forked process. Operations are opening, writing, fsync, renaming, making and
    removing. A write that fails has written half. "full" raises ENOSPC once, "killed" ends the process.
    """

    def __init__(self, folder: Path, number: int, fault: Fault) -> None:
        self.folder = str(folder)
        self.number, self.fault = number, fault
        self.done: list[str] = []

    def install(self) -> None:
        """From now on."""
        sys.addaudithook(self._audit)
        fsync, plain_open = os.fsync, io.open

        def counted_fsync(descriptor: int) -> None:
            self._operation("fsync")
            fsync(descriptor)

        def counted_open(file: Any, mode: str = "r", *arguments: Any, **named: Any) -> Any:
            stream = plain_open(file, mode, *arguments, **named)
            if isinstance(file, int) or not str(file).startswith(self.folder) or mode in ("r", "rb"):
                return stream
            return _CountedStream(stream, self)

        os.fsync, io.open = counted_fsync, counted_open

    def _audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        if event in _EVENTS and arguments and str(arguments[0]).startswith(self.folder):
            self._operation(event)

    def _operation(self, name: str) -> None:
        if self.is_due(name):
            self.fail()

    def is_due(self, name: str) -> bool:
        """Count one operation; whether it is the one that fails."""
        self.done.append(name)
        return len(self.done) == self.number

    def fail(self) -> NoReturn:
        """What the disk, or the machine, does at that operation."""
        if self.fault == "killed":
            os._exit(KILLED)
        raise OSError(errno.ENOSPC, "No space left on device")


class _CountedStream:
    """A file whose writes are counted; all else is the file's own."""

    def __init__(self, stream: Any, disk: FaultyDisk) -> None:
        self._stream, self._disk = stream, disk

    def write(self, piece: Any) -> int:
        if self._disk.is_due("write"):
            half = (
                memoryview(piece)[: len(piece) // 2]
                if not isinstance(piece, str)
                else piece[: len(piece) // 2]
            )
            self._stream.write(half)
            self._stream.flush()
            self._disk.fail()
        return self._stream.write(piece)

    def __enter__(self) -> _CountedStream:
        self._stream.__enter__()
        return self

    def __exit__(self, *arguments: Any) -> None:
        self._stream.__exit__(*arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)
