"""Disks that fill up and folders that cannot be written: what is saved where, and how a run ends."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from kandinsky5.training import result_writer
from kandinsky5.training.results import state as training_state
from kandinsky5.training.results.state import find_state, read_state
from kandinsky5.training.tracking import metrics as metrics_module
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.step_record import assert_same_steps, recorded
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, metrics, train

EVERY_STEP = ("--save_state", "--save_every_n_steps", 1)


def full_disk(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, *, from_call: int = 1) -> None:
    """Let `name` of result_writer find no space in `folder`, from its `from_call`-th call there on."""
    plain = getattr(result_writer, name)
    calls: list[Path] = []

    def write(*arguments: Any, **named: Any) -> None:
        target = next(value for value in arguments if isinstance(value, Path))
        if target.parent == folder:
            calls.append(target)
            if len(calls) >= from_call:
                raise OSError(errno.ENOSPC, "No space left on device")
        plain(*arguments, **named)

    monkeypatch.setattr(result_writer, name, write)


def test_the_second_folder_gets_lora_and_state_when_the_disk_is_full(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The run goes on from there as if nothing had been."""
    output, second = tmp_path / "out", tmp_path / "second"
    with recorded() as whole:
        train(dit, dataset, tmp_path / "whole", "--max_train_steps", 4)
    words = (*EVERY_STEP, "--max_train_steps", 4, "--output_dir_fallback", second)
    with monkeypatch.context() as patch, recorded() as first:
        full_disk(output, "save_lora", patch, from_call=3)
        assert exit_code(dit, dataset, output, *words) == 5
    message = capsys.readouterr().err
    for name in ("lora-step00000003.safetensors", "lora-step00000003-state"):
        assert f"--output_dir_fallback: saved {second / name}" in message
    assert "No space left" in message
    found = find_state(output, "lora", "auto")
    assert found is not None
    assert read_state(found).run.step == 2
    assert not (output / "lora-step00000003.safetensors").exists()
    with recorded() as rest:
        train(dit, dataset, output, *words, "--resume", second / "lora-step00000003-state")
    assert_same_steps([*first, *rest], whole)
    assert lora_bytes(output / "lora.safetensors") == lora_bytes(tmp_path / "whole/lora.safetensors")


def test_the_lora_is_there_when_only_the_state_found_no_space(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    full_disk(tmp_path, "write_state", monkeypatch)
    assert exit_code(dit, dataset, tmp_path, *EVERY_STEP, "--max_train_steps", 2) == 5
    assert "lora-step00000001-state cannot be written: No space left" in capsys.readouterr().err
    assert lora_bytes(tmp_path / "lora-step00000001.safetensors")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".k5")] == []


