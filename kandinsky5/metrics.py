"""Numbers of a run: one JSON line each in metrics.jsonl, and TensorBoard curves.

metrics.jsonl lies in the output folder and may be shared by several runs; every line says which `run` (output
name) and what `kind` (step, epoch, validation, sample, lora) it is.
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from modules.errors import ResourceError
from modules.files import write_text
from modules.logs import get_logger

log = get_logger(__name__)

FILE_NAME = "metrics.jsonl"


class Metrics:
    """Writes what happened. A log that cannot be written warns once and never stops a run.

    Args:
        start_step: steps done by the run that is continued; what was logged after them is dropped.
        tracker_folder: where TensorBoard curves go, if anywhere.
    """

    def __init__(
        self, output_dir: Path, run: str, *, start_step: int = 0, tracker_folder: Path | None = None
    ) -> None:
        self._path = output_dir / FILE_NAME
        self._run = run
        self._has_warned = False
        self._writer: Any = None
        self._attempt(self._drop_lines_after, start_step)
        if tracker_folder is not None:
            self._writer = _open_tensorboard(tracker_folder, start_step)

    def write(self, kind: str, step: int, values: Mapping[str, Any]) -> None:
        """Append one line; numbers that are not finite become text, which JSON lacks."""
        record = {"run": self._run, "kind": kind, "step": step, **values}
        self._attempt(self._append, json.dumps(_finite(record), ensure_ascii=False) + "\n")

    def records(self, kind: str) -> list[dict[str, Any]]:
        """What was written of a kind, oldest first, by earlier parts of the run too."""
        found: list[dict[str, Any]] = []
        self._attempt(self._read, kind, found)
        return found

    def draw(self, path: Path, kind: str, write: Callable[[Path, list[dict[str, Any]]], None]) -> None:
        """Renew a picture of all records of a kind."""
        records = self.records(kind)
        if records:
            self._attempt(write, path, records)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Points of the curves, by their names in TensorBoard."""
        if self._writer is not None:
            self._attempt(self._add_scalars, step, values)

    def picture(self, step: int, name: str, encoded: bytes, size: tuple[int, int]) -> None:
        """Show an image or a moving one in TensorBoard.

        Args:
            encoded: a whole PNG or GIF file, which TensorBoard's viewer plays as it is.
            size: width and height in pixels.
        """
        if self._writer is not None:
            self._attempt(self._add_picture, step, name, encoded, size)

    def flush(self) -> None:
        """Bring the curves onto the disk."""
        if self._writer is not None:
            self._attempt(self._writer.flush)

    def close(self) -> None:
        """Finish the curves."""
        if self._writer is not None:
            self._attempt(self._writer.close)

    def _append(self, line: str) -> None:
        # Opened each time: another run may have rewritten the file meanwhile.
        encoded = line.encode("utf-8")
        with self._path.open("ab", buffering=0) as stream:
            size = stream.tell()
            try:
                if stream.write(encoded) != len(encoded):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(size)  # half a line would spoil the next one too
                raise

    def _read(self, kind: str, found: list[dict[str, Any]]) -> None:
        mark = json.dumps(kind)
        for line in self._path.read_text(encoding="utf-8").splitlines():
            # Steps are most of the lines: only those that may be meant are parsed.
            record = json.loads(line) if mark in line else {}
            if record.get("run") == self._run and record.get("kind") == kind:
                found.append(record)

    def _add_scalars(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def _add_picture(self, step: int, name: str, encoded: bytes, size: tuple[int, int]) -> None:
        from tensorboard.compat.proto import summary_pb2

        summary: Any = vars(summary_pb2)["Summary"]  # generated when imported: type checkers do not see it
        width, height = size
        image = summary.Image(width=width, height=height, colorspace=3, encoded_image_string=encoded)
        self._writer.file_writer.add_summary(summary(value=[summary.Value(tag=name, image=image)]), step)

    def _drop_lines_after(self, start_step: int) -> None:
        if not self._path.is_file():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            try:
                record = json.loads(line)
            except ValueError:
                continue  # the cut last line of a killed run
            if record.get("run") != self._run or (start_step and record.get("step", 0) <= start_step):
                kept.append(line + "\n")
        write_text(self._path, "".join(kept))

    def _attempt(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if not self._has_warned:
                log.warning("the log of the run cannot be written and has gaps: %s", error)
            self._has_warned = True


def _open_tensorboard(folder: Path, start_step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ResourceError("--logging_dir needs TensorBoard:\n  pip install tensorboard") from error
    # Points after the step that a run continues from would appear twice.
    return SummaryWriter(str(folder), purge_step=start_step + 1 if start_step else None)


def check_tensorboard() -> None:
    """Raise before anything slow if TensorBoard is wanted and missing.

    Raises:
        ResourceError: with the command that installs it.
    """
    from importlib.util import find_spec

    if find_spec("tensorboard") is None:
        raise ResourceError("--logging_dir needs TensorBoard:\n  pip install tensorboard")


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
