"""Output of the scripts: logging on any console encoding, and tables."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from modules.messages import visible

_LOG = logging.getLogger("k5")

_NOISY = "bitsandbytes.backends.cpu.ops"
"""On some CPUs it warns when imported that a faster 4-bit product could be had from the network."""


class BarAwareHandler(logging.StreamHandler[TextIO]):
    """Writes lines above progress bars, which are drawn again below them."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm  # imported late: --help needs the standard library alone

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


def setup_logging() -> None:
    """Send log lines to standard error; a console that lacks a character shows its escape, never an error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    if not _LOG.handlers:
        handler = BarAwareHandler()
        handler.setFormatter(_VisibleFormatter("%(asctime)s %(levelname)s %(message)s", "%H:%M:%S"))
        _LOG.addHandler(handler)
        _LOG.propagate = False
    _LOG.setLevel(logging.INFO)
    logging.getLogger(_NOISY).setLevel(logging.ERROR)


class _VisibleFormatter(logging.Formatter):
    """Names of files and captions in a message cannot steer the terminal."""

    def format(self, record: logging.LogRecord) -> str:
        return visible(super().format(record))


@contextmanager
def only_warnings(is_quiet: bool) -> Iterator[None]:
    """Within the block, if `is_quiet`, log nothing but warnings."""
    before = _LOG.level
    if is_quiet:
        _LOG.setLevel(logging.WARNING)
    try:
        yield
    finally:
        _LOG.setLevel(before)


@contextmanager
def quiet_logging() -> Iterator[None]:
    """Within the block nothing is logged: the work is repeated later and logged then."""
    before = _LOG.level
    _LOG.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        _LOG.setLevel(before)


def get_logger(name: str) -> logging.Logger:
    """The logger of one of our modules: `log = get_logger(__name__)`."""
    return _LOG.getChild(name)


def print_report(text: str) -> None:
    """Print to standard output; a closed pipe, as with `head`, ends the command without an error."""
    try:
        print(visible(text), flush=True)
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EINVAL):  # the second is how Windows says it
            raise
        # The interpreter flushes the rest when it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(0) from None


def format_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text columns: numbers to the right, everything else to the left."""
    cells = [[str(value) for value in row] for row in rows]
    widths = [max(len(line[i]) for line in [list(headers), *cells]) for i in range(len(headers))]
    is_number = [all(isinstance(row[i], (int, float)) for row in rows) for i in range(len(headers))]

    def line(values: Sequence[str]) -> str:
        parts = (v.rjust(w) if n else v.ljust(w) for v, w, n in zip(values, widths, is_number, strict=True))
        return "  ".join(parts).rstrip()

    rule = "  ".join("-" * width for width in widths)
    return "\n".join([line(headers), rule, *(line(row) for row in cells)])
