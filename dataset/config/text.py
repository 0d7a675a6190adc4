"""Parses TOML and JSON dataset files, and records the line of each key."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from modules.errors import ConfigError
from modules.parsing import ParseError, parse_json, parse_toml
from modules.path_kinds import file_problem

_TABLE = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]+?)\s*\]\]?")
_KEY = re.compile(r"\s*[\"']?(?P<key>[\w-]+)[\"']?\s*=")


@dataclass(frozen=True, kw_only=True, slots=True)
class ConfigText:
    """A parsed dataset file."""

    path: Path
    value: dict[str, Any]
    lines: dict[tuple[int | None, str | None], int] = field(default_factory=dict)
    """(dataset number or None for [general], key or None for the table itself) -> line, from 1."""
    table_lines: dict[str, int] = field(default_factory=dict)
    """Name of a table -> line of its first heading."""

    def line_of(self, index: int | None, key: str | None) -> int | None:
        """The line of a key, else of its table; None where it is not known (JSON, inline tables)."""
        return self.lines.get((index, key)) or self.lines.get((index, None))


def read_config_text(path: Path) -> ConfigText:
    """Read and parse a dataset file.

    Raises:
        ConfigError: it is missing, has another extension, is not UTF-8 or has a syntax error (with its line).
    """
    extension = path.suffix.lower()
    if extension not in {".toml", ".json"}:
        raise ConfigError(f"--dataset_config {path}: must be a .toml or a .json file")
    problem = file_problem(path)
    if problem is not None:
        raise ConfigError(f"--dataset_config {path}: {problem}")
    try:
        text = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}") from error
    value = _parse(path, text, is_toml=extension == ".toml")
    if not isinstance(value, dict):
        raise ConfigError(f"{path}: must hold an object with the key datasets")
    if extension != ".toml":
        return ConfigText(path=path, value=value)
    return ConfigText(path=path, value=value, lines=_key_lines(text), table_lines=_table_lines(text))


def _parse(path: Path, text: str, *, is_toml: bool) -> Any:
    try:
        return parse_toml(text) if is_toml else parse_json(text)
    except ParseError as error:
        raise ConfigError(f"{path}: {error}") from error


def _table_lines(text: str) -> dict[str, int]:
    lines: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        if table := _TABLE.match(line):
            lines.setdefault(table["name"], number)
    return lines


def _key_lines(text: str) -> dict[tuple[int | None, str | None], int]:
    lines: dict[tuple[int | None, str | None], int] = {}
    index: int | None = None
    count = 0
    for number, line in enumerate(text.splitlines(), start=1):
        if table := _TABLE.match(line):
            if table["name"] == "datasets":
                index, count = count, count + 1
            elif table["name"] == "general":
                index = None
            lines.setdefault((index, None), number)
        elif key := _KEY.match(line):
            lines.setdefault((index, key["key"]), number)
    return lines
