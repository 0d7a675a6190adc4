"""Atomic file writes: a file under its final name is always complete."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from modules.errors import ResourceError
from modules.leftovers import find_leftovers, temporary_name

TEMPORARY_PREFIX = ".k5tmp-"
_FINGERPRINT_PART = 2**20
_NO_FOLDER_SYNC = (errno.EACCES, errno.EPERM, errno.EINVAL, errno.EBADF, errno.ENOTSUP)


@contextmanager
def atomic_writer(path: Path, *, makes_folder: bool = True, replaces: bool = True) -> Iterator[BinaryIO]:
    """Yield a binary file that takes the name `path`, whole and on disk, when the block ends well.

    The file is written under a temporary name in the same folder, flushed, fsync'ed and renamed; its
    permissions follow the umask. On an error nothing is left behind and an older file of that name stays.

    Args:
        makes_folder: make the folder if it is missing; else that is a FileNotFoundError.
        replaces: an older file of that name is replaced; else that is a FileExistsError, even if another
            process has made it in the meantime.
    """
    if makes_folder:
        path.parent.mkdir(parents=True, exist_ok=True)
    # A short random name: the final name may already be as long as the file system allows.
    temporary = path.parent / temporary_name(TEMPORARY_PREFIX)
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        if replaces:
            temporary.replace(path)
        else:
            _rename_to_free(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def open_own_file(path: Path) -> BinaryIO:
    """Open a file of a fixed name for reading and appending; it is made if missing.

    What stands in its place is never followed or changed: anybody may have put a link there. The name must be
    that of a regular file which no other name shares.

    Raises:
        OSError: it is a link, a pipe or the like, or cannot be opened.
    """
    flags = os.O_RDWR | os.O_APPEND | os.O_CREAT
    for name in ("O_NOFOLLOW", "O_NONBLOCK", "O_CLOEXEC", "O_BINARY"):  # each system has some of them
        flags |= getattr(os, name, 0)
    if path.is_symlink():
        raise _foreign(path, "is a link")
    try:
        descriptor = os.open(path, flags, 0o666)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise _foreign(path, "is a link") from error
        raise
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode) or found.st_nlink > 1:
        os.close(descriptor)
        what = "is no regular file" if not stat.S_ISREG(found.st_mode) else "is a file of several names"
        raise _foreign(path, what)
    return io.FileIO(str(path), "a+", opener=lambda *_: descriptor)


def _foreign(path: Path, what: str) -> OSError:
    words = f"{what}, which this program did not make; remove it, or use another folder"
    return OSError(errno.EEXIST, words, str(path))


def _rename_to_free(temporary: Path, path: Path) -> None:
    """Rename a file to a name that nothing has, in one operation of the file system.

    Raises:
        FileExistsError: something has the name.
    """
    if os.name == "nt":  # a rename takes no name that is in use there
        temporary.rename(path)
        return
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: two processes could still meet here
        if path.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(path)) from None
        temporary.replace(path)
    else:
        temporary.unlink()


@contextmanager
def disk_errors(path: Path, then: str = "", *, what: str = "") -> Iterator[None]:
    """Within the block, an error of the system while writing into `path` becomes a message.

    Args:
        then: what to do once there is space again, as the end of the message.
        what: how the message names `path`, such as its option.
    Raises:
        ResourceError: instead of OSError: no space, no permission, and the like.
    """
    try:
        yield
    except OSError as error:
        advice = f". Free some space or check the folder, then {then}." if then else ""
        name = f"{what} {path}" if what else f"{path}"
        raise ResourceError(f"{name} cannot be written: {error.strerror or error}{advice}") from error


def make_writable_folder(folder: Path, what: str) -> None:
    """Make a folder if it is missing, and prove with a trial file that it can be written.

    Args:
        what: how the message names the folder, such as its option.
    Raises:
        ResourceError: there is a file in its place, or the system refuses.
    """
    _check_is_folder(folder, what)
    with disk_errors(folder, what=what):
        trial = folder / temporary_name(TEMPORARY_PREFIX, "trial")
        with atomic_writer(trial) as stream:
            stream.write(b"k5")
        trial.unlink()


def check_folder_unwritten(folder: Path, what: str) -> None:
    """Refuse a folder that could not be made or written, as far as this can be checked without writing.

    Args:
        what: how the message names the folder, such as its option.
    Raises:
        ResourceError: the folder, or the one it would be made in, is a file or not writable for this user.
    """
    _check_is_folder(folder, what)
    nearest = nearest_existing(folder)
    if not os.access(nearest, os.W_OK):
        raise ResourceError(f"{what} {folder}: {nearest} cannot be written")


def _check_is_folder(folder: Path, what: str) -> None:
    nearest = nearest_existing(folder)
    if not nearest.is_dir():
        raise ResourceError(f"{what} {folder}: {nearest} is a file; name a folder")


def nearest_existing(folder: Path) -> Path:
    """The folder itself, or the nearest one above it that exists."""
    absolute = folder.absolute()
    return next(path for path in (absolute, *absolute.parents) if path.exists())


def check_free_space(folder: Path, need: int) -> None:
    """Refuse a disk that is too full, before anything is written.

    Args:
        folder: where `need` bytes are to go; it need not exist yet.
    Raises:
        ResourceError: fewer bytes are free there.
    """
    free = shutil.disk_usage(nearest_existing(folder)).free
    if free < need:
        raise ResourceError(
            f"{folder}: {free / 2**20:.0f} MB are free on this disk, {need / 2**20:.0f} MB are needed"
        )


def last_part(path: Path) -> str:
    """The name of a file or folder, in either system's spelling of paths on either system."""
    return str(path).replace("\\", "/").rstrip("/").rpartition("/")[2]


