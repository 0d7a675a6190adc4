"""Options from a TOML file, turned into the words they would be on the command line, and the way back."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from modules.errors import ConfigError

FLAG = "--config_file"


def with_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the options of the `--config_file` in `argv` before the others, so that the command line wins.

    Sections of the file are flattened, their names do not matter. The extension `.toml` may be left out.

    Raises:
        ConfigError: the file is missing or no TOML, or has unknown options or values of the wrong kind; all
            problems are listed.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(FLAG)
    try:
        name = finder.parse_known_args(list(argv))[0].config_file
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if name is None:
        return list(argv)
    path = Path(name)
    if not path.is_file() and path.suffix != ".toml":
        path = path.with_name(path.name + ".toml")
    return [*option_words(parser, path), *argv]


def option_words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's options as command-line words.

    Raises:
        ConfigError: see `with_config_file`.
    """
    values = _flatten(read_toml(path, FLAG))
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    words: list[str] = []
    problems = []
    for key, value in values:
        action = actions.get(key)
        if action is None or key in ("help", "config_file"):
            nearest = difflib.get_close_matches(key, actions, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            problems.append(f"{path}: unknown option {key}{hint}")
            continue
        try:
            words += _words(key, value, action)
        except ConfigError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
    if problems:
        raise ConfigError(problems)
    return words


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """The tables of a TOML file that an option names.

    Raises:
        ConfigError: it is missing, or cannot be read or parsed.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise ConfigError(f"{flag} {path}: no such file") from error
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error}") from error


def _flatten(table: Mapping[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for key, value in table.items():
        pairs += _flatten(value) if isinstance(value, dict) else [(key, value)]
    return pairs


def _words(key: str, value: Any, action: argparse.Action) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is a switch: expected true or false, got {value!r}")
        return [f"--{key}"] if value else []
    if isinstance(value, bool):
        raise ConfigError(f"{key} needs a value, not {str(value).lower()}")
    if isinstance(value, list):
        if action.nargs is None:
            raise ConfigError(f"{key} takes one value, not a list")
        return [f"--{key}", *(str(item) for item in value)]
    # The form with = keeps values that start with a dash from being read as options.
    return [f"--{key}={value}"]


def file_values(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *,
    places: Collection[str],
    places_or_ids: Collection[str],
) -> dict[str, Any]:
    """What a configuration file would hold to give these options again: `option_words` reversed.

    Args:
        places: options that name files or folders although their type is text.
        places_or_ids: the same, or a model id of the Hub such as `owner/name`, which stays text.
    Returns:
        Option name -> bool, number, text, list of them, or `Path` for every file and folder. Options that are
        not given and have no default are left out.
    """
    values: dict[str, Any] = {}
    for action in parser._actions:
        value = vars(args).get(action.dest)
        if value is None or action.dest == argparse.SUPPRESS:
            continue
        name = max(action.option_strings, key=len).removeprefix("--")
        if action.nargs == 0:
            # A pair of switches may write into one name: only the one that was chosen is true.
            values[name] = value == action.const
        elif name in places or (name in places_or_ids and not _is_hub_id(str(value))):
            values[name] = Path(value)
        elif isinstance(value, tuple):  # a type of ours that reads "a,b"
            values[name] = ",".join(map(str, value))
        else:
            values[name] = value
    return dict(sorted(values.items()))


def _is_hub_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    return bool(owner.strip(".~") and name) and not set(name) & set("/\\") and not Path(text).exists()
