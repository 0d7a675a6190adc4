"""The Hugging Face hub: what a run saves is uploaded as it appears, and a state can be fetched to go on from.

Training does not depend on it: an upload that fails is said, tried once more at the end of the run, and only
then an error. Everything that is uploaded lies in the output folder as well.
"""

from __future__ import annotations

import queue
import re
import threading
from pathlib import Path, PurePosixPath

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from kandinsky5.configs.train import HubConfig
from modules.errors import ConfigError, ResourceError
from modules.logs import get_logger
from networks.lora_scales import lora_config_path

log = get_logger(__name__)

# The bases of the hub's own error cover the failures of the connection, whichever HTTP library carries it.
_HUB_ERRORS: tuple[type[Exception], ...] = (*HfHubHTTPError.__bases__, HFValidationError, OSError)
# A large file that fails on its way is one of these in the hub's client.
_UPLOAD_ERRORS: tuple[type[Exception], ...] = (*_HUB_ERRORS, RuntimeError, ValueError)
_STATE_PLACE = re.compile(
    r"(?P<repo>[^/:]+/[^/:]+)/(?P<path>[^:]+)(:(?P<revision>[^:]+))?(:(?P<kind>model|dataset|space))?"
)


class HubUploads:
    """Uploads the results of one run; every method is called on the main process alone.

    Raises:
        ResourceError: the repository cannot be reached, made or written to; said before a model is loaded.
    """

    def __init__(self, config: HubConfig) -> None:
        assert config.huggingface_repo_id is not None
        self._config = config
        self._repo_id = config.huggingface_repo_id
        self._api = HfApi(token=config.huggingface_token)
        self._missing: list[Path] = []
        """Saved, and not on the hub yet."""
        self._waiting: queue.SimpleQueue[Path | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
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
        if config.async_upload:
            # A daemon, so that a second signal ends the process although an upload is on its way.
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

    def finish(self) -> None:
        """Wait for what is on its way, and try again what failed.

        Raises:
            ResourceError: some results are not on the hub.
        """
        if self._thread is not None:
            self._waiting.put(None)
            self._thread.join()
            self._thread = None
        for path in list(self._missing):
            if path.exists():
                self._upload(path)
            else:  # the saving rules have deleted it meanwhile
                self._missing.remove(path)
        if self._missing:
            raise ResourceError(
                f"{len(self._missing)} results could not be uploaded to {self._repo_id}: "
                f"{', '.join(path.name for path in self._missing)}. They lie in {self._missing[0].parent}; "
                "upload them with `hf upload`"
            )

    def _add(self, path: Path) -> None:
        self._missing.append(path)
        if self._thread is None:
            self._upload(path)
        else:
            self._waiting.put(path)

    def _work(self) -> None:
        while (path := self._waiting.get()) is not None:
            self._upload(path)

    def _upload(self, path: Path) -> None:
        config = self._config
        place = str(PurePosixPath(config.huggingface_path_in_repo.strip("/")) / path.name)
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
        ConfigError: the place is not written like that.
        ResourceError: it cannot be had.
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
