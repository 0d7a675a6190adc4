"""Output on a console: reports, log lines and progress bars."""

from __future__ import annotations

import io
import logging
import subprocess
import sys
from pathlib import Path

import pytest
from tqdm import tqdm

from modules.logs import BarAwareHandler
from modules.messages import duration_text


def test_a_reader_that_has_enough_ends_the_command_quietly(root: Path) -> None:
    code = "import sys; from modules.logs import print_report; sys.stdin.read(); print_report('x\\n' * 99999)"
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=root,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")


def test_a_log_line_stands_alone_above_the_bar(monkeypatch: pytest.MonkeyPatch) -> None:
    console = io.StringIO()
    monkeypatch.setattr(sys, "stderr", console)
    record = logging.LogRecord("k5", logging.INFO, "", 0, "saved a.safetensors", None, None)
    with tqdm(total=2, desc="steps", file=console, mininterval=0) as bar:
        bar.update()
        BarAwareHandler(console).emit(record)
        bar.update()
    lines = [line.rpartition("\r")[2] for line in console.getvalue().split("\n")]
    assert "saved a.safetensors" in lines
    assert lines[-2].startswith("steps: 100%")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(59.6, "60 s"), (100, "2 min"), (5399, "90 min"), (5400, "1.5 h"), (86400, "24.0 h")],
)
def test_lengths_of_time_have_a_fitting_unit(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text
