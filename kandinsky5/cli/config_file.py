"""Options from a TOML file, turned into the words they would be on the command line, and the way back."""

from __future__ import annotations

import argparse
import difflib
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import ConfigError

FLAG = "--config_file"


def with_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the options of the `--config_file` in `argv` before the others, so that the command line wins.

    Sections of the file are flattened, their names do not matter. The extension `.toml` may be left out.

    Raises:
        ConfigError: the file is missing or no TOML, has unknown options or values of the wrong kind, or says
            one option in two places; all problems are listed.
    """
    path = _named_file(argv)
    return list(argv) if path is None else [*option_words(parser, path), *argv]


def asks_for_traceback(argv: Sequence[str]) -> bool:
    """Whether `--traceback` is among the words, or true in the `--config_file` they name."""
    if "--traceback" in argv:
        return True
    try:
        path = _named_file(argv)
        options = [] if path is None else _flatten(read_toml(path, FLAG))
    except ConfigError:  # it is what there is to tell
        return False
    return any(option.name == "traceback" and option.value is True for option in options)


def _named_file(argv: Sequence[str]) -> Path | None:
    """The file that `--config_file` names, with the extension it may leave out.

    Raises:
        ConfigError: the option has no value.
    """
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    finder.add_argument(FLAG)
    try:
        name = finder.parse_known_args(list(argv))[0].config_file
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    if name is None:
        return None
    path = Path(name)
    return path if path.is_file() or path.suffix == ".toml" else path.with_name(path.name + ".toml")


def option_words(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's options as command-line words.

    Raises:
        ConfigError: see `with_config_file`.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    words: list[str] = []
    problems = []
    seen: dict[str, tuple[_FileOption, list[str]]] = {}
    for option in _flatten(read_toml(path, FLAG)):
        action = actions.get(option.name)
        if action is None or option.name in ("help", "config_file"):
            nearest = difflib.get_close_matches(option.name, actions, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            problems.append(f"{path}: unknown option {option.name}{hint}")
            continue
        try:
            own = _words(option.name, option.value, action, _partner(parser, action))
        except ConfigError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
            continue
        first, first_words = seen.setdefault(action.dest, (option, own))
        if first is not option and (first.name == option.name or first_words != own):
            problems.append(f"{path}: {first.where} and {option.where} give one option twice: leave one out")
        words += own
    if problems:
        raise ConfigError(problems)
    return words


def _partner(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """The switch that says the opposite of this one."""
    opposites = [
        other.option_strings[0]
        for other in parser._actions
        if other is not action and other.nargs == 0 and other.dest == action.dest
    ]
    return opposites[0] if action.nargs == 0 and opposites else None


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


@dataclass(frozen=True, slots=True)
class _FileOption:
    name: str
    value: Any
    section: str
    """Dotted name of the table it stands in; "" outside all."""

    @property
    def where(self) -> str:
        return f"{self.name} under [{self.section}]" if self.section else self.name


def _flatten(table: Mapping[str, Any], section: str = "") -> list[_FileOption]:
    options = []
    for key, value in table.items():
        if isinstance(value, dict):
            options += _flatten(value, f"{section}.{key}" if section else key)
        else:
            options.append(_FileOption(key, value, section))
    return options


def _words(key: str, value: Any, action: argparse.Action, opposite: str | None) -> list[str]:
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is a switch: expected true or false, got {value!r}")
        if value:
            return [action.option_strings[0]]
        return [] if opposite is None else [opposite]
    if isinstance(value, bool):
        raise ConfigError(f"{key} needs a value, not {str(value).lower()}")
    if any("\0" in str(item) for item in (value if isinstance(value, list) else [value])):
        raise ConfigError(f"{key}: holds a NUL character")
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
