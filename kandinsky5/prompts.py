"""Prompts with their own settings: lines and files for generation and for samples during training.

Does not import torch, because the command line uses `PromptSpec`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from dataset.geometry import NABLA_STEP, PIXEL_STEP
from kandinsky5.tasks import MAX_FRAMES, MAX_SIDE
from modules.errors import ConfigError
from modules.options import as_word, file_path, float_between, int_between, option, options_of
from modules.parsing import ParseError, parse_json, parse_toml
from modules.path_kinds import file_problem

_WHAT = "input"
PROMPT_FILE_SUFFIXES = (".txt", ".json", ".toml")


seed_number = int_between(0, 2**63 - 1)
sampling_shift = float_between(1e-3, 1e3)
lora_strength = float_between(-1e3, 1e3)
"""Readers shared with other options. Larger LoRA strengths would overflow."""


def _some_path(word: str) -> Path:
    if not word:
        raise argparse.ArgumentTypeError("must be a path")
    return file_path(word)


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptSpec:
    """The settings of one video; None means not given. Prompt lines have the same ranges."""

    prompt: str | None = option(None, "text prompt", group=_WHAT)
    negative_prompt: str | None = option(
        None, 'negative prompt (default: the official one; "" for none)', group=_WHAT
    )
    """An empty string is an empty negative prompt; None means the default negative prompt."""
    width: int | None = option(
        None,
        f"width in pixels, a multiple of {PIXEL_STEP}, or of {NABLA_STEP} with NABLA (default: the task's, "
        "or the image's)",
        int_between(1, MAX_SIDE),
    )
    height: int | None = option(None, "height in pixels, as --width", int_between(1, MAX_SIDE))
    frames: int | None = option(
        None,
        "number of pixel frames, 4k+1 (default: the task's; 1 if --output is a .png)",
        int_between(1, MAX_FRAMES),
        hidden_names=("video_length",),
    )
    steps: int | None = option(
        None, "sampling steps (default: the task's)", int_between(1, 1000), hidden_names=("infer_steps",)
    )
    guidance: float | None = option(
        None,
        "guidance weight (default: the task's); 1 means no second pass",
        float_between(0, 100),
        hidden_names=("guidance_scale",),
    )
    scheduler_scale: float | None = option(
        None,
        "shift of the sigma schedule (default: the task's)",
        sampling_shift,
        hidden_names=("flow_shift",),
    )
    seed: int | None = option(None, "seed of the starting noise (default: 42)", seed_number)
    image: Path | None = option(
        None,
        "first frame, for image-to-video tasks",
        _some_path,
        group=_WHAT,
        metavar="PATH",
        other_names=("i",),
        hidden_names=("image_path",),
    )
    image_last: Path | None = option(
        None,
        "last frame, together with --image (experimental)",
        _some_path,
        group=_WHAT,
        metavar="PATH",
        hidden_names=("end_image_path",),
    )
    lora_multiplier: tuple[float, ...] | None = None
    where: str = ""
    """File and line for messages; empty for the command line."""

    def over(self, defaults: PromptSpec) -> PromptSpec:
        """This spec, with missing settings taken from `defaults`."""
        names = [field.name for field in fields(self) if field.name != "where"]
        gaps = {name: getattr(defaults, name) for name in names if getattr(self, name) is None}
        return replace(self, **gaps)


@dataclass(frozen=True, slots=True)
class PromptList:
    """The contents of a prompt file: valid prompts in file order, problems of the others, and notes."""

    specs: tuple[PromptSpec, ...]
    problems: tuple[str, ...]
    notes: tuple[str, ...]

    def checked(self) -> tuple[PromptSpec, ...]:
        """All prompts, for callers that require a file without problems.

        Raises:
            ConfigError: lists every problem of the file.
        """
        if self.problems:
            raise ConfigError(self.problems)
        return self.specs


def _strengths(word: str) -> tuple[float, ...]:
    values = tuple(map(lora_strength, word.replace(",", " ").split()))
    if not values:
        raise argparse.ArgumentTypeError("must be at least one number")
    return values


@dataclass(frozen=True, slots=True)
class _Flag:
    """One setting: its spelling in a line, its key in .json and .toml, its field in PromptSpec."""

    name: str
    key: str
    field: str


_FLAGS = (
    _Flag("w", "width", "width"),
    _Flag("h", "height", "height"),
    _Flag("f", "frame_count", "frames"),
    _Flag("d", "seed", "seed"),
    _Flag("s", "sample_steps", "steps"),
    _Flag("g", "guidance_scale", "guidance"),
    _Flag("l", "cfg_scale", "guidance"),  # after --g: it wins where both are given
    _Flag("fs", "discrete_flow_shift", "scheduler_scale"),
    _Flag("n", "negative_prompt", "negative_prompt"),
    _Flag("i", "image_path", "image"),
    _Flag("ei", "end_image_path", "image_last"),
    _Flag("m", "lora_multiplier", "lora_multiplier"),
)
_READERS = {name: declared.read or str for name, declared in options_of(PromptSpec).items()}
_READERS["lora_multiplier"] = _strengths
_FLAG_BY_NAME = {flag.name: flag for flag in _FLAGS}
_FLAG_BY_KEY = {flag.key: flag for flag in _FLAGS}
_OTHER_MODELS = {"cn": "control_video_path", "ci": "control_image_path", "of": "one_frame"}
"""Settings of other models that prompt files may contain; they have no effect."""


_OPTION_START = re.compile(r"\s--(?=[^\s-])")
"""After any white space, wide and no-break spaces included; a dash between words is prose."""


class _Reader:
    """Collects specs, problems and notes while a file is read."""

    def __init__(self) -> None:
        self.specs: list[PromptSpec] = []
        self.problems: list[str] = []
        self.notes: list[str] = []

    def add(self, prompt: str, settings: Mapping[str, str], where: str, spell: Callable[[str], str]) -> None:
        """Read `settings` (key -> value as text); `spell` writes a key as it appears in the file."""
        values: dict[str, Any] = {}
        texts = {"prompt": prompt, **{spell(key): word for key, word in settings.items()}}
        problems = [f"{where}: {line}" for line in text_problems(texts)]
        for key in sorted(settings, key=list(_FLAG_BY_KEY).index):
            flag = _FLAG_BY_KEY[key]
            try:
                values[flag.field] = _READERS[flag.field](settings[key])
            except argparse.ArgumentTypeError as error:
                problems.append(f"{where}: {spell(key)}: {error}")
        self.problems += problems
        if not problems:
            self.specs.append(PromptSpec(prompt=prompt, where=where, **values))

    def add_line(self, line: str, where: str) -> None:
        prompt, *options = _OPTION_START.split(line)
        settings: dict[str, str] = {}
        problems = []
        for setting in options:
            name, *words = setting.split(maxsplit=1)
            name, word = name.lower(), "".join(words)
            if name in _OTHER_MODELS:
                self.notes.append(f"{where}: --{name} is a setting of other models and has no effect")
            elif name not in _FLAG_BY_NAME:
                known = " ".join(f"--{flag}" for flag in _FLAG_BY_NAME)
                problems.append(f"{where}: --{name} is not a prompt setting; use one of {known}")
            else:
                settings[_FLAG_BY_NAME[name].key] = word.strip()
        if problems:
            self.problems += problems
            return
        spelling = {flag.key: f"--{flag.name}" for flag in _FLAGS}
        self.add(prompt.strip(), settings, where, spelling.__getitem__)

    def add_entry(self, entry: object, where: str) -> None:
        if isinstance(entry, str):
            self.add_line(entry, where)
            return
        if not isinstance(entry, dict):
            self.problems.append(f"{where}: expected a string or a table of settings")
            return
        settings: dict[str, str] = {}
        problems = []
        for key, value in entry.items():
            if key == "prompt":
                continue
            if key in _OTHER_MODELS.values():
                self.notes.append(f"{where}: {key} is a setting of other models and has no effect")
            elif key not in _FLAG_BY_KEY:
                problems.append(
                    f"{where}: {key} is not a prompt setting; use one of {' '.join(_FLAG_BY_KEY)}"
                )
            elif isinstance(value, bool) or not isinstance(value, (str, int, float, list)):
                problems.append(f"{where}: {key}: unexpected value {value!r}")
            else:
                settings[key] = " ".join(map(as_word, value)) if isinstance(value, list) else as_word(value)
        prompt = entry.get("prompt", "")
        if not isinstance(prompt, str):
            problems.append(f"{where}: prompt: expected text, got {prompt!r}")
        self.problems += problems
        if not problems:
            self.add(prompt.strip(), settings, where, str)

    def result(self) -> PromptList:
        return PromptList(tuple(self.specs), tuple(self.problems), tuple(self.notes))


def text_problems(texts: Mapping[str, str | None]) -> list[str]:
    """Report texts with bytes or surrogates that UTF-8 cannot encode.

    Args:
        texts: name for the message -> text.
    """
    problems = []
    for name, text in texts.items():
        try:
            (text or "").encode("utf-8")
        except UnicodeEncodeError as error:
            code = ord(error.object[error.start])
            problems.append(
                f"{name}: U+{code:04X} at character {error.start + 1} is not a valid character; give the "
                "text in UTF-8"
            )
    return problems


def parse_prompt_line(line: str, where: str) -> PromptList:
    """One line `text --w 512 --n what to avoid ...`, as in a .txt file: one spec, or its problems."""
    reader = _Reader()
    reader.add_line(" " + line.strip(), where)
    return reader.result()


def read_prompt_file(path: Path) -> PromptList:
    """Read a .txt, .json or .toml prompt file; problems of single prompts are collected, not raised.

    .txt: one prompt per line; empty lines and lines that start with # are skipped. .json: a list of objects
    or of such lines. .toml: `[prompt]` with shared settings and one `[[prompt.subset]]` per prompt.

    Raises:
        ConfigError: the file is missing, has another extension, cannot be read or parsed, or contains no
            prompts.
    """
    if path.suffix.lower() not in PROMPT_FILE_SUFFIXES:
        raise ConfigError(
            f"{path}: unknown extension; a prompt file ends in {', '.join(PROMPT_FILE_SUFFIXES)}"
        )
    problem = file_problem(path)
    if problem is not None:
        raise ConfigError(f"{path}: {problem}")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as UTF-8 text ({error})") from error
    reader = _Reader()
    if path.suffix.lower() == ".txt":
        # Not splitlines, which also ends lines at characters that a prompt may hold, such as U+2028.
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip() and not line.lstrip().startswith("#"):
                # No strip at the left alone: a line may consist of settings only.
                reader.add_line(" " + line.strip(), f"{path} line {number}")
    else:
        for number, entry in enumerate(_structured_entries(path, text)):
            reader.add_entry(entry, f"{path} prompt {number}")
    result = reader.result()
    if not result.specs and not result.problems:
        raise ConfigError(f"{path}: contains no prompts")
    return result


def _structured_entries(path: Path, text: str) -> list[object]:
    try:
        content = parse_json(text) if path.suffix.lower() == ".json" else parse_toml(text)
    except ParseError as error:
        raise ConfigError(f"{path}: {error}") from error
    if path.suffix.lower() == ".json":
        if not isinstance(content, list):
            raise ConfigError(f"{path}: expected a list of prompts")
        return content
    section = content.get("prompt")
    subsets = section.pop("subset", None) if isinstance(section, dict) else None
    if not isinstance(section, dict) or not isinstance(subsets, list):
        raise ConfigError(f"{path}: expected a [prompt] section with [[prompt.subset]] entries")
    return [{**section, **subset} if isinstance(subset, dict) else subset for subset in subsets]
