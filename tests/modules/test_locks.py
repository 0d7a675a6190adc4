"""Folder locks: one holder at a time, and none after the holder's death."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from modules.locks import folder_lock

_HOLD = "import sys, time; from pathlib import Path; from modules.locks import folder_lock\n"
_HOLD += "with folder_lock(Path(sys.argv[1])):\n    print('held', flush=True); time.sleep(float(sys.argv[2]))"


def _holder(folder: Path, seconds: float, root: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(folder), str(seconds)],
        cwd=root,
        stdout=subprocess.PIPE,
        encoding="utf-8",
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
