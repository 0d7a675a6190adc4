"""The state directory: everything required to resume a run exactly.

    lora.safetensors   the trained factors, float32
    optimizer.pt       the optimizer's state, read back with weights_only=True
    scheduler.pt       only for schedules that are no function of the step
    ema.safetensors    only with --ema_decay: the average of the factors, float32
    state.json         position and settings of the run
    manifest.json      sizes and SHA-256 of the others, written last

A directory is written under a temporary name and renamed, so what carries a final name is whole. One that
replaces another needs two renames; the older one waits under `.k5old-...-<name>` until the second is done.
"""

from __future__ import annotations

import hashlib
import json
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky5.training.results.names import is_state_name
from modules.errors import DataError, ModelFileError
from modules.files import atomic_writer, sync_folder, write_json
from modules.leftovers import find_leftovers, machine_mark, temporary_name
from modules.logs import get_logger
from modules.parsing import parse_json
from modules.tensor_files import read_tensors, write_tensors
from networks.lora_scales import PEFT_METADATA

log = get_logger(__name__)

FORMAT_VERSION = 1
_TEMPORARY_PREFIX = ".k5state-"
_OLD_PREFIX = ".k5old-"
_LORA = "lora.safetensors"
_REQUIRED = (_LORA, "optimizer.pt", "state.json")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainingState:
    """The position of a run and the settings it was started with. All of it is JSON."""

    output_name: str
    task: str
    seed: int
    step: int
    """Optimizer steps done."""
    total_steps: int
    steps_per_epoch: int
    gradient_accumulation_steps: int
    num_processes: int
    data_order: str
    """Hash of the first epoch's batches: another dataset or batch size gives another."""
    network: Mapping[str, Any]
    """Rank, alpha and a hash of the trained layers and their shapes."""
    optimizer: str
    learning_rate: float
    lora_settings: Mapping[str, Any] = field(default_factory=dict)
    """PEFT's settings of its LoRA file, with the alphas; earlier versions had none."""
    skipped_steps: int = 0
    """Consecutive steps whose numbers were not finite."""
    recent_losses: tuple[float, ...] = ()
    """The last epoch's worth, for the running average."""
    session_id: str = ""
    started_at: float = 0.0
    ema_decay: float | None = None
    tracker_run: str = ""
    """Name of the folder of TensorBoard curves, which a resumed run continues."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """The options of the run, without folders and keys."""
    library_versions: Mapping[str, str] = field(default_factory=dict)
    contents: Mapping[str, str] = field(default_factory=dict)
    """Hashes of what its caches and model files hold, see `run_contents`; earlier versions had none."""
    weights: str = ""
    """How the frozen weights were stored; earlier versions had no entry and never rotated any."""
    branch: int = 0
    """Grows each time a run goes back to an earlier state and so leaves later ones behind."""

    @property
    def epoch(self) -> int:
        """Epochs completed."""
        return self.step // self.steps_per_epoch


_COUNTS = ("total_steps", "steps_per_epoch", "gradient_accumulation_steps", "num_processes")
"""Of which every run has one at least."""
_NUMBER = (int, float)
_KINDS: dict[str, type | tuple[type, ...]] = {
    "str": str,
    "int": int,
    "float": _NUMBER,
    "float | None": (*_NUMBER, type(None)),
    "tuple": list,
    "Mapping": dict,
}
"""What JSON holds for the annotation of a field."""


@dataclass(frozen=True, slots=True)
class StateMark:
    """The run, branch and step of a state."""

    output_name: str
    branch: int
    step: int

    @property
    def place(self) -> tuple[int, int]:
        """Larger is newer: a branch that was begun later is, whatever its step."""
        return self.branch, self.step


@dataclass(frozen=True, slots=True)
class SavedState:
    """A verified state directory, read into memory on the CPU."""

    folder: Path
    run: TrainingState
    lora: Mapping[str, Tensor]
    optimizer: dict[str, Any]
    scheduler: dict[str, Any] | None
    average: Mapping[str, Tensor] | None = None

    @property
    def lora_path(self) -> Path:
        return self.folder / _LORA


def write_state(
    folder: Path,
    run: TrainingState,
    lora: Mapping[str, Tensor],
    optimizer: Mapping[str, Any],
    scheduler: Mapping[str, Any] | None = None,
    average: Mapping[str, Tensor] | None = None,
) -> None:
    """Write a whole state directory; an older one of that name is replaced only by the finished new one.

    Raises:
        OSError: the disk refuses, or another program has removed what was written.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    building = folder.parent / temporary_name(_TEMPORARY_PREFIX)
    building.mkdir()
    names = [*_REQUIRED]
    try:
        tensors = {name: tensor.float() for name, tensor in lora.items()}
        header = {PEFT_METADATA: json.dumps(run.lora_settings, sort_keys=True)} if run.lora_settings else None
        write_tensors(building / _LORA, tensors, header, makes_folder=False)
        _write_torch(building / "optimizer.pt", optimizer)
        if scheduler is not None:
            names.append("scheduler.pt")
            _write_torch(building / "scheduler.pt", scheduler)
        if average is not None:
            names.append("ema.safetensors")
            write_tensors(building / "ema.safetensors", average, makes_folder=False)
        values = {**asdict(run), "format_version": FORMAT_VERSION}
        write_json(building / "state.json", values, makes_folder=False)
        manifest = {"format_version": FORMAT_VERSION, "files": {n: _fingerprint(building / n) for n in names}}
        write_json(building / "manifest.json", manifest, makes_folder=False)
        _take_place(building, folder)
    except BaseException:
        shutil.rmtree(building, ignore_errors=True)
        raise


