"""Stop requests: by a signal, or because the launcher of this process has exited."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any, NoReturn

# Windows has no SIGHUP.
_SIGNALS = [number for name in ("SIGINT", "SIGTERM", "SIGHUP") if (number := vars(signal).get(name))]

_LAUNCHER_WORDS = ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID")
"""Environment variables that accelerate 1.15 (with one process too) and torchrun set for what they start."""
_STDERR = 2
_ANSWER = b"\nasked to stop: the step is finished and saved first; asked again, the process ends at once\n"
"""Written without Python's streams, which may be in use when the signal comes."""
_UNDER_LAUNCHER = (
    b"saving; the prompt may return before this finishes, and a traceback is the launcher's own\n"
)


class Interrupted(Exception):
    """Work that can be done later was abandoned because the run received a stop request."""


class StopRequest:
    """Whether and why the run should end after the present step.

    The first signal is remembered, so that the step can be finished and saved; the second ends the process at
    once. `exit_code` is 128 plus the signal's number, as in shells. Make it before anything slow: the
    launcher may end while models load.
    """

    def __init__(self) -> None:
        self.exit_code = 0
        self.is_urgent = False
        """Asked twice."""
        # A shell may end, and what it started with `nohup` or `setsid` goes on; a launcher's end is ours.
        is_launched = any(word in os.environ for word in _LAUNCHER_WORDS)
        self._launcher = os.getppid() if is_launched else None

    def is_set(self) -> bool:
        """Also true when the launcher has exited: `accelerate launch` does not forward signals."""
        if self.exit_code == 0 and self._launcher not in (None, os.getppid()):
            self.exit_code = 128 + signal.SIGTERM
        return self.exit_code != 0

    def take_signal(self, number: int, frame: FrameType | None) -> None:
        """The signal handler."""
        if self.exit_code:
            self.is_urgent = True
            raise SystemExit(128 + number)
        self.exit_code = 128 + number
        with suppress(OSError):  # no console, or one that has gone
            os.write(_STDERR, _ANSWER if self._launcher is None else _ANSWER + _UNDER_LAUNCHER)


@contextmanager
def graceful_stop(request: StopRequest) -> Iterator[None]:
    """Within the block, termination signals are recorded instead of ending the process."""
    with _handled_by(request.take_signal):
        yield


@contextmanager
def exit_on_signal() -> Iterator[None]:
    """Within the block, a termination signal raises SystemExit with the shell's code: nothing to save yet."""

    def leave(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    with _handled_by(leave):
        yield


@contextmanager
def keyboard_interrupts() -> Iterator[None]:
    """Within the block Ctrl+C raises KeyboardInterrupt: it stops a part of the work, not the process."""
    with _handled_by(signal.default_int_handler, [signal.SIGINT]):
        yield


def leave_at_once(code: int) -> NoReturn:
    """Exit without joining the threads of libraries."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


@contextmanager
def _handled_by(
    handler: Callable[[int, FrameType | None], Any], numbers: Sequence[int] = _SIGNALS
) -> Iterator[None]:
    before: dict[int, Any] = {}
    for number in numbers:
        # What is switched off stays off: so `nohup` and shells protect what runs in the background.
        if signal.getsignal(number) is not signal.SIG_IGN:
            before[number] = signal.signal(number, handler)
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
