"""Folder locks: one holder at a time, and none after the holder's death."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modules.errors import ResourceError
from modules.locks import folder_lock, sole_user

_HOLD = """
import os, sys, time
from pathlib import Path
from modules.locks import folder_lock, sole_user
path = Path(sys.argv[2])
with folder_lock(path) if sys.argv[1] == "folder" else sole_user(path, "in use"):
    if sys.argv[1] == "forked" and os.fork() == 0:
        time.sleep(600)
    print("held", flush=True)
    time.sleep(float(sys.argv[3]))
"""


def _holder(folder: Path, seconds: float, root: Path, kind: str = "folder") -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, kind, str(folder), str(seconds)],
        cwd=root,
        stdout=subprocess.PIPE,
        encoding="utf-8",
        start_new_session=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == "held"
    return process


def test_a_second_process_waits_for_the_first(tmp_path: Path, root: Path) -> None:
    with _holder(tmp_path, 1.0, root) as first, folder_lock(tmp_path):
        assert first.wait(timeout=30) == 0


def test_the_lock_of_a_killed_process_does_not_block(tmp_path: Path, root: Path) -> None:
    with _holder(tmp_path, 600, root) as first:
        first.kill()
        first.wait()
        begin = time.monotonic()
        with folder_lock(tmp_path):
            pass
        assert time.monotonic() - begin < 300  # far below what the killed process would have held it for


def test_the_folder_is_made(tmp_path: Path) -> None:
    with folder_lock(tmp_path / "new" / "folder"):
        assert (tmp_path / "new" / "folder").is_dir()


def test_a_second_user_is_refused_with_the_number_of_the_first(tmp_path: Path, root: Path) -> None:
    lock = tmp_path / "lora.lock"
    with _holder(lock, 600, root, "alone") as first:
        with (
            pytest.raises(ResourceError, match=f"in use by process {first.pid}: "),
            sole_user(lock, "in use"),
        ):
            pass
        first.kill()
        first.wait()
        with sole_user(lock, "in use"):
            assert lock.is_file()
        assert not lock.exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system does not fork")
def test_a_process_that_was_forked_does_not_keep_the_lock_of_its_dead_parent(
    tmp_path: Path, root: Path
) -> None:
    lock = tmp_path / "lora.lock"
    with _holder(lock, 600, root, "forked") as first:
        os.kill(first.pid, signal.SIGKILL)
        first.wait()
        with sole_user(lock, "in use"):
            pass
        os.killpg(first.pid, signal.SIGKILL)


@pytest.mark.skipif(os.name == "nt", reason="Windows locks otherwise")
@pytest.mark.parametrize("code", [errno.ENOTSUP, errno.ENOLCK, errno.ENOSYS])
def test_a_file_system_that_knows_no_locks_is_named(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(code, os.strerror(code))

    for name, lock in (("flock", folder_lock(tmp_path)), ("lockf", sole_user(tmp_path / "run", "in use"))):
        monkeypatch.setattr(f"fcntl.{name}", refuse)
        with pytest.raises(ResourceError, match="cannot be locked") as caught, lock:
            pass
        assert str(tmp_path) in str(caught.value)
