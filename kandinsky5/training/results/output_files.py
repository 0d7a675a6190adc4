"""What is in the output folder: the meaning of every file that a run leaves there."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from kandinsky5.training.results.names import is_average_name, is_lora_name, is_state_name

SAMPLE_FOLDER = "sample"


@dataclass(frozen=True, slots=True)
class FileKind:
    """A kind of file."""

    example: str
    """How the guide writes its name, of a run named `k5_lora`."""
    meaning: str


FILE_KINDS = {
    "final": FileKind("k5_lora.safetensors", "the LoRA after the last step: the result of the training"),
    "lora": FileKind("k5_lora-000010.safetensors, k5_lora-step00000500.safetensors",
                     "the LoRA after an epoch or a step: use it like the last one if its samples are better"),
    "average": FileKind("k5_lora-ema.safetensors", "the averaged weights of --ema_decay, a LoRA of its own"),
    "settings": FileKind("k5_lora_config_lora.json",
                         "rank and alpha beside a LoRA; the official loaders need it, keep both together"),
    "effect": FileKind("k5_lora_effect.txt", "how far a LoRA changes the model, by block and by timestep"),
    "state": FileKind("k5_lora-state, k5_lora-step00000500-state",
                      "a state that --resume continues from; not needed to use the LoRA"),
    "report": FileKind("k5_lora_report.html", "this page: everything about the run in one file"),
    "config": FileKind("k5_lora_config.toml", "the options of the run, for --config_file"),
    "validation": FileKind("k5_lora_validation.png", "the validation loss over the steps"),
    "timesteps": FileKind("k5_lora_timesteps.png", "the distribution of timesteps (--show_timesteps image)"),
    "metrics": FileKind("metrics.jsonl", "the numbers of all runs in this folder, one line per step"),
    "control": FileKind("k5_lora.control", "a word for the running training: save, sample or stop"),
    "lock": FileKind("k5_lora.lock", "keeps a second run of this name out; may be deleted after the run"),
    "sample": FileKind("sample/k5_lora_000200_00_20250131120000_42.mp4",
                       "a sample: step (or e and epoch), prompt, time, seed; its first frame as .png"),
    "grid": FileKind("sample/k5_lora_grid_00.png", "four frames of a prompt's samples, one row per step"),
    "steps": FileKind("sample/k5_lora_steps_00.mp4", "a prompt's samples of all steps side by side"),
}  # fmt: skip
"""In the order in which they are listed."""

_FIXED = {
    ".control": "control",
    ".lock": "lock",
    "_config.toml": "config",
    "_report.html": "report",
    "_validation.png": "validation",
    "_timesteps.png": "timesteps",
}
_BESIDE_LORA = {"_config_lora.json": "settings", "_effect.txt": "effect"}
_SAMPLES = (
    (re.compile(r"_grid_\d{2,}\.png"), "grid"),
    (re.compile(r"_steps_\d{2,}\.mp4"), "steps"),
    (re.compile(r"_e?\d{6,}_\d{2,}_\d{14}_\d+(_000)?\.(mp4|png)"), "sample"),
)


def kind_of(name: str, output_name: str) -> str | None:
    """The key in FILE_KINDS of a file in the output folder; None for one that is not of this run."""
    if name == "metrics.jsonl":
        return "metrics"
    if not name.startswith(output_name):
        return None
    rest = name.removeprefix(output_name)
    if rest in _FIXED:
        return _FIXED[rest]
    if is_state_name(name, output_name):
        return "state"
    for end, kind in _BESIDE_LORA.items():
        if name.endswith(end) and _is_lora(f"{name.removesuffix(end)}.safetensors", output_name):
            return kind
    if is_average_name(name, output_name):
        return "average"
    if is_lora_name(name, output_name):
        return "lora" if rest != ".safetensors" else "final"
    return None


def _is_lora(name: str, output_name: str) -> bool:
    return is_lora_name(name, output_name) or is_average_name(name, output_name)


def sample_kind(name: str, output_name: str) -> str | None:
    """The same of a file in the folder of samples."""
    if not name.startswith(output_name):
        return None
    rest = name.removeprefix(output_name)
    return next((kind for pattern, kind in _SAMPLES if pattern.fullmatch(rest)), None)


def files_of_run(
    output_dir: Path, output_name: str, *, also: Iterable[Path] = ()
) -> Iterator[tuple[str, Path]]:
    """(key in FILE_KINDS, path) of everything that a run has left, in the order of FILE_KINDS and by name.

    Args:
        also: files in the output folder that are about to be written.
    Raises:
        OSError: a folder cannot be listed.
    """
    found = [(kind_of(path.name, output_name), path) for path in {*output_dir.iterdir(), *also}]
    samples = output_dir / SAMPLE_FOLDER
    if samples.is_dir():
        found += [(sample_kind(path.name, output_name), path) for path in samples.iterdir()]
    order = list(FILE_KINDS)
    known = [(kind, path) for kind, path in found if kind is not None]
    yield from sorted(known, key=lambda entry: (order.index(entry[0]), entry[1].name))
