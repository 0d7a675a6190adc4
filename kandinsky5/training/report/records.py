"""Reads what a run left in its output folder, and names everything that is missing or damaged."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import av
from PIL import Image

from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.output_files import SAMPLE_FOLDER, sample_kind
from kandinsky5.training.results.saved_config import read_config
from kandinsky5.training.tracking.metrics import FILE_NAME, read_all_records
from modules.messages import counted, names_in_short
from modules.parsing import ParseError, parse_json

Record = Mapping[str, Any]
_NUMBER = (int, float)


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """One optimizer step."""

    number: int
    loss: float
    """NaN where it was not finite."""
    learning_rate: float | None
    seconds: float | None
    peak_bytes: int | None
    """Peak device memory."""
    clips: Sequence[tuple[float, float]]
    """(sigma, loss) of single clips; none where only the sum of several is on record."""


@dataclass(frozen=True, slots=True)
class PromptSamples:
    """What a run has made of one prompt."""

    number: int
    files: Mapping[int, Path]
    """Step -> file, as named in metrics.jsonl: relative to the output folder."""
    text: str | None
    """The prompt; None if no file holds it."""


@dataclass(slots=True)
class RunRecords:
    """All that is known of a run."""

    names: ResultNames
    options: Mapping[str, Any] = field(default_factory=dict)
    start: Record = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    effects: list[Record] = field(default_factory=list)
    samples: list[PromptSamples] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """What is missing or damaged, as sentences without folders."""


def run_names(output_dir: Path) -> list[str]:
    """The runs that have left records or options in a folder."""
    records, _ = read_all_records(output_dir / FILE_NAME)
    found = {name for record in records if isinstance(name := record.get("run"), str) and name}
    end = ResultNames(output_dir, "").config.name
    found |= {path.name.removesuffix(end) for path in output_dir.glob(f"?*{end}")}
    return sorted(found)


def read_run(output_dir: Path, name: str) -> RunRecords:
    """Everything that a run has left; what cannot be read is a line of `problems`, never an error."""
    run = RunRecords(ResultNames(output_dir, name))
    _read_options(run)
    path = output_dir / FILE_NAME
    try:
        records, damaged = read_all_records(path)
    except OSError as error:
        run.problems.append(f"{FILE_NAME} cannot be read: {error.strerror}")
        return run
    if damaged:
        lost = counted(len(damaged), "line cannot", "lines cannot")
        run.problems.append(f"{FILE_NAME}: {lost} be read, numbers {names_in_short(damaged)}")
    own = [record for record in records if record.get("run") == name]
    if not own:
        what = "is missing" if not path.exists() else f"has no line of the run {name}"
        run.problems.append(f"{FILE_NAME} {what}: there are no curves")
    readers = {"step": _read_step, "validation": _read_validation, "lora": _read_effect, "start": _read_start}
    incomplete = 0
    for record in own:
        kind = record.get("kind")
        reader = readers.get(kind) if isinstance(kind, str) else None
        if reader is not None:
            incomplete += not reader(run, record)
    run.steps.sort(key=lambda step: step.number)
    run.validations.sort(key=lambda record: record["step"])
    if incomplete:
        left_out = counted(incomplete, "line lacks values and is", "lines lack values and are")
        run.problems.append(f"{FILE_NAME}: {left_out} left out")
    if own and not run.start:
        run.problems.append(
            f"{FILE_NAME} has no line of kind start: datasets and memory are unknown; the run was made by an "
            "older version or its first lines are lost"
        )
    _read_samples(run, own)
    return run


def _read_options(run: RunRecords) -> None:
    path = run.names.config
    try:
        run.options = read_config(path)
    except FileNotFoundError:
        run.problems.append(f"{path.name} is missing: the settings are unknown")
    except (OSError, UnicodeDecodeError, ParseError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        run.problems.append(f"{path.name} cannot be read: {reason}")


def _read_step(run: RunRecords, record: Record) -> bool:
    number, loss = record.get("step"), as_number(record.get("loss"))
    if not _is_count(number) or loss is None:
        return False
    sigmas, losses = numbers(record.get("sigma")), numbers(record.get("losses"))
    if not losses and len(sigmas) == 1:  # of one clip: its loss is the step's
        losses = [loss]
    peak = record.get("peak_bytes")
    run.steps.append(
        Step(
            number=number,
            loss=loss,
            learning_rate=as_number(record.get("lr")),
            seconds=as_number(record.get("seconds")),
            peak_bytes=peak if _is_count(peak) else None,
            clips=list(zip(sigmas, losses, strict=True)) if len(sigmas) == len(losses) else [],
        )
    )
    return True


def _read_validation(run: RunRecords, record: Record) -> bool:
    parts = record.get("timesteps")
    is_whole = (
        _is_count(record.get("step"))
        and _is_count(record.get("clips"))
        and _has_losses(record)
        and isinstance(parts, list)
        and all(isinstance(part, Mapping) and {"from", "to"} <= part.keys() for part in parts)
        and all(map(_has_losses, parts))
    )
    if is_whole:
        run.validations.append(record)
    return is_whole


def _has_losses(record: Record) -> bool:
    return all(as_number(record.get(key)) is not None for key in ("loss", "base_loss"))


def _read_effect(run: RunRecords, record: Record) -> bool:
    is_whole = (
        _is_count(record.get("step"))
        and isinstance(record.get("file"), str)
        and as_number(record.get("change")) is not None
    )
    if is_whole:
        run.effects.append(record)
    return is_whole


def _read_start(run: RunRecords, record: Record) -> bool:
    datasets, memory = record.get("datasets"), record.get("memory")
    if not isinstance(datasets, list) or not all(isinstance(entry, Mapping) for entry in datasets):
        return False
    if memory is not None and not isinstance(memory, Mapping):
        return False
    run.start = record  # that of the last start wins
    return True


def _read_samples(run: RunRecords, records: Sequence[Record]) -> None:
    files: dict[int, dict[int, Path]] = {}
    gone, foreign = [], 0
    folder = run.names.output_dir
    for record in records:
        if record.get("kind") != "sample":
            continue
        step, prompt, file = (record.get(key) for key in ("step", "prompt", "file"))
        if not (_is_count(step) and _is_count(prompt) and _is_sample(file, run)):
            foreign += 1
        elif (folder / file).is_file():
            files.setdefault(prompt, {})[step] = Path(file)
        else:
            gone.append(Path(file).name)
    if foreign:
        unnamed = counted(foreign, "sample has", "samples have")
        run.problems.append(f"{FILE_NAME}: {unnamed} no usable file name")
    if gone:
        lost = counted(len(gone), "sample is", "samples are")
        run.problems.append(f"{lost} no longer there: {names_in_short(gone)}")
    for prompt in sorted(files):
        found = dict(sorted(files[prompt].items()))
        text = next(_prompts_in(folder / file for file in reversed(found.values())), None)
        if text is None:
            run.problems.append(f"no sample of prompt {prompt} holds the prompt that it was made from")
        run.samples.append(PromptSamples(prompt, found, text))


def _is_sample(file: object, run: RunRecords) -> TypeGuard[str]:
    """Whether a name is that of a sample of this run: the record may be anybody's text."""
    if not isinstance(file, str):
        return False
    folder, _, name = file.partition("/")
    return folder == SAMPLE_FOLDER and sample_kind(name, run.names.output_name) == "sample"


def _prompts_in(paths: Iterator[Path]) -> Iterator[str]:
    for path in paths:
        try:
            if path.suffix == ".png":
                with Image.open(path) as image:
                    text = image.info.get("prompt")
            else:
                with av.open(path) as container:
                    text = parse_json(container.metadata.get("comment", "{}")).get("prompt")
        except (OSError, ValueError, AttributeError, av.FFmpegError):
            continue
        if isinstance(text, str):
            yield text


def as_number(value: object) -> float | None:
    """A number of metrics.jsonl: text such as "nan" stands for what is not finite; None for anything else."""
    if isinstance(value, str) and value.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        return math.nan
    if not isinstance(value, _NUMBER) or isinstance(value, bool):
        return None
    return float(value) if abs(value) < 1e300 else math.nan  # NaN compares as False


def numbers(value: object) -> list[float]:
    """The numbers of a list; none at all if it is not one of numbers."""
    found = [as_number(item) for item in value] if isinstance(value, list) else []
    return [] if None in found else [number for number in found if number is not None]


def _is_count(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53
