"""Trackers that draw the numbers and samples of a run: TensorBoard, and wandb.

A tracker is opened before a model is loaded, which finds a missing package, key or connection early.
What fails later costs curves, never the run: `Metrics` catches the errors that a tracker names.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from kandinsky5.configs.train import TrackingConfig, TrainConfig
from kandinsky5.training.results.run_mark import RunMark
from kandinsky5.training.results.saved_config import shareable_options
from kandinsky5.training.tracking.animation import Animation
from modules.errors import ConfigError, ResourceError
from modules.files import disk_errors

_ERRORS: tuple[type[Exception], ...] = (OSError, RuntimeError, ValueError, TypeError)
"""What clients and their writing threads raise for full disks, lost connections and invalid values."""
_PRIVATE = {"x_disable_meta": True, "disable_git": True, "save_code": False, "console": "off"}
"""wandb would send the command line with its keys and paths, the host's name, and all that is printed."""
_OURS = {"tensorboard": ("log_dir", "purge_step"), "wandb": ("project", "id", "resume", "dir")}
"""Arguments that other options decide."""


@dataclass(frozen=True, slots=True)
class ShownSample:
    """A sample as trackers show it."""

    name: str
    """`sample_0` for the first prompt."""
    path: Path
    """The .mp4, or the .png of a single image."""
    animation: Animation | None
    """The same as a small moving picture; None where no tracker needs it."""


