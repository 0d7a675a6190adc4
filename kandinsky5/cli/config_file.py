"""Converts options of a TOML file to command-line arguments, and back."""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from modules.errors import ConfigError
from modules.options import as_word
from modules.parsing import ParseError, parse_toml
from modules.path_kinds import file_problem, path_kind

FLAG = "--config_file"


def with_config_file(parser: argparse.ArgumentParser, argv: Sequence[str]) -> list[str]:
    """Put the options of the `--config_file` in `argv` before the others, so that the command line wins.

    Sections of the file are flattened; their names do not matter. The extension `.toml` may be omitted.

    Raises:
        ConfigError: the file is missing or not valid TOML, has unknown options or values of the wrong type,
            or sets an option twice; all problems are listed.
    """
    path = _named_file(argv)
    return list(argv) if path is None else [*file_argv(parser, path), *argv]


def asks_for_traceback(argv: Sequence[str]) -> bool:
    """Whether `--traceback` is in `argv`, or true in the `--config_file` that it names."""
    if "--traceback" in argv:
        return True
    try:
        path = _named_file(argv)
        options = [] if path is None else _flatten(read_toml(path, FLAG))
    except ConfigError:  # reported by `with_config_file`
        return False
    return any(option.name == "traceback" and option.value is True for option in options)


def _named_file(argv: Sequence[str]) -> Path | None:
    """The path that `--config_file` names, with the extension added if it was omitted.

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
    is_whole = path.suffix == ".toml" or path_kind(path).kind == "file"
    return path if is_whole else path.with_name(path.name + ".toml")


def file_argv(parser: argparse.ArgumentParser, path: Path) -> list[str]:
    """The file's options as command-line arguments.

    Raises:
        ConfigError: see `with_config_file`.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    argv: list[str] = []
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
            own = _typed(option.name, option.value, action, _partner(parser, action))
        except ConfigError as error:
            problems += [f"{path}: {problem}" for problem in error.problems]
            continue
        first, first_argv = seen.setdefault(action.dest, (option, own))
        is_repeated = first is not option and first.name == option.name
        if is_repeated or (own and first_argv and first_argv != own):
            problems.append(
                f"{path}: {first.where} and {option.where} set the same option: delete one of them"
            )
        argv += own
    if problems:
        raise ConfigError(problems)
    return argv


def _partner(parser: argparse.ArgumentParser, action: argparse.Action) -> str | None:
    """The name of the switch with the opposite meaning."""
    opposites = [
        other.option_strings[0]
        for other in parser._actions
        if other.nargs == 0 and other.dest == action.dest and other.const != action.const
    ]
    return opposites[0] if action.nargs == 0 and opposites else None


def read_toml(path: Path, flag: str) -> dict[str, Any]:
    """Read the tables of the TOML file that an option names.

    Raises:
        ConfigError: the file is missing, or cannot be read or parsed.
    """
    problem = file_problem(path)
    if problem is not None:
        raise ConfigError(f"{flag} {path}: {problem}")
    try:
        return parse_toml(path.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, ParseError) as error:
        raise ConfigError(f"{flag} {path}: cannot be read: {error}") from error


@dataclass(frozen=True, slots=True)
class _FileOption:
    name: str
    value: Any
    section: str
    """Dotted name of its table; "" at the top level."""

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


def _typed(key: str, value: Any, action: argparse.Action, opposite: str | None) -> list[str]:
    """An entry of the file as command-line arguments; empty for an empty string, which means "not given"."""
    if value == "":
        return []
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ConfigError(f"{key} is a switch: expected true or false, got {value!r}")
        if value:
            return [action.option_strings[0]]
        return [] if opposite is None else [opposite]
    if isinstance(value, bool):
        raise ConfigError(f"{key} needs a value, not {str(value).lower()}")
    items = value if isinstance(value, list) else [value]
    if any("\0" in str(item) for item in items):
        raise ConfigError(f"{key}: contains a NUL character")
    is_text = action.type in (None, Path)
    texts = [str(item) if is_text else as_word(item) for item in items]
    if isinstance(value, list):
        if action.nargs is None:
            raise ConfigError(f"{key} takes one value, not a list")
        return [f"--{key}", *texts]
    # The form with = keeps values that start with a dash from being read as options.
    return [f"--{key}={texts[0]}"]


def file_values(
    parser: argparse.ArgumentParser,
    args: argparse.Namespace,
    *,
    places: Collection[str] = (),
    places_or_ids: Collection[str] = (),
) -> dict[str, Any]:
    """The entries of a configuration file that sets these options: the inverse of `file_argv`.

    Args:
        places: options that name files or folders although their type is str.
        places_or_ids: the same, or a hub model id such as `owner/name`, which stays a str.
    Returns:
        Option name -> bool, number, str, list of these, or `Path` for every file and folder. Options without
        value are omitted, and so are spellings that the help does not list.
    """
    values: dict[str, Any] = {}
    for action in parser._actions:
        name, value = action.dest, vars(args).get(action.dest)
        if value is None or argparse.SUPPRESS in (action.dest, action.help):
            continue
        if name in places or (name in places_or_ids and not _is_hub_id(str(value))):
            values[name] = Path(value)
        elif isinstance(value, tuple):  # a reader of ours that takes "a,b"
            values[name] = ",".join(map(str, value))
        else:
            values[name] = value
    return dict(sorted(values.items()))


def argv_of(parser: argparse.ArgumentParser, values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that set options to these values.

    Args:
        values: as `file_values` returns them; values equal to the defaults are omitted.
    """
    actions = {}
    for action in parser._actions:
        actions.setdefault(action.dest, action)
    argv: list[str] = []
    for name, value in values.items():
        action = actions[name]
        if value == action.default or value is None:
            continue
        if value == "":  # `_typed` takes it for an option that is not given
            argv.append(f"--{name}=")
            continue
        argv += _typed(name, value, action, _partner(parser, action))
    return argv


def _is_hub_id(text: str) -> bool:
    owner, _, name = text.partition("/")
    return bool(owner.strip(".~") and name) and not set(name) & set("/\\") and not Path(text).exists()
