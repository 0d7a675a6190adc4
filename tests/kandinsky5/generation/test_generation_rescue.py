"""What is sampled is never lost: late errors and signals leave it as files, which replace no others."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NoReturn

import pytest
import torch

import kandinsky5.generation.clips as clips
import kandinsky5.generation.interactive as interactive
import kandinsky5.generation.models as generation_models
import kandinsky5.generation.outputs as outputs
import kandinsky5.generation.session as generation
import kandinsky5.sampling.video_files as video_files
from modules.errors import ResourceError
from modules.files import atomic_writer
from modules.leftovers import temporary_name
from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.generation.generation_kit import Generate, latents_of, refused
from tests.kandinsky5.training import fault_kit

pytestmark = pytest.mark.usefixtures("one_thread")
on_posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
QUICK = ("--steps", 1, "--guidance", 1)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "p.txt"
    path.write_text("one --d 1\ntwo --d 2\nthree --d 3\n", encoding="utf-8")
    return path


def raising(error: BaseException) -> Callable[..., NoReturn]:
    def fail(*_args: object, **_options: object) -> NoReturn:
        raise error

    return fail


def at_call(number: int, plain: Callable[..., Any], action: Callable[[], object]) -> Callable[..., Any]:
    """The function, with something done before its `number`-th call."""
    calls = iter(range(1, 10_000))

    def called(*arguments: Any, **named: Any) -> Any:
        if next(calls) == number:
            action()
        return plain(*arguments, **named)

    return called


def names_in(folder: Path) -> list[str]:
    """Without the time they begin with."""
    return sorted(path.name.split("_", 1)[1] for path in folder.iterdir())


def test_running_out_of_memory_at_one_prompt_costs_only_itself(
    run: Generate,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    fail = raising(torch.OutOfMemoryError("patched"))
    monkeypatch.setattr(generation, "sample_latents", at_call(2, generation.sample_latents, fail))
    message = refused(run, 5, capsys, "--from_file", prompts, "--output", "out", *QUICK)
    assert "line 2: device memory ran out while sampling" in message
    assert names_in(tmp_path / "out") == ["1.mp4", "3.mp4"]


@pytest.mark.parametrize("code", [1, 5], ids=["a bug", "no memory for the VAE"])
def test_an_error_after_sampling_leaves_all_latents_and_names_them(
    run: Generate,
    tmp_path: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: pytest.LogCaptureFixture,
    code: int,
) -> None:
    words = ("--from_file", prompts, "--output", "out", *QUICK)
    with monkeypatch.context() as patched:
        if code == 5:
            patched.setattr(generation_models, "load_vae", raising(torch.OutOfMemoryError("patched")))
            assert "loading the VAE" in refused(run, 5, capsys, *words)
        else:
            patched.setattr(clips, "decode_frames", raising(RuntimeError("cudnn error")))
            with pytest.raises(RuntimeError, match="cudnn error"):
                run(*words)
    assert names_in(tmp_path / "out") == [f"{seed}_latent.safetensors" for seed in (1, 2, 3)]
    for path in (tmp_path / "out").iterdir():
        assert str(Path("out") / path.name) in said.text
    assert read_header(path).metadata["prompt"] in ("one", "two", "three")
    run("--latent_path", path, "--output", "late.mp4", size=())
    assert (tmp_path / "late.mp4").is_file()


def test_an_error_in_a_later_sampling_leaves_the_latents_of_the_others(
    run: Generate, tmp_path: Path, prompts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fail = raising(RuntimeError("a bug"))
    monkeypatch.setattr(generation, "sample_latents", at_call(3, generation.sample_latents, fail))
    with pytest.raises(RuntimeError, match="a bug"):
        run("--from_file", prompts, "--output", "out", *QUICK)
    assert names_in(tmp_path / "out") == ["1_latent.safetensors", "2_latent.safetensors"]


def test_a_vae_with_nan_is_refused_before_anything_is_sampled(
    run: Generate,
    tmp_path: Path,
    models: dict[str, Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    tensors, _ = read_tensors(models["--vae"] / "diffusion_pytorch_model.safetensors")
    name = "decoder.conv_out.conv.weight"
    write_tensors(
        tmp_path / "vae" / "diffusion_pytorch_model.safetensors", tensors | {name: tensors[name] * torch.nan}
    )
    (tmp_path / "vae" / "config.json").write_bytes((models["--vae"] / "config.json").read_bytes())
    models["--vae"] = tmp_path / "vae"
    monkeypatch.setattr(generation.ModelLoader, "text_encoders", raising(AssertionError("too late")))
    message = refused(run, 4, capsys, "--prompt", "x", "--output", "x.mp4")
    assert "1 tensor contains NaN" in message


# Files of earlier runs


def test_a_rescue_replaces_no_file_of_an_earlier_run(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = [tmp_path / "x_latent.safetensors", tmp_path / "x_frames" / "00000.png"]
    kept[1].parent.mkdir()
    for path in kept:
        path.write_bytes(b"mine")
    with monkeypatch.context() as patched:
        patched.setattr(outputs, "write_video", raising(OSError("disk full")))
        refused(run, 5, capsys, "--prompt", "x", "--output", "x.mp4", *QUICK)
        patched.setattr(clips, "decode_frames", raising(ResourceError("no memory")))
        refused(run, 5, capsys, "--prompt", "x", "--output", "x.mp4", *QUICK)
    assert [path.read_bytes() for path in kept] == [b"mine", b"mine"]
    assert len(list((tmp_path / "x-1_frames").iterdir())) == 5
    assert latents_of(tmp_path / "x-1_latent.safetensors").shape == (1, 16, 2, 6, 4)


def test_frames_that_cannot_be_kept_anywhere_leave_the_latents_with_their_settings(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outputs, "write_video", raising(OSError("disk full")))
    monkeypatch.setattr(outputs, "write_frames", raising(OSError("disk full")))
    message = refused(run, 5, capsys, "--prompt", "x", "--output", "x.mp4", *QUICK)
    assert "x_latent.safetensors" in message
    assert read_header(tmp_path / "x_latent.safetensors").metadata["prompt"] == "x"


def test_a_folder_of_frames_is_whole_or_not_there(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--prompt", "x", "--output", "set", "--output_type", "images", *QUICK)
    fail = raising(OSError("disk full"))
    with monkeypatch.context() as patched:
        patched.setattr(video_files, "write_png", at_call(3, video_files.write_png, fail))
        assert "set_frames" in refused(run, 5, capsys, *words)
    assert [path.name for path in tmp_path.iterdir()] == ["set_frames"]
    run(*words)
    assert len(list((tmp_path / "set").iterdir())) == 5


def test_what_a_killed_run_left_half_written_goes_at_the_next_start(run: Generate, tmp_path: Path) -> None:
    (tmp_path / temporary_name(".k5tmp-")).write_bytes(b"half")
    (tmp_path / temporary_name(".k5frames-")).mkdir()
    (tmp_path / temporary_name(".k5frames-", "rest") / "00000.png").parent.mkdir()
    run("--prompt", "x", "--output", "x.safetensors", "--output_type", "latent", *QUICK)
    assert [path.name for path in tmp_path.iterdir()] == ["x.safetensors"]


# Signals


def send(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def signalled(
    run: Generate, log: Path, place: str, call: int, number: int, *words: object
) -> tuple[int, str]:
    """Exit code and messages of a run that gets a signal before the `call`-th call of a function."""

    def action() -> None:
        module = generation if place == "sample_latents" else clips
        setattr(module, place, at_call(call, getattr(module, place), send(number)))
        run(*words)

    code = fault_kit.wait(fault_kit.start(action, log))
    return code, log.read_text(encoding="utf-8")


@on_posix
@pytest.mark.parametrize(
    ("place", "call", "expected"),
    [
        ("sample_latents", 1, []),
        ("sample_latents", 3, ["1_latent.safetensors", "2_latent.safetensors"]),
        ("decode_frames", 2, ["1.mp4", "2_latent.safetensors", "3_latent.safetensors"]),
    ],
)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP] if os.name != "nt" else [])
def test_a_signal_keeps_what_is_sampled_and_ends_with_its_code(
    run: Generate, tmp_path: Path, prompts: Path, place: str, call: int, expected: list[str], number: int
) -> None:
    words = ("--from_file", prompts, "--output", "out", *QUICK)
    code, messages = signalled(run, tmp_path / "log.txt", place, call, number, *words)
    assert code == 128 + number, messages
    assert names_in(tmp_path / "out") == expected
    assert "Traceback" not in messages


@on_posix
@pytest.mark.parametrize(
    ("place", "call", "expected"),
    [
        ("sample_latents", 3, ["1_unfinished.safetensors", "2_unfinished.safetensors"]),
        ("decode_frames", 2, ["1.mp4", "2_unfinished.safetensors", "3_unfinished.safetensors"]),
    ],
)
def test_a_process_that_is_killed_leaves_the_latents_of_what_it_has_sampled(
    run: Generate, tmp_path: Path, prompts: Path, place: str, call: int, expected: list[str]
) -> None:
    words = ("--from_file", prompts, "--output", "out", *QUICK)
    signalled(run, tmp_path / "log.txt", place, call, signal.SIGKILL, *words)
    assert names_in(tmp_path / "out") == expected
    run(
        "--latent_path",
        next((tmp_path / "out").glob("*_2_unfinished.safetensors")),
        "--output",
        "late.mp4",
        size=(),
    )
    assert (tmp_path / "late.mp4").is_file()


def test_a_copy_that_cannot_be_saved_costs_nothing(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(clips, "write_spare_latents", raising(OSError(28, "No space left on device")))
    run("--prompt", "x", "--output", "out/x.mp4", *QUICK)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x.mp4"]
    assert "a copy of the latents could not be saved" in said.text


@pytest.mark.parametrize(
    ("kind", "output", "taken", "written"),
    [
        ("video", "x.mp4", "x.mp4", ["x-1.mp4"]),
        ("video", "x.png", "x.png", ["x-1.png"]),
        ("both", "x.mp4", "x.mp4", ["x-1.mp4", "x-1_latent.safetensors"]),
        ("latent", "x", "x_latent.safetensors", ["x-1_latent.safetensors"]),
        ("images", "x", "x", ["x-1"]),
    ],
)
def test_of_two_generations_into_one_name_at_once_the_second_takes_the_next(
    run: Generate,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    output: str,
    taken: str,
    written: list[str],
) -> None:
    folder = tmp_path / "out"

    def take() -> None:
        """What the other process does between the choice of a name and the end of the writing."""
        if kind == "images":
            (folder / taken).mkdir()
            (folder / taken / "00000.png").write_bytes(b"other")
        else:
            (folder / taken).write_bytes(b"other")

    monkeypatch.setattr(outputs, "_write_files", at_call(1, outputs._write_files, take))
    frames = ("--frames", 1) if output.endswith(".png") else ()
    run("--prompt", "x", "--output", folder / output, "--output_type", kind, *frames, *QUICK)
    assert sorted(path.name for path in folder.iterdir()) == sorted([taken, *written])
    other = folder / taken
    assert (other / "00000.png" if other.is_dir() else other).read_bytes() == b"other"


@on_posix
def test_two_processes_that_write_one_name_at_once_leave_two_videos(run: Generate, tmp_path: Path) -> None:
    marks = [tmp_path / "ready-0", tmp_path / "ready-1"]

    def meet(mark: Path) -> Callable[[], None]:
        def wait() -> None:
            mark.touch()
            for _ in range(3000):
                if all(other.exists() for other in marks):
                    return
                time.sleep(0.01)

        return wait

    def generate(mark: Path) -> Callable[[], None]:
        def act() -> None:
            outputs.write_video = at_call(1, outputs.write_video, meet(mark))
            run("--prompt", "x", "--output", "out/x.mp4", *QUICK)

        return act

    logs = [tmp_path / "log-0.txt", tmp_path / "log-1.txt"]
    started = [fault_kit.start(generate(mark), log) for mark, log in zip(marks, logs, strict=True)]
    assert [fault_kit.wait(process) for process in started] == [0, 0], [log.read_text() for log in logs]
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == ["x-1.mp4", "x.mp4"]


def test_a_free_name_is_taken_by_one_writer_alone(tmp_path: Path) -> None:
    def write(number: int) -> bool:
        try:
            with atomic_writer(tmp_path / "x", replaces=False) as stream:
                stream.write(str(number).encode())
        except FileExistsError:
            return False
        return True

    with ThreadPoolExecutor(8) as pool:
        assert sum(pool.map(write, range(64))) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@on_posix
def test_a_signal_while_the_video_is_written_leaves_no_half_of_it(run: Generate, tmp_path: Path) -> None:
    def prepare_and_run() -> None:
        frames_of = video_files.av.VideoFrame.from_ndarray
        encode = at_call(3, frames_of, send(signal.SIGTERM))
        video_files.av = _StandIn(video_files.av, VideoFrame=_StandIn(None, from_ndarray=encode))  # pyright: ignore
        run("--prompt", "x", "--output", "out/x.mp4", *QUICK)

    log = tmp_path / "log.txt"
    assert fault_kit.wait(fault_kit.start(prepare_and_run, log)) == 143, log.read_text(encoding="utf-8")
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["x_latent.safetensors"]


class _StandIn:
    """A module with some names replaced."""

    def __init__(self, module: object, **replaced: object) -> None:
        self._module = module
        self.__dict__.update(replaced)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


@on_posix
def test_a_second_signal_ends_at_once_and_leaves_only_whole_files(
    run: Generate, tmp_path: Path, prompts: Path
) -> None:
    def prepare_and_run() -> None:
        outputs.write_tensors = at_call(2, outputs.write_tensors, send(signal.SIGTERM))
        clips.decode_frames = at_call(1, clips.decode_frames, send(signal.SIGTERM))
        run("--from_file", prompts, "--output", "out", *QUICK)

    log = tmp_path / "log.txt"
    assert fault_kit.wait(fault_kit.start(prepare_and_run, log)) == 143, log.read_text(encoding="utf-8")
    assert names_in(tmp_path / "out") == ["1_latent.safetensors"]


# The console


def answers(monkeypatch: pytest.MonkeyPatch, *lines: str) -> None:
    remaining = iter(lines)

    def read() -> str:
        for line in remaining:
            return line
        raise EOFError

    monkeypatch.setattr(interactive, "console_reader", lambda: read)


def test_interactive_reports_missing_memory_and_notes_and_goes_on(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    fail = raising(torch.OutOfMemoryError("patched"))
    monkeypatch.setattr(generation_models, "load_dit", at_call(1, generation_models.load_dit, fail))
    answers(monkeypatch, "a cat --d 1", "a cat --d 2 --of x")
    run("--interactive", "--output", "out", *QUICK)
    assert "device memory ran out while loading the DiT" in said.text
    assert "--of" in said.text
    assert "no effect" in said.text
    assert names_in(tmp_path / "out") == ["2.mp4"]


@on_posix
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143)])
def test_interactive_keeps_the_latents_of_a_clip_that_is_stopped_while_it_is_decoded(
    run: Generate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, code: int
) -> None:
    answers(monkeypatch, "a cat --d 1", "a cat --d 2")
    words = ("--interactive", "--output", "out", *QUICK)
    found, messages = signalled(run, tmp_path / "log.txt", "decode_frames", 1, number, *words)
    assert found == code, messages
    goes_on = ["2.mp4"] if code == 0 else []
    assert names_in(tmp_path / "out") == ["1_latent.safetensors", *goes_on]
