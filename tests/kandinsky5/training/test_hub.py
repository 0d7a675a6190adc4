"""Uploads: what is saved goes to the hub, failures are tried again and then said, the token stays private.

The hub is a stand-in that takes exactly the calls that the real client takes.
"""

from __future__ import annotations

import inspect
import os
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError

import kandinsky5.training.results.hub as hub
from kandinsky5.configs.train import HubConfig
from kandinsky5.training.loss import objective
from modules.errors import ResourceError
from modules.interruption import StopRequest
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.training_runs import exit_code, lora_bytes, train, write_dataset, write_dit

ConnectionFailed: Any = HfHubHTTPError.__bases__[0]
"""The error of the HTTP library under the hub's client."""
TOKEN = "hf_canary"
UPLOAD = ("--huggingface_repo_id", "me/my-lora", "--huggingface_token", TOKEN, "--max_train_steps", 2)


class Hub:
    """Keeps what is uploaded in a folder; fails as often as it is told to."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.failures = 0
        self.error: type[Exception] = ConnectionFailed
        self.repositories: list[dict[str, Any]] = []
        self.uploads: list[str] = []

    def client(self, token: str | None = None) -> Any:
        assert token in (TOKEN, None)
        return _Client(self)


class _Client:
    def __init__(self, hub: Hub) -> None:
        self._hub = hub

    def create_repo(self, repo_id: str, **settings: Any) -> None:
        inspect.signature(HfApi.create_repo).bind(None, repo_id, **settings)
        self._hub.repositories.append({"repo_id": repo_id, **settings})

    def upload_file(self, **call: Any) -> None:
        inspect.signature(HfApi.upload_file).bind(None, **call)
        self._take(call, shutil.copyfile, call["path_or_fileobj"])

    def upload_folder(self, **call: Any) -> None:
        inspect.signature(HfApi.upload_folder).bind(None, **call)
        self._take(call, shutil.copytree, call["folder_path"])

    def snapshot_download(self, repo_id: str, **call: Any) -> str:
        inspect.signature(HfApi.snapshot_download).bind(None, repo_id, **call)
        return str(self._hub.folder)

    def _take(self, call: dict[str, Any], copy: Any, source: Path) -> None:
        if self._hub.failures:
            self._hub.failures -= 1
            raise self._hub.error("no route to the hub")
        target = self._hub.folder / call["path_in_repo"]
        target.parent.mkdir(parents=True, exist_ok=True)
        copy(source, target)
        self._hub.uploads.append(call["path_in_repo"])


@pytest.fixture
def remote(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    remote = Hub(tmp_path / "hub")
    monkeypatch.setattr(hub, "HfApi", remote.client)
    return remote


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("files")
    return write_dit(folder), write_dataset(folder)


@pytest.mark.parametrize("words", [(), ("--async_upload",)])
def test_what_is_saved_is_uploaded_and_can_be_resumed_from_there(
    files: tuple[Path, Path], tmp_path: Path, remote: Hub, words: tuple[str, ...]
) -> None:
    place = ("--huggingface_path_in_repo", "runs/1/", "--save_every_n_steps", 1)
    train(*files, tmp_path / "a", *UPLOAD, *place, "--save_state", "--save_state_to_huggingface", *words)
    assert remote.repositories == [
        {"repo_id": "me/my-lora", "private": True, "repo_type": "model", "exist_ok": True}
    ]
    assert "runs/1/lora.safetensors" in remote.uploads
    assert "runs/1/lora_config_lora.json" in remote.uploads
    resume = ("--resume", "me/my-lora/runs/1/lora-step00000001-state", "--resume_from_huggingface")
    train(*files, tmp_path / "b", "--max_train_steps", 2, *resume)
    assert lora_bytes(tmp_path / "b" / "lora.safetensors") == lora_bytes(tmp_path / "a" / "lora.safetensors")


def test_kind_and_visibility_of_a_new_repository_are_as_asked(
    files: tuple[Path, Path], tmp_path: Path, remote: Hub
) -> None:
    words = ("--huggingface_repo_type", "dataset", "--huggingface_repo_visibility", "public")
    train(*files, tmp_path / "out", *UPLOAD, *words)
    (repository,) = remote.repositories
    assert (repository["private"], repository["repo_type"]) == (False, "dataset")


def test_nothing_that_is_written_holds_the_token(
    files: tuple[Path, Path], tmp_path: Path, remote: Hub, caplog: pytest.LogCaptureFixture
) -> None:
    train(*files, tmp_path / "out", *UPLOAD, "--log_config")
    written = [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
    assert written
    assert not [path.name for path in written if TOKEN.encode() in path.read_bytes()]
    assert TOKEN not in caplog.text
    assert TOKEN not in repr(HubConfig(huggingface_token=TOKEN))


@pytest.mark.parametrize("words", [(), ("--async_upload",)])
@pytest.mark.parametrize("error", [ConnectionFailed, RuntimeError, ValueError])
def test_an_upload_that_fails_is_tried_again_at_the_end(
    files: tuple[Path, Path], tmp_path: Path, remote: Hub, error: type[Exception], words: tuple[str, ...]
) -> None:
    """The client raises RuntimeError and ValueError too, for large files."""
    remote.failures, remote.error = 1, error
    train(*files, tmp_path / "out", *UPLOAD, *words)
    assert sorted(remote.uploads) == ["lora.safetensors", "lora_config_lora.json"]


@pytest.mark.parametrize("words", [(), ("--async_upload",)])
def test_uploads_that_fail_twice_are_an_error_after_training(
    files: tuple[Path, Path],
    tmp_path: Path,
    remote: Hub,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
) -> None:
    remote.failures = 100
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path / "out", *UPLOAD, *words)
    assert stop.value.code == 5
    assert "2 results could not be uploaded to me/my-lora: lora.safetensors" in capsys.readouterr().err
    assert (tmp_path / "out" / "lora.safetensors").is_file()


def test_a_repository_that_cannot_be_used_is_said_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(*_args: object, **_settings: object) -> None:
        raise ConnectionFailed("no route to the hub")

    monkeypatch.setattr(hub.HfApi, "create_repo", refuse)
    with pytest.raises(ResourceError, match="no route to the hub"):
        hub.HubUploads(HubConfig(huggingface_repo_id="me/my-lora"), StopRequest())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--resume_from_huggingface", "--resume", "auto"), "requires --resume USER/REPO/PATH"),
        (("--resume_from_huggingface", "--resume", "state"), "expected USER/REPO/PATH"),
    ],
)
def test_settings_that_cannot_act_are_refused(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    message: str,
) -> None:
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path / "out", *words)
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


def test_uploads_that_fail_do_not_hide_why_a_run_ended(
    files: tuple[Path, Path],
    tmp_path: Path,
    remote: Hub,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    said: pytest.LogCaptureFixture,
) -> None:
    remote.failures = 100
    plain = objective.draw_noise
    monkeypatch.setattr(objective, "draw_noise", lambda *given: plain(*given) * float("inf"))
    assert exit_code(*files, tmp_path / "out", *UPLOAD, "--async_upload") == 6
    assert "training diverged" in capsys.readouterr().err
    assert "results could not be uploaded to me/my-lora" in said.text


class StuckClient(_Client):
    """A hub that never answers, called by threads of a library, which Python waits for at its end."""

    def upload_file(self, **call: Any) -> None:
        print("an upload begins", flush=True)
        with ThreadPoolExecutor(1) as pool:
            pool.submit(time.sleep, 600).result()

    upload_folder = upload_file


def start_with_stuck_hub(
    files: tuple[Path, Path], folder: Path, numbers: tuple[int, ...], words: tuple[object, ...]
) -> int:
    """A run that gets signals in the step after its first save."""

    def action() -> None:
        hub.HfApi = lambda token=None: StuckClient(Hub(folder / "hub"))  # pyright: ignore
        hub._SECONDS_WHEN_STOPPING = 0.2
        plain, calls = objective.Objective.training_losses, iter(range(99))

        def losses(*given: Any) -> Any:
            if next(calls) == 1:
                for number in numbers:
                    os.kill(os.getpid(), number)
            return plain(*given)

        objective.Objective.training_losses = losses
        saving = ("--save_every_n_steps", 1, "--save_state", "--save_state_to_huggingface")
        train(*files, folder / "out", *UPLOAD[:-1], 4, *saving, *words)

    return fault_kit.start(action, folder / "log.txt")


def wait_for(words: str, log: Path) -> None:
    end = time.monotonic() + 60
    while time.monotonic() < end and not (log.is_file() and words in log.read_text(encoding="utf-8")):
        time.sleep(0.02)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
@pytest.mark.parametrize("words", [(), ("--async_upload",)])
def test_a_run_that_is_asked_to_stop_does_not_wait_for_the_hub(
    files: tuple[Path, Path], tmp_path: Path, words: tuple[str, ...]
) -> None:
    # Without --async_upload the first upload is waited for: the signal comes meanwhile.
    pid = start_with_stuck_hub(files, tmp_path, (signal.SIGTERM,) if words else (), words)
    if not words:
        wait_for("an upload begins", tmp_path / "log.txt")
        os.kill(pid, signal.SIGTERM)
    assert fault_kit.wait(pid, 60) == 143
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text.count("an upload begins") == 1
    step = 2 if words else 1
    state = f"lora-step{step:08d}-state"
    assert (tmp_path / "out" / state).is_dir()
    assert f'hf upload me/my-lora "{tmp_path / "out" / state}" "{state}" --repo-type model' in text
    assert TOKEN not in text
    assert not (tmp_path / "out/lora.lock").exists()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="POSIX signals")
def test_a_run_that_is_asked_twice_waits_for_no_upload_and_begins_none(
    files: tuple[Path, Path], tmp_path: Path
) -> None:
    numbers = (signal.SIGINT, signal.SIGINT)
    pid = start_with_stuck_hub(files, tmp_path, numbers, ("--async_upload",))
    assert fault_kit.wait(pid, 60) == 130
    text = (tmp_path / "log.txt").read_text(encoding="utf-8")
    assert text.count("an upload begins") == 1
    assert "3 results could not be uploaded to me/my-lora: lora-step00000001.safetensors, " in text
    assert "lora-step00000002" not in text
