"""Saves the options of a run as a TOML file for `--config_file`, without folders and keys."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kandinsky5.configs.train import TrainConfig
from modules.files import last_part, write_text
from modules.parsing import parse_toml

_HEAD = """\
# The options of a run, defaults included; --config_file reads this file.
# Files and folders stand here by their own name only, as comments: give them on the command line.
"""
_PLACE = re.compile(r"^# ([A-Za-z0-9_]+ = )")
"""The beginning of a file or folder."""


def write_config(path: Path, config: TrainConfig, resolved: Mapping[str, Any]) -> None:
    """Write the options of a run.

    Args:
        resolved: values that were decided at the start of the run (seed, precision), by option name; they
            take the place of what was given.
    """
    values = {**config.options, **resolved}
    lines = [_line(name, values[name]) for name in sorted(values)]
    write_text(path, _HEAD + "\n".join(lines) + "\n")


def read_config(path: Path) -> dict[str, Any]:
    """The options that `write_config` wrote, files and folders by their own names.

    Raises:
        OSError, UnicodeDecodeError, ParseError: it cannot be read.
    """
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    return parse_toml("\n".join(_PLACE.sub(r"\1", line) for line in lines))


def shareable_options(config: TrainConfig) -> dict[str, Any]:
    """The options without folders: of files and folders only their own names, as text."""
    return {name: _share(value) for name, value in config.options.items()}


def _share(value: Any) -> Any:
    if isinstance(value, Path):
        return last_part(value)
    return [_share(item) for item in value] if isinstance(value, list) else value


def _line(name: str, value: Any) -> str:
    items = value if isinstance(value, list) else [value]
    is_place = any(isinstance(item, Path) for item in items)
    return f"{'# ' if is_place else ''}{name} = {toml_value(_share(value))}"


def toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(toml_value, value))}]"
    if isinstance(value, str):
        # JSON's escapes are TOML's; TOML wants the delete character escaped too, and no half of a pair.
        whole = value.encode("utf-8", "replace").decode("utf-8")
        return json.dumps(whole, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower() if isinstance(value, bool) else repr(value)