class Tracker(Protocol):
    """A destination of curves and samples."""

    @property
    def errors(self) -> tuple[type[Exception], ...]:
        """The exceptions that its methods raise on failure."""
        ...

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the curves, by their names."""
        ...

    def sample(self, step: int, sample: ShownSample) -> None:
        """Show a sample."""
        ...

    def flush(self) -> None:
        """Flush pending data to disk or to the service."""
        ...

    def close(self, *, is_failed: bool) -> None:
        """Finish; `is_failed`: the run ends with an error."""
        ...


def check_trackers(config: TrackingConfig) -> None:
    """Find missing packages and wrong `--log_tracker_config` before anything slow.

    Raises:
        ResourceError: a package is missing, with the command that installs it.
        ConfigError: arguments that the package does not take.
    """
    trackers = (("tensorboard", config.uses_tensorboard), ("wandb", config.uses_wandb))
    for package in (name for name, is_used in trackers if is_used):
        if find_spec(package) is None:
            flag = "--log_with wandb" if package == "wandb" else "--logging_dir"
            raise ResourceError(f"{flag} needs {package}:\n  pip install {package}")
        given = config.log_tracker_settings.get(package, {})
        known = [name for name in _arguments(package) if name not in _OURS[package]]
        if not isinstance(given.get("settings", {}), Mapping):
            raise ConfigError(f"--log_tracker_config: settings must be a table, [{package}.settings]")
        unknown = [name for name in given if name not in known]
        if unknown:
            raise ConfigError(
                f"--log_tracker_config: [{package}] takes no {', '.join(unknown)}; "
                f"it takes {', '.join(known)}"
            )


def _arguments(package: str) -> list[str]:
    if package == "wandb":
        return list(inspect.signature(import_module("wandb").init).parameters)
    from torch.utils.tensorboard import SummaryWriter

    return [name for name in inspect.signature(SummaryWriter.__init__).parameters if name != "self"]


def open_trackers(config: TrainConfig, mark: RunMark, *, start_step: int) -> list[Tracker]:
    """The trackers that the options ask for.

    Args:
        start_step: steps done by earlier parts of the run.
    Raises:
        ResourceError: a tracker cannot be started.
    """
    tracking, saving = config.tracking, config.saving
    options = shareable_options(config) if tracking.log_config else {}
    trackers: list[Tracker] = []
    if tracking.uses_tensorboard and tracking.logging_dir is not None:
        folder = tracking.logging_dir / mark.tracker_run
        trackers.append(TensorBoardTracker(tracking, folder, start_step, options))
    if tracking.uses_wandb:
        folder = tracking.logging_dir or saving.output_dir
        name = tracking.wandb_run_name or saving.output_name
        # Its steps cannot go back, so each branch is a run of its own there.
        run_id = f"{mark.session_id}-{mark.branch}" if mark.branch else mark.session_id
        trackers.append(WandbTracker(tracking, folder, name, run_id, options))
    return trackers


class TensorBoardTracker:
    """Curves and moving pictures in a folder."""

    errors: tuple[type[Exception], ...] = _ERRORS

    def __init__(
        self, config: TrackingConfig, folder: Path, start_step: int, options: Mapping[str, Any]
    ) -> None:
        from torch.utils.tensorboard import SummaryWriter

        given = config.log_tracker_settings.get("tensorboard", {})
        # Points after the step that a run continues from would appear twice.
        purge_step = start_step + 1 if start_step else None
        with disk_errors(folder, what="--logging_dir"):
            self._writer = SummaryWriter(str(folder), purge_step=purge_step, **given)
        if options:
            lines = "\n".join(f"    {name} = {value}" for name, value in options.items())
            self._writer.add_text("options", lines, start_step)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def sample(self, step: int, sample: ShownSample) -> None:
        if sample.animation is None:
            return
        from tensorboard.compat.proto import summary_pb2

        # A whole PNG or GIF file, which TensorBoard's viewer plays as it is.
        summary: Any = vars(summary_pb2)["Summary"]  # generated when imported: type checkers do not see it
        width, height = sample.animation.size
        image = summary.Image(
            width=width, height=height, colorspace=3, encoded_image_string=sample.animation.encoded
        )
        value = summary.Value(tag=sample.name, image=image)
        self._writer._get_file_writer().add_summary(summary(value=[value]), step)

    def flush(self) -> None:
        self._writer.flush()

    def close(self, *, is_failed: bool) -> None:
        self._writer.close()


def _without_keys(text: str, *keys: str | None) -> str:
    """Words of the client, which may repeat what it was given, whole or as pydantic shortens it."""
    for key in filter(None, keys):
        text = text.replace(str(key), "***")
    return re.sub(r"input_value=.*?, input_type=", "input_value=***, input_type=", text, flags=re.DOTALL)


class WandbTracker:
    """A run of wandb, which a resumed training continues under its id.

    The key goes to the client alone: it is neither written to a file nor put into the environment.
    """

    def __init__(
        self, config: TrackingConfig, folder: Path, name: str, run_id: str, options: Mapping[str, Any]
    ) -> None:
        self._wandb: Any = import_module("wandb")
        self.errors = (*_ERRORS, self._wandb.Error)
        given = dict(config.log_tracker_settings.get("wandb", {}))
        settings = {**_PRIVATE, **given.pop("settings", {})}
        if config.wandb_api_key is not None:
            settings["api_key"] = config.wandb_api_key
        arguments = {"name": name, "config": dict(options) or None, **given}
        folder.mkdir(parents=True, exist_ok=True)
        try:
            self._run: Any = self._wandb.init(
                project=config.log_tracker_name,
                id=run_id,
                resume="allow",
                dir=str(folder),
                settings=self._wandb.Settings(**settings),
                **arguments,
            )
        except self.errors as error:
            reason = _without_keys(str(error), config.wandb_api_key, settings.get("api_key"))
            raise ResourceError(
                f"--log_with wandb: the run cannot be started: {reason}\n"
                "Log in with `wandb login` or --wandb_api_key, or keep the run on this machine with "
                'mode = "offline" under [wandb] in --log_tracker_config, or WANDB_MODE=offline.'
            ) from None

    def _is_known(self, step: int) -> bool:
        """Whether an earlier part of the run has logged this step, with the same numbers."""
        return step < self._run.starting_step

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        if not self._is_known(step):
            self._run.log(dict(values), step=step)

    def sample(self, step: int, sample: ShownSample) -> None:
        if self._is_known(step):
            return
        is_video = sample.path.suffix == ".mp4"
        path = str(sample.path)
        shown = self._wandb.Video(path, format="mp4") if is_video else self._wandb.Image(path)
        self._run.log({sample.name: shown}, step=step)

    def flush(self) -> None:
        """Nothing to do: the client sends by itself."""

    def close(self, *, is_failed: bool) -> None:
        self._run.finish(exit_code=int(is_failed))
