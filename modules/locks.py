"""Folder locks that are released with their process, however it ends."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from modules.errors import ResourceError
from modules.files import disk_errors, open_own_file
from modules.logs import get_logger

log = get_logger(__name__)

_LOCK_NAME = ".k5_lock"
_POLL_SECONDS = 0.5
_OWNER = re.compile(rb"[0-9]*")
_MAX_OWNER_BYTES = 64


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Hold the lock of `folder`, which is made if missing; waits while another process holds it.

    Raises:
        ResourceError: the folder cannot be written, or its file system does not support locks.
    """
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with disk_errors(folder / _LOCK_NAME):
        stream = open_own_file(folder / _LOCK_NAME)
    with stream:
        _check_owner(stream)
        if not _try_lock(stream):
            log.info("%s is in use by process %s; waiting until it is done", folder, _read_owner(stream))
            while not _try_lock(stream):
                time.sleep(_POLL_SECONDS)
        try:
            _write_owner(stream)
            yield
        finally:
            _unlock(stream)


@contextmanager
def sole_user(path: Path, what: str) -> Iterator[None]:
    """Hold the lock file `path` while the block runs, and remove it then; its folder must exist.

    Processes that this one forks do not hold it, so that it ends with this process alone.

    Raises:
        ResourceError: another process holds it (`what` describes it), the file system has no locks, or
            there is something in its place that is no lock of this program.
    """
    with disk_errors(path):
        stream = open_own_file(path)
    with stream:
        _check_owner(stream)
        if not _try_own_lock(stream):
            raise ResourceError(f"{what} by process {_read_owner(stream)}: end it first, or wait for its end")
        try:
            _write_owner(stream)
            yield
        finally:
            _unlock_own(stream)
    path.unlink(missing_ok=True)  # after an error it stays, which locks nothing


def _check_owner(stream: BinaryIO) -> None:
    """Refuse a file that holds anything but the number of a process: it would be overwritten."""
    stream.seek(1)  # Windows lets nobody read the byte that is locked
    size = os.fstat(stream.fileno()).st_size
    if size and not (1 < size <= _MAX_OWNER_BYTES and _OWNER.fullmatch(stream.read(_MAX_OWNER_BYTES))):
        raise ResourceError(
            f"{stream.name}: is no lock file of this program; move it away, or use another folder"
        )


def _write_owner(stream: BinaryIO) -> None:
    stream.truncate(0)
    stream.write(f" {os.getpid()}".encode())  # the first byte is the one Windows locks
    stream.flush()


def _read_owner(stream: BinaryIO) -> str:
    stream.seek(1)
    return stream.read().decode("ascii", "replace").strip() or "unknown"


def _no_locks(stream: BinaryIO, error: OSError) -> ResourceError:
    return ResourceError(
        f"{stream.name}: cannot be locked ({error.strerror}), as on some network file systems; use a "
        "folder on another file system"
    )


if os.name == "nt":
    import msvcrt

    def _try_lock(stream: BinaryIO) -> bool:
        stream.seek(0)
        try:
            msvcrt.locking(stream.fileno(), msvcrt.LK_NBLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]
        except OSError:
            return False
        return True

    _try_own_lock = _try_lock

    def _unlock(stream: BinaryIO) -> None:
        stream.seek(0)
        msvcrt.locking(stream.fileno(), msvcrt.LK_UNLCK, 1)  # pyright: ignore[reportAttributeAccessIssue]

    _unlock_own = _unlock

else:
    import fcntl

    def _try_lock(stream: BinaryIO) -> bool:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise _no_locks(stream, error) from error
        return True

    def _try_own_lock(stream: BinaryIO) -> bool:
        # This kind of lock belongs to the process: a fork, such as one that reads caches, does not keep it.
        try:
            fcntl.lockf(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            return False
        except OSError as error:
            raise _no_locks(stream, error) from error
        return True

    def _unlock_own(stream: BinaryIO) -> None:
        fcntl.lockf(stream, fcntl.LOCK_UN)

    def _unlock(stream: BinaryIO) -> None:
        fcntl.flock(stream, fcntl.LOCK_UN)
