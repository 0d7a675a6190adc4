"""Options of the form `name=value name=value`, with values as Python writes them."""

from __future__ import annotations

import ast
import math
from collections.abc import Sequence
from typing import Any

from modules.errors import ConfigError


def parse_keyword_args(words: Sequence[str], flag: str, *, allow_plain_text: bool = False) -> dict[str, Any]:
    """Turn `weight_decay=0.001` and `betas=(0.9,0.95)` into keyword arguments.

    Only the first `=` separates. `betas=0.9,0.95` is a tuple too.

    Args:
        flag: the option that the arguments belong to, for messages.
        allow_plain_text: take a value that is no Python literal as text; otherwise it is an error.
    Raises:
        ConfigError: no `=` or no name, repeated names, values that are no literals; all are listed.
    """
    values: dict[str, Any] = {}
    problems = []
    for word in words:
        name, equals, text = (part.strip() for part in word.partition("="))
        if not equals or not name.isidentifier():
            problems.append(f"{flag}: expected name=value, got {word!r}")
        elif name in values:
            problems.append(f"{flag}: {name} is given twice")
        else:
            try:
                value = ast.literal_eval(text)
            except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
                value = text
                is_known = allow_plain_text
            else:
                is_known = _is_finite(value)
            if text.endswith(",") and isinstance(value, tuple) and len(value) == 1:
                problems.append(f"{flag}: {name} ends with a comma: write {name}={text.rstrip(', ')}")
            elif is_known:
                values[name] = value
            else:
                problems.append(
                    f"{flag}: the value of {name} is no finite Python number, tuple or quoted text: {text!r}"
                )
    if problems:
        raise ConfigError(problems)
    return values


def _is_finite(value: Any) -> bool:
    """Whether no number in it is beyond the range of floats, as 1e999 is."""
    if isinstance(value, (list, tuple)):
        return all(map(_is_finite, value))
    return not isinstance(value, float) or math.isfinite(value)
