"""The word a user may leave for a run in `<output_name>.control`: it works where signals do not."""

from __future__ import annotations

from kandinsky5.training.results.names import OutputNames
from modules.logs import get_logger

log = get_logger(__name__)

CONTROL_WORDS = ("save", "sample", "stop")


def remove_old_word(names: OutputNames) -> None:
    """Remove what was written before this run began: it was meant for another."""
    try:
        names.control.unlink()
    except FileNotFoundError:
        return
    except OSError as error:
        log.warning("%s is older than this run and cannot be removed: %s", names.control, error)
        return
    log.info("%s: older than this run, removed", names.control.name)


def take_control_word(names: OutputNames) -> str:
    """The word in the run's control file, which is then deleted; "" if there is none."""
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


def is_stop_written(names: OutputNames) -> bool:
    """Whether the word is `stop`; nothing is taken, so other words wait for the end of the next step."""
    try:
        return _read(names) == "stop"
    except (OSError, UnicodeDecodeError):  # absent, or said when it is taken
        return False


def _read(names: OutputNames) -> str:
    return names.control.read_text(encoding="utf-8").strip().lower()
