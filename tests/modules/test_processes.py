"""Processes of one job share everything out once, and end together."""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import nullcontext

import pytest

from modules import processes
from modules.errors import DataError, ResourceError
from modules.processes import Processes, joined_processes


def test_every_item_is_the_share_of_exactly_one_process() -> None:
    items = list(range(11))
    shares = [Processes(index, 3).share(items) for index in range(3)]
    assert sorted(item for share in shares for item in share) == items
    assert [len(share) for share in shares] == [4, 4, 3]


def test_without_a_launcher_a_process_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with joined_processes() as alone:
        assert alone.is_main
        assert alone.share([1, 2]) == [1, 2]
        assert alone.gather("x") == ["x"]
        assert alone.together(lambda: 3) == 3


def test_processes_that_cannot_find_each_other_are_told_how_to_start(monkeypatch: pytest.MonkeyPatch) -> None:
    for word in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(word, raising=False)
    monkeypatch.setitem(os.environ, "WORLD_SIZE", "2")
    with (
        pytest.raises(ResourceError, match="accelerate launch --multi_gpu --num_processes 2"),
        joined_processes(),
    ):
        pass


def fail() -> None:
    raise DataError("a bad file")


def crash() -> None:
    raise KeyError("a mistake in the program")


@pytest.mark.parametrize(
    ("action", "code", "expected"), [(fail, 3, DataError), (crash, 1, KeyError), (lambda: None, 0, None)]
)
def test_the_others_are_told_of_every_error(
    action: Callable[[], None],
    code: int,
    expected: type[Exception] | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told: list[int] = []

    def others_are_well(values: list[int], own: int) -> None:
        told.append(own)
        values[:] = [own, 0]

    monkeypatch.setattr(processes.dist, "all_gather_object", others_are_well)
    with nullcontext() if expected is None else pytest.raises(expected):
        Processes(0, 2).together(action)
    assert told == [code]


@pytest.mark.parametrize(("action", "expected"), [(fail, DataError), (lambda: None, SystemExit)])
def test_when_one_fails_it_says_why_and_the_others_end_with_its_code(
    action: Callable[[], None], expected: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    def one_other_failed(values: list[int], own: int) -> None:
        values[:] = [own, 3]

    monkeypatch.setattr(processes.dist, "all_gather_object", one_other_failed)
    with pytest.raises(expected) as caught:
        Processes(0, 2).together(action)
    if isinstance(caught.value, SystemExit):
        assert caught.value.code == 3
