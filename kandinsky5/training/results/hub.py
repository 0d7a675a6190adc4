"""Uploads results to the Hugging Face hub as they are saved, and downloads a state to resume from.

Training does not depend on it: an upload that fails is logged, tried again at the end of the run, and only
then an error. Everything that is uploaded lies in the output folder as well.
"""

from __future__ import annotations

import queue
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kandinsky5.configs.train import HubConfig
from modules.errors import ConfigError, ResourceError
from modules.interruption import StopRequest
from modules.logs import get_logger
from networks.lora_scales import lora_config_path

log = get_logger(__name__)

# The bases of the hub's own error cover the failures of the connection, whichever HTTP library carries it.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)
# A large file that fails on its way is one of these in the hub's client.
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (*_HUB_ERRORS, RuntimeError, ValueError)
_SECONDS_WHEN_STOPPING = 10.0
"""What is left for uploads of the half minute that systems give a process to end."""
_POLL_SECONDS = 0.05
_STATE_PLACE = re.compile(
    r"(?P<repo>[^/:]+/[^/:]+)/(?P<path>[^:]+)(:(?P<revision>[^:]+))?(:(?P<kind>model|dataset|space))?"
)


class HubUploads:
    """Uploads the results of one run; every method is called on the main process alone.

    A thread of its own uploads, so that the hub never delays a stop request.

    Args:
        stop: after the first signal a run waits for uploads for a short time, after the second not at all.
    Raises:
        ResourceError: the repository cannot be reached, made or written to; raised before a model is loaded.
    """

    def __init__(self, config: HubConfig, stop: StopRequest) -> None:
        assert config.huggingface_repo_id is not None
        self._config = config
        self._repo_id = config.huggingface_repo_id
        self._api = HfApi(token=config.huggingface_token)
        self._missing: list[Path] = []
        """Saved, and not on the hub yet."""
        self._stop = stop
        self._waiting: queue.SimpleQueue[Path] = queue.SimpleQueue()
        self._on_their_way: list[Path] = []
        """Waiting or being uploaded."""
        self._is_closed = False
        """No other upload begins."""
        try:
            self._api.create_repo(
                self._repo_id,
                private=config.huggingface_repo_visibility != "public",
                repo_type=config.huggingface_repo_type,
                exist_ok=True,
            )
        except _HUB_ERRORS as error:
            raise ResourceError(
                f"--huggingface_repo_id {self._repo_id}: cannot be used: {_reason(error)}. Give a repository "
                "you may write to, with --huggingface_token or after `hf auth login`"
            ) from error
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def add_lora(self, path: Path) -> None:
        """Upload a LoRA and the settings file beside it, if it has one."""
        for file in (path, lora_config_path(path)):
            if file.is_file():
                self._add(file)

    def add_state(self, folder: Path) -> None:
        """Upload a state folder, with `--save_state_to_huggingface`."""
        if self._config.save_state_to_huggingface:
            self._add(folder)

    @property
    def is_busy(self) -> bool:
        """Whether an upload is pending or in progress."""
        return bool(self._on_their_way) and self._thread.is_alive()

    def finish(self, *, is_failing: bool) -> None:
        """Wait for what is on its way, and try again what failed, as far as a request to stop leaves time.

        Args:
            is_failing: another error ends the run; what is missing is only logged.
        Raises:
            ResourceError: some results are not on the hub.
        """
        try:
            self._settle()
        except SystemExit:  # asked to stop once more
            self._log_missing()
            raise
        if is_failing or self._stop.exit_code:
            self._log_missing()
        elif self._missing:
            raise ResourceError(self._missing_message())

    def _settle(self) -> None:
        deadlines: list[float] = []

        def is_late() -> bool:
            if self._stop.is_set() and not deadlines:
                deadlines.append(time.monotonic() + _SECONDS_WHEN_STOPPING)
            return self._stop.is_urgent or any(time.monotonic() > deadline for deadline in deadlines)

        try:
            self._wait(is_late)
            for path in [] if is_late() else list(self._missing):
                self._enqueue(path)
            self._wait(is_late)
        finally:
            self._is_closed = True
        # The saving rules may have deleted some meanwhile.
        self._missing = [path for path in self._missing if path.exists()]

    def _wait(self, is_late: Callable[[], bool]) -> None:
        while self.is_busy and not is_late():
            time.sleep(_POLL_SECONDS)

    def _log_missing(self) -> None:
        if self._missing:
            log.error("%s", self._missing_message())

    def _missing_message(self) -> str:
        names = ", ".join(path.name for path in self._missing)
        commands = [
            f'  hf upload {self._repo_id} "{path}" "{self._place(path)}" '
            f"--repo-type {self._config.huggingface_repo_type}"
            for path in self._missing
        ]
        return (
            f"{len(self._missing)} results could not be uploaded to {self._repo_id}: {names}. "
            "They are on the disk; upload them with:\n" + "\n".join(commands)
        )

    def _add(self, path: Path) -> None:
        self._missing.append(path)
        self._enqueue(path)
        if not self._config.async_upload:
            self._wait(self._stop.is_set)

    def _enqueue(self, path: Path) -> None:
        self._on_their_way.append(path)
        self._waiting.put(path)

    def _work(self) -> None:
        while True:
            path = self._waiting.get()
            if not self._is_closed and path.exists():
                self._upload(path)
            self._on_their_way.remove(path)

    def _place(self, path: Path) -> str:
        return str(PurePosixPath(self._config.huggingface_path_in_repo.strip("/")) / path.name)

    def _upload(self, path: Path) -> None:
        config = self._config
        place = self._place(path)
        kind = config.huggingface_repo_type
        try:
            if path.is_dir():
                self._api.upload_folder(
                    repo_id=self._repo_id, folder_path=path, path_in_repo=place, repo_type=kind
                )
            else:
                self._api.upload_file(
                    path_or_fileobj=path, path_in_repo=place, repo_id=self._repo_id, repo_type=kind
                )
        except _UPLOAD_ERRORS as error:
            log.warning("%s was not uploaded: %s", path.name, _reason(error))
        else:
            self._missing.remove(path)
            log.info("uploaded %s to %s", place, self._repo_id)


def fetch_state(place: str, token: str | None) -> Path:
    """Download a state folder: `--resume USER/REPO/PATH[:REVISION[:TYPE]]` with `--resume_from_huggingface`.

    Returns:
        The folder in the hub's cache.
    Raises:
        ConfigError: the value has another form. ResourceError: the state cannot be downloaded.
    """
    match = _STATE_PLACE.fullmatch(place)
    if match is None:
        raise ConfigError(
            f"--resume {place}: with --resume_from_huggingface expected USER/REPO/PATH[:REVISION[:TYPE]], "
            "such as me/my-lora/k5_lora-000003-state"
        )
    path = match["path"].strip("/")
    try:
        root = HfApi(token=token).snapshot_download(
            match["repo"],
            repo_type=match["kind"] or "model",
            revision=match["revision"],
            allow_patterns=[f"{path}/*"],
        )
    except _HUB_ERRORS as error:
        raise ResourceError(f"--resume {place}: cannot be downloaded: {_reason(error)}") from error
    folder = Path(str(root)) / path
    if not folder.is_dir():
        raise ResourceError(f"--resume {place}: there is no folder {path} in {match['repo']}")
    return folder


def _reason(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