def _take_place(building: Path, folder: Path) -> None:
    """Give the finished directory its name; directories cannot be renamed over each other."""
    if not folder.exists():
        building.rename(folder)
        sync_folder(folder.parent)
        return
    old = folder.with_name(temporary_name(_OLD_PREFIX, folder.name))
    folder.rename(old)
    try:
        building.rename(folder)
    except BaseException:
        old.rename(folder)
        raise
    sync_folder(folder.parent)
    _remove_folder(old)


def remove_state(folder: Path) -> None:
    """Delete a state directory; what is left of it after a kill no longer looks like a state."""
    removed_folder = folder.with_name(temporary_name(_TEMPORARY_PREFIX))
    folder.rename(removed_folder)
    _remove_folder(removed_folder)


def _remove_folder(folder: Path) -> None:
    # What cannot be deleted now is deleted at the next start; the run continues.
    shutil.rmtree(folder, ignore_errors=True)


def _write_torch(path: Path, value: Mapping[str, Any]) -> None:
    with atomic_writer(path, makes_folder=False) as stream:
        try:
            torch.save(dict(value), stream)
        except RuntimeError as error:
            # torch hides what the stream raised: a full disk must be distinguished from a bug.
            if isinstance(error.__context__, OSError):
                raise error.__context__ from error
            raise


def _fingerprint(path: Path) -> dict[str, Any]:
    with path.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": path.stat().st_size, "sha256": digest}


def state_problem(folder: Path) -> str | None:
    """Reason why a state directory cannot be resumed, or None if all files of its manifest are intact."""
    manifest_path = folder / "manifest.json"
    if not manifest_path.is_file():
        return "it has no manifest.json, so it was never finished"
    try:
        manifest = parse_json(manifest_path.read_text(encoding="utf-8"))
        version, files = manifest["format_version"], dict(manifest["files"])
        files.update({name: None for name in _REQUIRED if name not in files})
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest.json cannot be read ({error})"
    if version != FORMAT_VERSION:
        return f"it has format version {version}, this program reads {FORMAT_VERSION}"
    for name, expected in files.items():
        path = folder / name
        if Path(name).name != name or not path.is_file():
            return f"{name} is missing"
        if _fingerprint(path) != expected:
            return f"{name} is damaged: its size or SHA-256 is not the one in manifest.json"
    return None


def read_state(folder: Path) -> SavedState:
    """Read a state directory after checking every byte of it.

    Raises:
        ModelFileError: it is no state of this program, such as one of accelerate or a file.
        DataError: it is damaged or unfinished.
    """
    if not folder.is_dir():
        what = "is a file, not a state folder" if folder.exists() else "no such folder"
        raise ModelFileError(f"--resume {folder}: {what}")
    foreign = {"random_states_0.pkl", "optimizer.bin", "scheduler.bin", "model.safetensors"}
    if not (folder / "manifest.json").exists() and any((folder / name).exists() for name in foreign):
        raise ModelFileError(
            f"--resume {folder}: a state of musubi-tuner (accelerate's format), which cannot be continued "
            "exactly. Start a new run from its LoRA: --network_weights <its .safetensors>"
        )
    problem = state_problem(folder)
    if problem:
        raise DataError(f"--resume {folder}: {problem}. Use another state.")
    run = _read_run(folder / "state.json")
    scheduler, average = folder / "scheduler.pt", folder / "ema.safetensors"
    return SavedState(
        folder,
        run,
        read_tensors(folder / _LORA)[0],
        _read_torch(folder / "optimizer.pt"),
        _read_torch(scheduler) if scheduler.is_file() else None,
        read_tensors(average)[0] if average.is_file() else None,
    )


