"""Runs calls in a child process, so that a crash or a hang fails the call and not the program."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

_LEAVE_SECONDS = 5.0
"""What a process gets to end by itself; one that is killed leaves warnings of Python's resource tracker."""


class CallFailed(Exception):
    """A call ended without a result: by an exception, by the end of its process, or at its time limit."""

    def __init__(self, message: str, details: str = "") -> None:
        super().__init__(message)
        self.details = details
        """The traceback, where there was an exception."""


class ChildProcess:
    """A Python subprocess that serves calls of one function.

    It is spawned, not forked, so that it may use a GPU, and imports what the function needs at once: a child
    that is started before it is needed has its imports behind it.

    Args:
        function: of a module's top level; its arguments and results travel by pickle.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")
        self._connection, theirs = context.Pipe()
        # Not a daemon: the compiler of torch starts processes of its own.
        self._process = context.Process(target=_serve, args=(theirs, function))
        self._process.start()
        theirs.close()

    def call(self, *arguments: Any, timeout: float) -> Any:
        """The function's result.

        Args:
            timeout: in seconds, the rest of the start included.
        Raises:
            CallFailed: there is no result. After a crash or a time limit the process is gone.
        """
        try:
            self._connection.send(arguments)
            if not self._connection.poll(timeout):
                self._process.kill()
                self.close()
                raise CallFailed(f"no result after {timeout:.0f} s")
            is_done, result = self._connection.recv()
        except (EOFError, ConnectionError) as error:
            self._process.join()
            raise CallFailed(f"the process ended with {_exit_words(self.exit_code)}") from error
        if is_done:
            return result
        raise CallFailed(*result)

    @property
    def is_alive(self) -> bool:
        """Whether it can take another call."""
        return self._process.is_alive()

    @property
    def exit_code(self) -> int | None:
        """As Python gives it, negative for a signal; None while it runs."""
        return self._process.exitcode

    def close(self) -> None:
        """End the process: by itself if it waits for a call, else by force."""
        self._connection.close()
        self._process.join(_LEAVE_SECONDS)
        self._process.kill()
        self._process.join()


def _exit_words(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"


def _serve(connection: Connection, function: Callable[..., Any]) -> None:
    """The child's side: until nobody asks any more."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    while True:
        try:
            arguments = connection.recv()
        except EOFError:
            return
        try:
            answer = (True, function(*arguments))
        except Exception as error:  # any: the parent reports it as the result of this call
            first = str(error).strip().partition("\n")[0]
            answer = (False, (f"{type(error).__name__}: {first}", traceback.format_exc()))
        connection.send(answer)
