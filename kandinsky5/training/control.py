"""Requests to a running training: signals, and a command in `<output_name>.control` where they fail."""

from __future__ import annotations

import torch
from accelerate import Accelerator

from kandinsky5.training.results.names import ResultNames
from modules.interruption import StopRequest
from modules.logs import get_logger

log = get_logger(__name__)

CONTROL_WORDS = ("save", "sample", "stop")
_STOP_WORD_CODE = 1
"""Stop code of the word `stop`; signals have 128 + n."""


class TrainingControl:
    """Requests to stop, save and sample, on which all processes of a run agree.

    A stop code is 128 + n for a signal, 1 for the word `stop`, and 0 to go on.
    """

    def __init__(
        self, stop: StopRequest, names: ResultNames, accelerator: Accelerator, *, makes_samples: bool
    ) -> None:
        self._stop, self._names, self._accelerator = stop, names, accelerator
        self._makes_samples = makes_samples
        self._has_stop_word = False

    def take_word(self) -> str:
        """Read and delete the control file; "" without a command, and on all but the main process."""
        word = take_control_word(self._names) if self._accelerator.is_main_process else ""
        if word == "sample" and not self._makes_samples:
            log.info("%s: sample has no effect: add --sample_prompts", self._names.control.name)
        self._has_stop_word |= word == "stop"
        return word

    def stop_code(self) -> int:
        """The stop code of this process."""
        if self._stop.is_set():
            return self._stop.exit_code
        if self._accelerator.is_main_process and is_stop_written(self._names):
            self._has_stop_word = take_control_word(self._names) == "stop"
        return _STOP_WORD_CODE if self._has_stop_word else 0

    def is_stopping(self) -> bool:
        """Whether this process has received a stop request."""
        return self.stop_code() != 0

    def agree(self, stop_code: int) -> int:
        """The largest stop code of all processes; waits for all of them."""
        if self._accelerator.num_processes == 1:
            return stop_code
        shared = torch.tensor([stop_code], device=self._accelerator.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared)

    def exit_with(self, stop_code: int) -> None:
        """Exit with the signal's code, which another process may have received."""
        if stop_code not in (0, _STOP_WORD_CODE):
            self._stop.exit_code = stop_code


def remove_old_word(names: ResultNames) -> None:
    """Remove a command from before this run started."""
    try:
        names.control.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is older than this run and cannot be removed: %s", names.control, error)
        return
    log.info("%s: older than this run, removed", names.control.name)


def take_control_word(names: ResultNames) -> str:
    """Read the command in the control file and delete the file; "" without one."""
    try:
        word = _read(names)
        names.control.unlink()
    except FileNotFoundError:
        return ""
    except (OSError, UnicodeDecodeError) as error:
        log.warning("%s cannot be used: %s", names.control, error)
        return ""
    if word not in CONTROL_WORDS:
        log.warning("%s: %r is none of %s", names.control.name, word, ", ".join(CONTROL_WORDS))
        return ""
    log.info("%s: %s", names.control.name, word)
    return word


def is_stop_written(names: ResultNames) -> bool:
    """Whether the command is `stop`; the file stays, so other commands are read after the next step."""
    try:
        return _read(names) == "stop"
    except (OSError, UnicodeDecodeError):  # no such file, or reported when the word is taken
        return False


def _read(names: ResultNames) -> str:
    return names.control.read_text(encoding="utf-8").strip().lower()
