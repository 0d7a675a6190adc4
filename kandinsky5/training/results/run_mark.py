"""Identifiers of a run in its files and trackers, kept through every stop and resume."""

from __future__ import annotations

import time
import uuid
from dataclasses import dataclass

from accelerate.utils import broadcast_object_list

from kandinsky5.training.results.state import TrainingState


def shared_session(resumed: str | None) -> str:
    """Names the run in its files, the same on all processes and after every resume."""
    return resumed or broadcast_object_list([uuid.uuid4().hex])[0]


@dataclass(frozen=True, slots=True)
class RunMark:
    """Identifiers of a run, kept through every stop and resume."""

    session_id: str
    started_at: float
    """Seconds since 1970."""
    tracker_run: str
    """Name of its folder of TensorBoard curves."""
    branch: int
    """See `TrainingState`."""


def mark_run(log_prefix: str, resumed: TrainingState | None, branch: int) -> RunMark:
    """The mark of a resumed run, or a new one, the same on all processes but for the branch."""
    started_at = resumed.started_at if resumed else time.time()
    stamp = time.strftime("%Y%m%d%H%M%S", time.localtime(started_at))
    session_id = shared_session(resumed.session_id if resumed else None)
    tracker_run = (resumed.tracker_run if resumed else "") or f"{log_prefix}{stamp}"
    return RunMark(session_id, started_at, tracker_run, branch)
