"""What all tests of the training script share."""

from __future__ import annotations

import pytest

from kandinsky5.training import training_log


@pytest.fixture
def with_report() -> None:
    """For tests whose runs write their report."""


@pytest.fixture(autouse=True)
def _report_on_request(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing a report takes as long as a small run: it is left out unless a test asks for it."""
    if "with_report" not in request.fixturenames:
        monkeypatch.setattr(training_log, "report_run", lambda _saving: None)
