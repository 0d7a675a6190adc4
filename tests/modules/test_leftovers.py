"""Unfinished files are removed when nobody works on them: of this machine and of others."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from modules import leftovers
from modules.files import TEMPORARY_PREFIX, atomic_writer, remove_leftover_files
from modules.leftovers import STALE_SECONDS, find_leftovers, machine_mark, temporary_name


@pytest.fixture
def ended_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


@pytest.mark.parametrize(
    ("machine", "is_running", "is_old", "goes"),
    [
        ("here", True, True, False),
        ("here", False, False, True),
        ("m00000000", False, False, False),
        ("m00000000", True, True, True),
        ("", False, False, False),
        ("", True, True, True),
    ],
)
def test_a_process_number_counts_on_its_own_machine_and_age_on_others(
    machine: str, is_running: bool, is_old: bool, goes: bool, ended_process: int, tmp_path: Path
) -> None:
    process = os.getppid() if is_running else ended_process
    owner = {"here": f"{machine_mark()}-", "": ""}.get(machine, f"{machine}-")
    leftover = tmp_path / f"{TEMPORARY_PREFIX}{owner}{process}-0a1b2c3d"
    leftover.write_bytes(b"half")
    if is_old:
        then = time.time() - STALE_SECONDS - 60
        os.utime(leftover, (then, then))
    assert remove_leftover_files(tmp_path) == int(goes)
    assert leftover.exists() is not goes


def test_names_tell_whose_they_are_and_hide_the_host(tmp_path: Path) -> None:
    name = temporary_name(".k5old-", "a-b-state")
    (tmp_path / name).mkdir()
    (tmp_path / ".k5old-other").mkdir()  # of no program that is known
    (found,) = find_leftovers(tmp_path, ".k5old-")
    assert (found.machine, found.process, found.rest) == (machine_mark(), os.getpid(), "a-b-state")
    assert leftovers.platform.node() not in name
    assert len(machine_mark()) == 9


def test_the_mark_is_that_of_a_machine_and_not_of_a_process() -> None:
    code = "from modules.leftovers import machine_mark; print(machine_mark())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert other.stdout.strip() == machine_mark()


def test_a_file_is_not_written_into_a_folder_that_has_gone_unless_asked(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError), atomic_writer(tmp_path / "gone/a", makes_folder=False):
        pass
    assert not (tmp_path / "gone").exists()
    with atomic_writer(tmp_path / "new/a"):
        pass
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a"]
