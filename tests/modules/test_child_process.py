"""A call in a process of its own gives its result, or says how it ended."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator

import pytest

from modules.child_process import CallFailed, ChildProcess


def act(word: str, count: int) -> str:
    """What the child is asked to do."""
    if word == "exit":
        os._exit(count)
    if word == "abort":
        os.abort()
    if word == "hang":
        time.sleep(count)
    if word == "raise":
        raise ValueError(f"{count}\nmore")
    return word * count


@pytest.fixture
def child() -> Iterator[ChildProcess]:
    child = ChildProcess(act)
    yield child
    child.close()


def test_one_child_answers_several_calls(child: ChildProcess) -> None:
    assert child.call("a", 3, timeout=60) == "aaa"
    with pytest.raises(CallFailed, match=r"ValueError: 3$") as failed:
        child.call("raise", 3, timeout=60)
    assert "in act" in failed.value.details
    assert child.call("b", 2, timeout=60) == "bb"


@pytest.mark.parametrize(("word", "expected"), [("exit", "exit code 7"), ("abort", "SIGABRT|exit code")])
def test_the_end_of_a_child_is_the_result_of_its_call(child: ChildProcess, word: str, expected: str) -> None:
    with pytest.raises(CallFailed, match=expected):
        child.call(word, 7, timeout=60)
    assert not child.is_alive


def test_a_call_that_takes_too_long_ends_the_child(child: ChildProcess) -> None:
    assert child.call("a", 1, timeout=60) == "a"
    with pytest.raises(CallFailed, match="no result after 0 s"):
        child.call("hang", 600, timeout=0.2)
    assert not child.is_alive


def test_a_child_that_waits_ends_by_itself() -> None:
    """Killed, it would leave its semaphores to Python's resource tracker, which warns of them."""
    child = ChildProcess(act)
    assert child.call("a", 1, timeout=60) == "a"
    child.close()
    assert child.exit_code == 0
