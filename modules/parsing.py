"""Parses JSON and TOML that others wrote: whatever is in them, the result is a value or one kind of error.

Python's parsers also raise RecursionError, and refuse numbers of over 4300 digits with a message about an
interpreter setting; TOML's hexadecimal numbers have no limit at all, until somebody prints one.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from typing import Any

_MAX_DIGITS = 20
"""Of a whole number: more than any setting, seed or size has."""


class ParseError(ValueError):
    """A text that is no JSON or TOML, or holds a number that nothing has."""


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ParseError: with line and column where they are known.
    """
    try:
        return json.loads(text, parse_int=_whole_number)
    except json.JSONDecodeError as error:
        raise ParseError(f"line {error.lineno}, column {error.colno}: {error.msg}") from error
    except UnicodeDecodeError as error:
        raise ParseError(f"is not UTF-8 at byte {error.start}") from error
    except RecursionError as error:
        raise ParseError("is nested too deeply") from error


def parse_toml(text: str) -> dict[str, Any]:
    """The tables of a TOML text; its line ends may be those of Windows.

    Raises:
        ParseError: with line and column where they are known.
    """
    try:
        value = tomllib.loads(text.replace("\r\n", "\n"))
        _check_numbers(value)
    except tomllib.TOMLDecodeError as error:
        raise ParseError(f"{error}{_backslash_hint(text, error)}") from error  # "... (at line 3, column 5)"
    except RecursionError as error:
        raise ParseError("is nested too deeply") from error
    except ParseError:
        raise
    except ValueError as error:  # of int(), before anything is known of the place
        raise ParseError(f"holds a number of more than {_MAX_DIGITS} digits") from error
    return value


def _backslash_hint(text: str, error: tomllib.TOMLDecodeError) -> str:
    """What to type where a path of Windows stands in double quotes, whose backslashes are escapes."""
    place = re.search(r"at line (\d+)", str(error))
    line = text.splitlines()[int(place[1]) - 1] if place else ""
    if '"' not in line or "\\" not in line:
        return ""
    return "; write paths of Windows with / or in single quotes: 'C:\\clips'"


def whole_number(text: str) -> int | None:
    """A text of ASCII digits as a number; None for anything else, of over 18 digits too."""
    is_number = text.isascii() and text.isdigit() and len(text) < 19
    return int(text) if is_number else None


def _whole_number(word: str) -> int:
    if len(word) > _MAX_DIGITS:
        raise ParseError(f"holds a number of {len(word)} digits: {word[:10]}...")
    return int(word)


def _check_numbers(value: object) -> None:
    if isinstance(value, int) and abs(value) >= 10**_MAX_DIGITS:
        raise ParseError(f"holds a number of more than {_MAX_DIGITS} digits")
    if isinstance(value, Mapping):
        for item in value.values():
            _check_numbers(item)
    elif isinstance(value, list):
        for item in value:
            _check_numbers(item)
