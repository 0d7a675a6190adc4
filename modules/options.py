"""Options declared once: a field of a settings dataclass is the option, its default, range and help text.

    class NetworkConfig:
        network_dim: int = option(4, "rank (default: 4; 32 is usual)", positive_int)

`add_options` makes the arguments of a parser from such fields, `read_options` fills the fields.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from modules.path_kinds import name_length_problem

_Value = TypeVar("_Value")
_Settings = TypeVar("_Settings")
Reader = Callable[[str], Any]
"""Word of the command line -> value; raises `argparse.ArgumentTypeError` with what is possible."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Option:
    """One option of a command line."""

    help: str
    default: Any = None
    """The value where the option is not given; False makes it a switch."""
    read: Reader | None = None
    """None: text."""
    choices: Sequence[str] | None = None
    """None: those of the field's type where that is a `Literal`."""
    nargs: str | int | None = None
    metavar: str | tuple[str, ...] | None = None
    group: str | None = None
    """Heading in the help; None: that of the other fields."""
    name: str | None = None
    """Where it is not that of the field, which then holds what the option was made into."""
    other_names: tuple[str, ...] = ()
    hidden_names: tuple[str, ...] = ()
    """Spellings of sibling scripts, which the help does not list."""
    opposite: tuple[str, str] | None = None
    """Name and help of the switch for False; the default is then None."""
    required: bool = False
    """Reported by `missing_options`, together with other problems."""
    is_ignored: bool = False
    """Accepted without any effect; the help gives the reason."""


def option(default: _Value, help: str, read: Reader | None = None, **more: Any) -> _Value:
    """A field that is an option: both have the same name and default.

    Args:
        more: the other fields of `Option`.
    """
    return field(default=default, metadata={"option": Option(help=help, default=default, read=read, **more)})


def ignored_option(why: str, *, default: Any = False, read: Reader | None = None) -> Option:
    """An option that is accepted because command lines for other models have it."""
    return Option(
        help=why, default=default, read=read, is_ignored=True, group="accepted, without effect here"
    )


def option_made_into(declared: Option, **of_field: Any) -> Any:
    """A field whose value is made from the option's: a task from its name, a path where none is given.

    Args:
        of_field: arguments of `dataclasses.field`, such as a default; without one the field has none.
    """
    return field(metadata={"option": declared}, **of_field)


def options_of(settings: type) -> dict[str, Option]:
    """The options that a settings dataclass itself declares, by name; `Literal` fields give choices."""
    hints = get_type_hints(settings)
    found = {}
    for item in fields(settings):
        declared = item.metadata.get("option")
        if declared is not None and item.name in settings.__annotations__:
            choices = declared.choices or _literals(hints[item.name])
            found[declared.name or item.name] = replace(declared, choices=choices)
    return found


def _literals(hint: Any) -> tuple[str, ...] | None:
    """The words of `Literal[...]` or `Literal[...] | None`."""
    for part in (hint, *get_args(hint)):
        if get_origin(part) is Literal:
            return get_args(part)
    return None


def add_options(parser: argparse.ArgumentParser, sections: Mapping[str, Mapping[str, Option]]) -> None:
    """Add options to a parser.

    Args:
        sections: heading in the help -> options by name; an option's own `group` wins. "" is no heading.
    """
    groups: dict[str, argparse._ArgumentGroup | argparse.ArgumentParser] = {"": parser}
    for heading, options in sections.items():
        for name, declared in options.items():
            title = heading if declared.group is None else declared.group
            if title not in groups:
                groups[title] = parser.add_argument_group(title)
            _add(groups[title].add_argument, name, declared)


def _add(add: Callable[..., Any], name: str, declared: Option) -> None:
    default = list(declared.default) if isinstance(declared.default, tuple) else declared.default
    settings: dict[str, Any] = {"dest": name, "default": default}
    if declared.opposite is not None:
        settings |= {"action": "store_const", "const": True}
    elif declared.default is False:
        settings["action"] = "store_true"
    else:
        settings |= {"type": declared.read, "choices": declared.choices, "nargs": declared.nargs}
        settings["metavar"] = declared.metavar or _metavar(declared)
    names = [f"--{spelling}" for spelling in (name, *declared.other_names)]
    add(*names, help=f"{declared.help} (required)" if declared.required else declared.help, **settings)
    for hidden in declared.hidden_names:
        add(f"--{hidden}", help=argparse.SUPPRESS, **settings)
    if declared.opposite is not None:
        other, other_help = declared.opposite
        add(f"--{other}", help=other_help, **{**settings, "const": False})


def _metavar(declared: Option) -> str | None:
    if declared.choices is not None:
        return None
    return {None: "TEXT", Path: "PATH", path_text: "PATH"}.get(declared.read, "N")


def missing_options(options: Mapping[str, Option], args: argparse.Namespace) -> list[str]:
    """One line for every required option that was not given."""
    return [
        f"--{name} is required"
        for name, declared in options.items()
        if declared.required and vars(args)[name] is None
    ]


def read_options(settings: type[_Settings], args: argparse.Namespace, **made: Any) -> _Settings:
    """Settings from the parsed options that have their fields' names.

    Args:
        made: values of fields that an option is made into, or that no option gives.
    """
    given = vars(args)
    values = dict(_values(settings, given))
    return settings(**{**values, **made})


def _values(settings: type, given: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for item in fields(settings):  # pyright: ignore[reportArgumentType]
        if item.name in given:
            value = given[item.name]
            yield item.name, tuple(value) if isinstance(value, list) else value


def path_text(word: str) -> str:
    """A reader of texts that name a file or folder, or may: names that no file can have are refused."""
    problem = name_length_problem(Path(word))
    if problem is not None:
        raise argparse.ArgumentTypeError(problem)
    return word


def file_path(word: str) -> Path:
    """A reader of paths; the `Parser` puts it in the place of `Path`."""
    return Path(path_text(word))


def as_word(value: object) -> str:
    """A number of a TOML or JSON file as it would be typed: 32.0 is the whole number 32."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def int_between(low: int, high: int | None = None) -> Callable[[str], int]:
    """A reader of whole numbers within [low, high]."""

    def number(word: str) -> int:
        try:
            value = int(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a whole number, got {_quoted(word)}") from None
        if value < low or (high is not None and value > high):
            possible = f"be at least {low}" if high is None else f"lie within {low} .. {high}"
            raise argparse.ArgumentTypeError(f"must {possible}, got {word[:40]}")
        return value

    return number


def _quoted(word: str) -> str:
    return repr(word if len(word) <= 40 else f"{word[:40]}...")


def float_between(low: float, high: float) -> Callable[[str], float]:
    """A reader of finite numbers within [low, high]."""

    def number(word: str) -> float:
        try:
            value = float(word)
        except ValueError:
            raise argparse.ArgumentTypeError(f"must be a number, got {_quoted(word)}") from None
        if not low <= value <= high:  # false for nan too
            raise argparse.ArgumentTypeError(f"must lie within {low:g} .. {high:g}, got {word}")
        return value

    return number


def off_at_zero(read: Callable[[str], _Value]) -> Callable[[str], _Value | None]:
    """A reader for which 0 is the same as not giving the option."""

    def value(word: str) -> _Value | None:
        try:
            is_off = float(word) == 0
        except ValueError:
            is_off = False
        return None if is_off else read(word)

    return value


positive_int = int_between(1)
non_negative_int = int_between(0)
positive = float_between(1e-12, 1e12)
share = float_between(0.0, 1.0)
any_number = float_between(-1e12, 1e12)
