"""What the four command lines share: the parser, error handling and option types."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from modules.errors import UserError
from modules.logs import setup_logging

DTYPE_CHOICES = ("float32", "fp32", "float", "float16", "fp16", "bfloat16", "bf16")


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, so that a mistyped option is an error and not another option."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        )
        self.add_argument(
            "--traceback", action="store_true", help="show the Python traceback of errors in the input too"
        )


@contextmanager
def user_errors(argv: Sequence[str] | None) -> Iterator[None]:
    """Around the body of a script's main: print a `UserError` and end with its exit code."""
    setup_logging()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        yield
    except UserError as error:
        if "--traceback" in arguments:
            traceback.print_exc()
        lines = "\n".join(error.problems)
        print(f"error: {lines}\nexit code {error.exit_code}", file=sys.stderr)
        raise SystemExit(error.exit_code) from None


def positive_int(word: str) -> int:
    """An option type: a whole number of at least 1."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return value


def non_negative_int(word: str) -> int:
    """An option type: a whole number of at least 0."""
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {word}")
    return value


def float_between(low: float, high: float) -> Callable[[str], float]:
    """An option type: a finite number within [low, high]."""

    def number(word: str) -> float:
        value = float(word)
        if not low <= value <= high:  # false for nan too
            raise argparse.ArgumentTypeError(f"must lie within {low:g} .. {high:g}, got {word}")
        return value

    return number


def existing_file(path: Path, flag: str) -> str | None:
    """A problem line when `path` is not a file, for the list of problems of a `ConfigError`."""
    if path.is_file():
        return None
    return f"{flag} {path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}"