def file_fingerprint(path: Path) -> str:
    """Identifies a large file without reading it whole: by its size, its first and last MiB.

    Raises:
        OSError: the file cannot be read.
    """
    digest = hashlib.sha256()
    size = path.stat().st_size
    with path.open("rb") as stream:
        digest.update(stream.read(_FINGERPRINT_PART))
        if size > _FINGERPRINT_PART:
            stream.seek(max(_FINGERPRINT_PART, size - _FINGERPRINT_PART))
            digest.update(stream.read(_FINGERPRINT_PART))
    return f"{size}-{digest.hexdigest()[:32]}"


def write_text(path: Path, text: str, *, makes_folder: bool = True) -> None:
    """Write UTF-8 text with LF line ends as one whole file."""
    with atomic_writer(path, makes_folder=makes_folder) as stream:
        stream.write(text.encode("utf-8"))


def write_new_text(path: Path, text: str) -> bool:
    """Write UTF-8 text as one whole file unless something has that name; returns whether it was written."""
    temporary = path.parent / temporary_name(TEMPORARY_PREFIX)
    write_text(temporary, text)
    try:
        os.link(temporary, path)  # unlike a rename, this never replaces
    except FileExistsError:
        return False
    except OSError:  # a file system without hard links
        if os.path.lexists(path):
            return False
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)
    return True


def write_json(path: Path, value: Any, *, makes_folder: bool = True) -> None:
    """Write a JSON file whose bytes depend on the value alone."""
    text = json.dumps(value, indent=1, sort_keys=True, ensure_ascii=False) + "\n"
    write_text(path, text, makes_folder=makes_folder)


def remove_leftover_files(folder: Path) -> int:
    """Delete what killed processes left half-written in `folder`; returns how many files went.

    A file that another process may still write is left alone.
    """
    abandoned = [
        leftover.path for leftover in find_leftovers(folder, TEMPORARY_PREFIX) if leftover.is_abandoned()
    ]
    for path in abandoned:
        path.unlink(missing_ok=True)
    return len(abandoned)


def sync_folder(folder: Path) -> None:
    """Flush a folder's directory entries to disk, where the system supports it."""
    if os.name == "nt":  # folders cannot be opened for fsync there; the rename itself is journalled
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
    except OSError as error:
        # Some network and user-space file systems have no fsync of folders; other errors are the disk's.
        if error.errno not in _NO_FOLDER_SYNC:
            raise
