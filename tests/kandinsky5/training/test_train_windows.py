"""Windows' rules, kept here by force: no SIGHUP, no fcntl, nothing open is replaced, helpers are spawned."""

from __future__ import annotations

import importlib
import os
import signal
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.step_record import assert_same_results
from tests.kandinsky5.training.training_runs import train

RUNS = "tests.kandinsky5.training.training_runs"
PROJECT = ("kandinsky5", "modules", "networks", "dataset", "kandinsky5_train_network", RUNS)
SAVING = ("--save_state", "--save_every_n_steps", 1, "--save_last_n_steps", 1, "--ema_decay", 0.8)
needs_proc = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="asks Linux what is open")


def is_open(path: Path) -> bool:
    """Whether this process holds the file, or one in the folder, open or mapped."""
    wanted = os.path.realpath(path)
    names = [str(entry.readlink()) for entry in Path("/proc/self/fd").iterdir() if entry.is_symlink()]
    maps = Path("/proc/self/maps").read_text(encoding="utf-8").splitlines()
    names += [line.split(maxsplit=5)[5] for line in maps if len(line.split(maxsplit=5)) == 6]
    return any(name == wanted or name.startswith(f"{wanted}/") for name in names)


def refuse_what_windows_refuses() -> None:
    """From now on, in a forked process only."""
    rename, replace, unlink, fsync = os.rename, os.replace, os.unlink, os.fsync

    def check(*paths: Any) -> None:
        for path in paths:
            if is_open(Path(path)):
                raise PermissionError(
                    13, "The process cannot access the file because it is being used", str(path)
                )

    def strict_rename(source: Any, target: Any, **named: Any) -> None:
        check(source, target)
        if Path(target).exists():
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        rename(source, target, **named)

    def strict_replace(source: Any, target: Any, **named: Any) -> None:
        check(source, target)
        if Path(target).is_dir():
            raise PermissionError(13, "Access is denied", str(target))
        replace(source, target, **named)

    def strict_unlink(path: Any, **named: Any) -> None:
        if "dir_fd" not in named:
            check(path)
        unlink(path, **named)

    def strict_fsync(descriptor: int) -> None:
        if Path(f"/proc/self/fd/{descriptor}").is_dir():
            raise PermissionError(13, "Permission denied")
        fsync(descriptor)

    os.rename, os.replace, os.unlink, os.fsync = strict_rename, strict_replace, strict_unlink, strict_fsync


class LockedFiles:
    """Stands for msvcrt, which locks bytes of a file."""

    LK_NBLCK, LK_UNLCK = 2, 0

    def __init__(self) -> None:
        self.names: set[str] = set()

    def locking(self, descriptor: int, mode: int, _count: int) -> None:
        name = str(Path(f"/proc/self/fd/{descriptor}").readlink())
        if mode == self.LK_UNLCK:
            self.names.remove(name)
        elif name in self.names:
            raise OSError(36, "Resource deadlock avoided")
        else:
            self.names.add(name)


def import_locks_as_on_windows() -> tuple[Any, LockedFiles]:
    """The module of locks where there is msvcrt and no fcntl."""
    locked = LockedFiles()
    sys.modules["msvcrt"] = locked  # pyright: ignore[reportArgumentType]
    sys.modules["fcntl"] = None  # pyright: ignore[reportArgumentType]
    sys.modules.pop("modules.locks", None)
    os.name = "nt"
    locks = importlib.import_module("modules.locks")
    os.name = "posix"
    return locks, locked


def import_as_on_windows() -> types.ModuleType:
    """Import the project again where SIGHUP and fcntl are missing; returns the module with `train`."""
    del signal.SIGHUP
    sys.modules["fcntl"] = None  # pyright: ignore[reportArgumentType]
    for name in list(sys.modules):
        if name.startswith(PROJECT) and (name in PROJECT or name.partition(".")[0] in PROJECT):
            del sys.modules[name]
    assert len(importlib.import_module("modules.interruption")._SIGNALS) == 2
    import_locks_as_on_windows()
    return importlib.import_module(RUNS)


@needs_proc
@pytest.mark.usefixtures("with_report")
def test_a_run_that_saves_replaces_and_resumes_keeps_windows_rules(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    train(dit, dataset, tmp_path / "whole", *SAVING, "--max_train_steps", 5)

    def run() -> None:
        runs = import_as_on_windows()
        refuse_what_windows_refuses()
        words = (*SAVING, "--logging_dir", tmp_path / "logs")
        runs.train(dit, dataset, tmp_path / "out", *words, "--max_train_steps", 1)
        runs.train(dit, dataset, tmp_path / "out", *words, "--max_train_steps", 2, "--overwrite")
        runs.train(dit, dataset, tmp_path / "out", *words, "--max_train_steps", 5, "--resume", "auto")

    log = tmp_path / "log.txt"
    assert fault_kit.wait(fault_kit.start(run, log)) == 0, log.read_text(encoding="utf-8")
    assert "cannot be deleted" not in log.read_text(encoding="utf-8")
    assert_same_results(tmp_path / "out", tmp_path / "whole")
    names = [{path.name for path in (tmp_path / name).iterdir()} for name in ("out", "whole")]
    assert names[0] == names[1]


@needs_proc
def test_the_rules_would_catch_an_open_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"1")
    (tmp_path / "b").write_bytes(b"2")
    with (tmp_path / "b").open("rb"):
        assert is_open(tmp_path / "b")
        assert is_open(tmp_path)
    assert not is_open(tmp_path / "b")


@needs_proc
def test_the_lock_of_a_folder_works_with_windows_means(tmp_path: Path) -> None:
    def run() -> None:
        locks, locked = import_locks_as_on_windows()
        with locks.folder_lock(tmp_path):
            assert len(locked.names) == 1
            with (tmp_path / ".k5_lock").open("a+b") as stream:
                assert not locks._try_lock(stream)
        assert not locked.names

    importlib.import_module("modules.locks")
    log = tmp_path / "log.txt"
    assert fault_kit.wait(fault_kit.start(run, log)) == 0, log.read_text(encoding="utf-8")