def _read_run(path: Path) -> TrainingState:
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
        kinds = {item.name: _KINDS[str(item.type).partition("[")[0]] for item in fields(TrainingState)}
        known = {name: value for name, value in values.items() if name in kinds}
        for name, value in known.items():
            if isinstance(value, bool) or not isinstance(value, kinds[name]):
                raise TypeError(f"{name} is {str(value)[:40]}")
            if name in _COUNTS and value < 1:
                raise ValueError(f"{name} is {value}")
        return TrainingState(**known)
    except (OSError, ValueError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: not written by this program ({error})") from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ModelFileError(f"{path}: holds more than tensors and numbers, and is not read") from error


def find_state(output_dir: Path, output_name: str, resume: str) -> Path | None:
    """Resolve `--resume` to a directory; for "auto" the newest complete one of this output name, if any.

    Raises:
        DataError: there are states, but none is complete.
    """
    put_back_old_states(output_dir, output_name)
    if resume != "auto":
        return Path(resume)
    candidates = list_states(output_dir, output_name)
    broken = []
    for folder, _ in sorted(candidates, key=lambda c: c[1].place if c[1] else (-1, -1), reverse=True):
        problem = state_problem(folder)
        if problem is None:
            return folder
        log.warning("%s cannot be used: %s", folder, problem)
        broken.append(folder.name)
    if broken:
        raise DataError(f"--resume auto: no state in {output_dir} is complete: {', '.join(broken)}")
    return None


def how_to_continue(output_dir: Path, output_name: str) -> str:
    """What a user can do after a failure, as the end of a sentence: resume, if there is a state."""
    if list_states(output_dir, output_name):
        return "continue with --resume auto; earlier files are as they were"
    return "start again; earlier files are as they were, and with --save_state the run could be continued"


def list_states(output_dir: Path, output_name: str) -> list[tuple[Path, StateMark | None]]:
    """List the state directories of an output name, with their marks where readable."""
    found = []
    for folder in output_dir.iterdir() if output_dir.is_dir() else ():
        if folder.is_dir() and is_state_name(folder.name, output_name):
            mark = read_mark(folder)
            if mark is None or mark.output_name == output_name:
                found.append((folder, mark))
    return found


def read_mark(folder: Path) -> StateMark | None:
    """The run and step of a state directory; None where they cannot be read."""
    try:
        values = parse_json((folder / "state.json").read_text(encoding="utf-8"))
        return StateMark(str(values["output_name"]), int(values.get("branch", 0)), int(values["step"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError):
        return None


def put_back_old_states(output_dir: Path, output_name: str) -> None:
    """Where a killed process had moved a state away and not yet put the new one in its place, undo that.

    Several processes may do it at once. Of another machine it is done at once too: the two renames take no
    time, so its process has ended in between, and the run may be meant to go on here.
    """
    for old in find_leftovers(output_dir, _OLD_PREFIX):
        is_ours = is_state_name(old.rest, output_name)
        if not is_ours or (old.machine == machine_mark() and not old.is_abandoned()):
            continue
        try:
            if not (output_dir / old.rest).exists():
                old.path.rename(output_dir / old.rest)
        except FileNotFoundError:
            continue  # another process of this run was faster


def remove_leftover_states(output_dir: Path) -> int:
    """Delete incomplete and replaced directories of killed processes; returns their number.

    A replaced one whose successor is missing stays: `put_back_old_states` gives it its name back.
    """
    removed = 0
    for prefix in (_TEMPORARY_PREFIX, _OLD_PREFIX):
        for leftover in find_leftovers(output_dir, prefix):
            is_needed = prefix == _OLD_PREFIX and not (output_dir / leftover.rest).exists()
            if is_needed or not leftover.is_abandoned():
                continue
            _remove_folder(leftover.path)
            removed += 1
    return removed
