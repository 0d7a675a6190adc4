"""Numbers of a run: one JSON line each in metrics.jsonl, and curves in the trackers.

metrics.jsonl lies in the output folder and may be shared by several runs; every line has its `run` (output
name) and its `kind` (start, step, epoch, norms, validation, sample, lora).
"""

from __future__ import annotations

import errno
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from kandinsky5.training.tracking.trackers import ShownSample, Tracker
from modules.files import open_own_file, write_text
from modules.logs import get_logger
from modules.parsing import ParseError, parse_json

log = get_logger(__name__)

FILE_NAME = "metrics.jsonl"
_START = '{"run": '
"""Of every line of ours, whole or cut."""


def read_records(path: Path, run: str, kind: str) -> list[dict[str, Any]]:
    """The lines of a kind that a run wrote, oldest first; none where there is no file."""
    if not path.is_file():
        return []
    mark = json.dumps(kind)
    found = []
    for line in _lines(path):
        if mark not in line:  # steps are most of the lines: only those that may be meant are parsed
            continue
        record = _record(line)
        if record.get("run") == run and record.get("kind") == kind:
            found.append(record)
    return found


def read_all_records(path: Path) -> tuple[list[dict[str, Any]], list[int]]:
    """The lines of all runs, oldest first, and the numbers (from 1) of those that cannot be read.

    Raises:
        OSError: there is a file and it cannot be read.
    """
    found, damaged = [], []
    for number, line in enumerate(_lines(path) if path.is_file() else (), start=1):
        if not line.strip():
            continue
        record = _record(line)
        if record:
            found.append(record)
        else:
            damaged.append(number)
    return found, damaged


def _record(line: str) -> dict[str, Any]:
    """The record of a line; {} for a line that none of our runs wrote, or is still writing."""
    try:
        record = parse_json(line)
    except ParseError:
        return {}
    return record if isinstance(record, dict) else {}


def _lines(path: Path) -> list[str]:
    # A killed run may have left half a character; and other signs than LF end no line.
    return path.read_text(encoding="utf-8", errors="replace").split("\n")


class Metrics:
    """Writes metrics. A log that cannot be written warns once and never stops a run.

    Args:
        start_step: steps done by the run that is continued; what was logged after them is dropped.
        trackers: where curves and samples go too.
    """

    def __init__(
        self, output_dir: Path, run: str, *, start_step: int = 0, trackers: Sequence[Tracker] = ()
    ) -> None:
        self._path = output_dir / FILE_NAME
        self._run = run
        self._has_warned = False
        self._trackers = trackers
        self._failed: set[int] = set()
        """Positions of trackers whose failure has been logged."""
        self._attempt(self._drop_lines_after, start_step)

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
        """Points of the curves, by their names in the trackers."""
        self._notify(lambda tracker: tracker.scalars(step, values))

    def sample(self, step: int, sample: ShownSample) -> None:
        """Show a sample in the trackers."""
        self._notify(lambda tracker: tracker.sample(step, sample))

    def flush(self) -> None:
        """Flush the curves to disk."""
        self._notify(lambda tracker: tracker.flush())

    def close(self, *, is_failed: bool = False) -> None:
        """Finish the curves; `is_failed`: the run ends with an error."""
        self._notify(lambda tracker: tracker.close(is_failed=is_failed))

    def _append(self, line: str) -> None:
        # Opened each time: another run may have rewritten the file meanwhile.
        encoded = line.encode("utf-8")
        with open_own_file(self._path) as stream:
            size = stream.seek(0, os.SEEK_END)
            try:
                if stream.write(encoded) != len(encoded):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                stream.truncate(size)  # half a line would spoil the next one too
                raise

    def _read(self, kind: str, found: list[dict[str, Any]]) -> None:
        found += read_records(self._path, self._run, kind)

    def _drop_lines_after(self, start_step: int) -> None:
        if not self._path.is_file():
            return
        open_own_file(self._path).close()  # not a link, whose content would become this file
        kept = [line + "\n" for line in _lines(self._path) if line and self._stays(line, start_step)]
        write_text(self._path, "".join(kept))

    def _stays(self, line: str, start_step: int) -> bool:
        record = _record(line)
        if not record:  # cut by the end of a killed run, or no line of ours at all
            return not line.startswith(_START)
        step = record.get("step", 0)
        is_done = bool(start_step) and isinstance(step, (int, float)) and step <= start_step
        return record.get("run") != self._run or is_done

    def _attempt(self, action: Any, *arguments: Any) -> None:
        try:
            action(*arguments)
        except OSError as error:
            if not self._has_warned:
                what = error.strerror or error
                log.warning("%s: the log of the run cannot be written and has gaps: %s", self._path, what)
            self._has_warned = True

    def _notify(self, action: Callable[[Tracker], None]) -> None:
        """Each tracker on its own: one that fails warns once and keeps nobody else from going on."""
        for position, tracker in enumerate(self._trackers):
            try:
                action(tracker)
            except tracker.errors as error:
                if position not in self._failed:
                    log.warning(
                        "%s fails and its curves have gaps; training goes on: %s",
                        type(tracker).__name__.removesuffix("Tracker"), error,
                    )  # fmt: skip
                self._failed.add(position)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
