"""Determines the run that wrote a result: a run replaces and deletes only results of its own name."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from kandinsky5.training.results.names import (
    ResultNames,
    effect_path,
    is_average_name,
    is_lora_name,
    is_state_name,
)
from kandinsky5.training.results.state import read_mark, remove_state
from modules.errors import ModelFileError
from modules.logs import get_logger
from modules.tensor_files import read_header
from networks.lora_scales import lora_config_path

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class FoundResults:
    """LoRAs and states that carry names of a run."""

    own: tuple[Path, ...]
    """Written by a run of this output name, according to their metadata."""
    foreign: tuple[Path, ...]
    """Others that the run might replace: of another run, or without metadata that names one."""


def find_results(names: ResultNames, *, with_average: bool) -> FoundResults:
    """Group the results under the names of a run by their author.

    Args:
        with_average: whether the run writes averages, so that other files of such names are in its way.
    """
    own, foreign = [], []
    for path in sorted(_named_alike(names)):
        if maker(path) == names.output_name:
            own.append(path)
        elif with_average or not is_average_name(path.name, names.output_name):
            foreign.append(path)
    return FoundResults(tuple(own), tuple(foreign))


def _named_alike(names: ResultNames) -> Iterator[Path]:
    for path in names.output_dir.iterdir() if names.output_dir.is_dir() else ():
        name, run = path.name, names.output_name
        if is_lora_name(name, run) or is_average_name(name, run) or is_state_name(name, run):
            yield path


def maker(path: Path) -> str | None:
    """The output name of the run that wrote a LoRA or a state; None if it cannot be read."""
    if path.is_dir():
        mark = read_mark(path)
        return None if mark is None else mark.output_name
    try:
        return read_header(path).metadata.get("ss_output_name")
    except ModelFileError:
        return None


def delete_result(path: Path, output_name: str) -> None:
    """Delete a LoRA with its companion files, or a state directory, if a run of this name wrote it."""
    if not path.exists():
        return
    if maker(path) != output_name:
        log.warning("%s is not deleted: its metadata does not name the run %s", path, output_name)
    elif path.is_dir():
        remove_state(path)
    else:
        # The LoRA last: its metadata names the run that wrote the other files.
        for file in (lora_config_path(path), effect_path(path), path):
            file.unlink(missing_ok=True)
