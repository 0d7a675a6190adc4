"""Stop requests answer at once, without Python's streams."""

from __future__ import annotations

import signal

import pytest

from modules.interruption import StopRequest


@pytest.mark.parametrize("launcher", ["", "ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"])
def test_under_a_launcher_the_answer_says_that_the_prompt_may_return_before_the_end(
    launcher: str, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name in ("ACCELERATE_DYNAMO_MODE", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    if launcher:
        monkeypatch.setenv(launcher, "x")
    request = StopRequest()
    request.take_signal(signal.SIGINT, None)
    answer = capfd.readouterr().err
    assert "the step is finished and saved first" in answer
    assert ("saving; the prompt may return before this finishes" in answer) == bool(launcher)
