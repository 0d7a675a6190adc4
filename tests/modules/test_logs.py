"""What the scripts print may be read in part."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path


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
