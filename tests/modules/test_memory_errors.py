"""A lack of host memory is recognised in the words of every library, and nothing else is."""

from __future__ import annotations

import ctypes
import errno
import struct
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from modules import host_memory
from modules.command_line import user_errors
from modules.errors import ConfigError, ModelFileError, ResourceError
from modules.host_memory import available_memory, total_memory
from modules.memory_errors import asked_size, is_memory_error, memory_error_behind

TOO_MUCH = 2**55


def caught(action: object) -> Exception:
    with pytest.raises(Exception) as found:  # noqa: PT011  of any kind: it is looked at
        action()  # type: ignore[operator]
    return found.value


class Panic(BaseException):
    """What a panic of Rust code, such as the tokenizers', is in Python."""


def windows_error(number: int) -> OSError:
    error = OSError(errno.EINVAL, "The paging file is too small for this operation to complete")
    error.winerror = number  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (MemoryError(), None),
        (caught(lambda: bytearray(2**62)), None),
        (caught(lambda: torch.empty(TOO_MUCH, dtype=torch.uint8)), TOO_MUCH),
        (caught(lambda: np.empty(2**55, np.uint8)), "32.0 PiB"),
        (RuntimeError("can't start new thread"), None),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), None),
        (windows_error(1455), None),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:117] data. DefaultCPUAllocator: not enough memory: "
                      "you tried to allocate 16777216 bytes."), 2**24),
        (RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"), 4096),
        (OSError("Cannot allocate memory (os error 12)"), None),
        (RuntimeError("std::bad_alloc"), None),
        (Panic("The global thread pool has not been initialized.: ThreadPoolBuildError"), None),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_a_lack_of_memory_is_recognised_with_its_size(error: BaseException, size: int | str | None) -> None:
    assert is_memory_error(error)
    assert asked_size(error) == size


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        torch.AcceleratorError("CUDA error: an illegal memory access was encountered"),
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("The size of tensor a (3) must match the size of tensor b (4)"),
        KeyError("memory"),
    ],
    ids=lambda error: str(error)[:40],
)
def test_other_errors_are_not_taken_for_it(error: Exception) -> None:
    assert not is_memory_error(error)


def test_the_shortage_behind_an_error_of_ours_is_found() -> None:
    error = ModelFileError("weights.pt: cannot be read")
    error.__cause__ = RuntimeError("DefaultCPUAllocator: can't allocate memory")
    assert memory_error_behind(error) is error.__cause__
    assert memory_error_behind(ModelFileError("weights.pt: cannot be read")) is None


def printed(error: BaseException, capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[object, str]:
    helping = ("--batch_size 1: fewer at once",)
    with pytest.raises(SystemExit) as stop, user_errors(argv, saves_host_memory=helping):
        raise error
    return stop.value.code, capsys.readouterr().err


def test_a_script_ends_with_sizes_and_what_helps(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("modules.command_line.available_memory", lambda: 3 * 2**30)
    monkeypatch.setattr("modules.command_line.total_memory", lambda: 16 * 2**30)
    code, text = printed(
        RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 16106127360 bytes."),
        capsys,
    )
    assert code == 5
    assert "out of host memory (RAM, not the GPU's memory): DefaultCPUAllocator" in text
    assert "asked for: 15.00 GiB; available now: 3.00 GiB of 16.00 GiB" in text
    assert "  --batch_size 1: fewer at once" in text
    assert "paging file" in text
    assert "Traceback" not in text
    assert "Traceback" in printed(MemoryError(), capsys, "--traceback")[1]


def test_an_error_of_ours_that_a_shortage_led_to_blames_the_memory_and_no_other_error_changes(
    capsys: pytest.CaptureFixture[str],
) -> None:
    error = ModelFileError("weights.pt: is damaged")
    error.__cause__ = MemoryError()
    code, text = printed(error, capsys)
    assert (code, "is damaged" in text) == (5, False)
    assert printed(ModelFileError("weights.pt: is damaged"), capsys)[0] == 4
    assert printed(ConfigError("--x: what"), capsys)[0] == 2
    ours = ResourceError("frames were saved to /a")
    ours.__cause__ = MemoryError()
    assert "frames were saved to /a" in printed(ours, capsys)[1]
    assert printed(Panic("ThreadPoolBuildError"), capsys)[0] == 5
    for bug in (KeyError("a bug"), Panic("index out of bounds"), KeyboardInterrupt(), SystemExit(7)):
        with pytest.raises(type(bug)) as raised, user_errors(()):
            raise bug
        assert raised.value is bug


def test_threads_that_cannot_start_are_a_lack_of_memory(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading, "_start_joinable_thread", fail, raising=False)
    monkeypatch.setattr(threading, "_start_new_thread", fail, raising=False)
    with pytest.raises(SystemExit) as stop, user_errors(()):
        threading.Thread(target=print).start()
    assert stop.value.code == 5
    assert "can't start new thread" in capsys.readouterr().err


def test_windows_tells_its_memory_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pretended one; the fields as in the documentation of MEMORYSTATUSEX."""

    def status(reference: Any) -> int:
        raw = struct.pack("<II7Q", 64, 50, 16 * 2**30, 5 * 2**30, *[0] * 5)
        assert reference._obj.length == len(raw)
        ctypes.memmove(ctypes.addressof(reference._obj), raw, len(raw))
        return 1

    kernel = SimpleNamespace(GlobalMemoryStatusEx=status)
    monkeypatch.setattr(ctypes, "windll", SimpleNamespace(kernel32=kernel), raising=False)
    monkeypatch.setattr(host_memory, "sys", SimpleNamespace(platform="win32"))
    assert (available_memory(), total_memory()) == (5 * 2**30, 16 * 2**30)


@pytest.mark.parametrize("version", [1, 2])
def test_a_container_has_what_its_limit_leaves(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = available_memory()
    if not whole:
        pytest.skip("the system does not say")
    root = tmp_path / "memory" if version == 1 else tmp_path
    folder = root / "job"
    folder.mkdir(parents=True)
    names = {
        1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
        2: ("memory.max", "memory.current", "inactive_file"),
    }[version]
    (folder / names[0]).write_text("50000\n", encoding="ascii")
    (folder / names[1]).write_text("30000\n", encoding="ascii")
    (folder / "memory.stat").write_text(f"anon 1\n{names[2]} 10000\n", encoding="ascii")
    groups = {1: "4:memory:/job/inner\n", 2: "0::/job/inner\n"}[version]
    (tmp_path / "groups").write_text(groups, encoding="utf-8")
    monkeypatch.setattr(host_memory, "CGROUP_ROOT", tmp_path)
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "groups")
    assert (available_memory(), total_memory()) == (30000, 50000)
    (folder / names[0]).write_text("max\n" if version == 2 else f"{2**63 - 4096}\n", encoding="ascii")
    assert total_memory() > 50000
    monkeypatch.setattr(host_memory, "CGROUPS", tmp_path / "none")
    assert available_memory() > 50000
