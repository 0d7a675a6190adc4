"""The parser, an option type and the error handling of every command."""

from __future__ import annotations

import argparse
import difflib
import os
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from modules.byte_sizes import size_text
from modules.errors import ConfigError, ResourceError, UserError
from modules.file_names import name_problem
from modules.files import check_folder_unwritten
from modules.host_memory import available_memory, total_memory
from modules.logs import setup_logging
from modules.memory_errors import asked_size, memory_error_behind
from modules.messages import visible
from modules.options import file_path


class Parser(argparse.ArgumentParser):
    """argparse without abbreviations, so that a mistyped option is an error and not another option."""

    def __init__(self, prog: str, description: str) -> None:
        super().__init__(
            prog=prog,
            description=description,
            allow_abbrev=False,
            formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=32, width=110),
        )
        self.register("type", Path, file_path)
        self.add_argument(
            "--traceback", action="store_true", help="show the Python traceback of errors in the input too"
        )

    def error(self, message: str) -> NoReturn:
        """Report the error in argv, suggest the closest options, and exit."""
        known = [option for action in self._actions for option in action.option_strings]
        unknown = message.split() if message.startswith("unrecognized arguments") else []
        for word in unknown:
            name = word.partition("=")[0]
            nearest = difflib.get_close_matches(name, known, n=1) if name.startswith("--") else []
            if nearest:
                message += f"; did you mean {nearest[0]}?"
        code = ConfigError.exit_code
        text = f"error: {visible(message)}\n{self.prog} --help lists the options\nexit code {code}"
        print(text, file=sys.stderr)
        raise SystemExit(code)


def _has_traceback_word(argv: Sequence[str]) -> bool:
    return "--traceback" in argv


@contextmanager
def user_errors(
    argv: Sequence[str] | None,
    asks_for_traceback: Callable[[Sequence[str]], bool] = _has_traceback_word,
    *,
    saves_host_memory: Sequence[str] = (),
) -> Iterator[None]:
    """Around the body of a script's main: print a `UserError` and end with its exit code.

    A lack of host memory, whatever raised it, is a `ResourceError` here.

    Args:
        asks_for_traceback: decides from argv whether to print the traceback too.
        saves_host_memory: options of the script that help, each with its effect.
    """
    setup_logging()
    arguments = sys.argv[1:] if argv is None else argv
    try:
        yield
    except BaseException as error:  # a panic of Rust code is no Exception
        shown = _shown_error(error, saves_host_memory)
        if shown is None:
            raise
        if asks_for_traceback(arguments):
            print(visible(traceback.format_exc()), file=sys.stderr, end="")
        lines = "\n".join(shown.problems)
        print(f"error: {visible(lines)}\nexit code {shown.exit_code}", file=sys.stderr)
        raise SystemExit(shown.exit_code) from None


def _shown_error(error: BaseException, saves_host_memory: Sequence[str]) -> UserError | None:
    """What the user reads; None for a bug."""
    if isinstance(error, ResourceError):
        return error
    shortage = memory_error_behind(error)
    if shortage is not None:
        return ResourceError(host_memory_message(shortage, saves_host_memory))
    return error if isinstance(error, UserError) else None


def host_memory_message(error: BaseException, helping: Sequence[str]) -> str:
    """Message for a failed allocation of host memory or of a thread."""
    first_line = (str(error) or type(error).__name__).splitlines()[0]
    lines = [f"out of host memory (RAM, not the GPU's memory): {first_line}"]
    size, total = asked_size(error), total_memory()
    if isinstance(size, int):
        size = size_text(size)
    found = [f"asked for: {size}"] if size else []
    if total:
        found.append(f"available now: {size_text(available_memory())} of {size_text(total)}")
    if found:
        lines.append("; ".join(found))
    lines += ["What helps:", *(f"  {words}" for words in helping)]
    lines.append(
        "  closing other programs, more swap (on Windows a larger paging file), in a container a higher limit"
    )
    return "\n".join(lines)


def check_output(path: Path, *, overwrite: bool | None, inputs: Sequence[Path] = ()) -> None:
    """Check the name of an output file of tensors: writable, readable again, not an input by mistake.

    Args:
        overwrite: whether an existing file may be replaced; None where there is no option for that.
    Raises:
        ConfigError: `path` is one of the inputs or a folder, exists without `overwrite`, or has an ending by
            which nothing would read it.
        ResourceError: its folder cannot be made or written, as far as this can be checked without writing.
    """
    problem = name_problem(path.name, room=len("_config_lora.json"))
    if problem:
        raise ConfigError(f"{path}: the name {problem}")
    if path.is_dir():
        raise ConfigError(f"{path}: is a folder; give the name of a file")
    if any(os.path.realpath(path) == os.path.realpath(source) for source in inputs):
        raise ConfigError(f"{path}: is an input as well; choose another name for the output")
    if path.exists() and not overwrite:
        other_way = "" if overwrite is None else ", or give --overwrite"
        raise ConfigError(f"{path}: exists already; choose another name{other_way}")
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: the name must end in .safetensors")
    check_folder_unwritten(path.parent, "the output folder")