def test_a_second_folder_that_is_full_too_is_said(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder in (tmp_path / "out", tmp_path / "second"):
        for name in ("save_lora", "write_state"):
            full_disk(folder, name, monkeypatch)
    words = ("--max_train_steps", 1, "--output_dir_fallback", tmp_path / "second")
    assert exit_code(dit, dataset, tmp_path / "out", *words) == 5
    message = capsys.readouterr().err
    assert f"{tmp_path / 'second/lora-step00000001-state'} cannot be written" in message
    assert "saved" not in message


@pytest.mark.skipif(os.name == "nt", reason="POSIX limits")
@pytest.mark.parametrize("room", ["the LoRA only", "nothing"])
def test_a_limit_that_native_code_meets_ends_the_same_way(
    room: str, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """torch's own writer meets the limit as well: the state of the optimizer is the largest file."""
    import resource

    train(dit, dataset, tmp_path / "whole", *EVERY_STEP, "--max_train_steps", 1)
    sizes = {path.name: path.stat().st_size for path in (tmp_path / "whole/lora-state").iterdir()}
    assert sizes["optimizer.pt"] > sizes["lora.safetensors"]
    limit = {"the LoRA only": sizes["lora.safetensors"] + 1000, "nothing": 20_000}[room]

    def run() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        train(dit, dataset, tmp_path / "out", *EVERY_STEP, "--max_train_steps", 1)

    log = tmp_path / "log.txt"
    assert fault_kit.wait(fault_kit.start(run, log)) == 5
    text = log.read_text(encoding="utf-8")
    assert "File too large" in text
    assert "Traceback" not in text
    has_lora = (tmp_path / "out/lora-step00000001.safetensors").exists()
    assert has_lora == (room == "the LoRA only")
    left = [
        path.name
        for path in (tmp_path / "out").iterdir()
        if path.name.startswith(".k5") or "state" in path.name
    ]
    assert left == []


def test_what_torch_hides_of_a_full_disk_is_reported(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch.save turns an error of the file it writes to into one of its own."""

    class Full:
        room = 2000

        def write(self, data: bytes) -> int:
            self.room -= len(data)
            if self.room < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return len(data)

        def flush(self) -> None:
            pass

    @contextmanager
    def full_writer(_: Path, **_options: bool) -> Iterator[Full]:
        yield Full()

    monkeypatch.setattr(training_state, "atomic_writer", full_writer)
    assert exit_code(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state") == 5
    assert "lora-state cannot be written: No space left on device" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_warns_once_and_has_whole_lines(
    dit: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    plain, calls = metrics_module.open_own_file, iter(range(99))

    def open_with_space(path: Path) -> Any:
        if 2 <= next(calls) <= 3:  # after the line of the start and that of the first step
            raise OSError(errno.ENOSPC, "No space left on device")
        return plain(path)

    monkeypatch.setattr(metrics_module, "open_own_file", open_with_space)
    train(dit, dataset, tmp_path, "--max_train_steps", 4)
    assert said.text.count("has gaps") == 1
    assert [record["step"] for record in metrics(tmp_path, "step")] == [1, 4]
    assert (tmp_path / "lora.safetensors").is_file()


def test_half_a_line_is_taken_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    log = metrics_module.Metrics(tmp_path, "lora")
    log.write("step", 1, {"loss": 1.0})
    plain = metrics_module.open_own_file

    class Short:
        """A file that takes five bytes, as a disk with five left does."""

        def __init__(self, stream: Any) -> None:
            self.stream = stream

        def __enter__(self) -> Short:
            return self

        def __exit__(self, *_: object) -> None:
            self.stream.close()

        def write(self, data: bytes) -> int:
            return self.stream.write(data[:5])

        def __getattr__(self, name: str) -> Any:
            return getattr(self.stream, name)

    with monkeypatch.context() as patch:
        patch.setattr(metrics_module, "open_own_file", lambda path: Short(plain(path)))
        log.write("step", 2, {"loss": 2.0})
    log.write("step", 3, {"loss": 3.0})
    assert [record["step"] for record in metrics(tmp_path)] == [1, 3]


@pytest.mark.parametrize("option", ["--output_dir", "--output_dir_fallback"])
@pytest.mark.parametrize("place", ["a file", "below a file", "no rights"])
def test_folders_that_cannot_be_written_are_found_before_anything_is_loaded(
    option: str,
    place: str,
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").write_bytes(b"x")
    bad = {"a file": tmp_path / "file", "below a file": tmp_path / "file/sub"}.get(place, tmp_path / "locked")
    if place == "no rights":
        (tmp_path / "locked").mkdir(mode=0o500)
        if os.access(bad, os.W_OK):
            pytest.skip("this user may write everywhere")
    monkeypatch.setattr("kandinsky5.model.assembly.load_model", lambda *_: pytest.fail("a model was loaded"))
    words = () if option == "--output_dir" else (option, bad)
    assert exit_code(dit, dataset, bad if option == "--output_dir" else tmp_path / "out", *words) == 5
    assert f"{option} {bad}" in capsys.readouterr().err


def test_the_second_folder_must_be_another(dit: Path, dataset: Path, tmp_path: Path) -> None:
    assert exit_code(dit, dataset, tmp_path, "--output_dir_fallback", tmp_path / "x/..") == 2
