"""The GPU benchmark at tiny size on the CPU: every row runs, and no row can end the table."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import bench_gpu
import gpu_child
import gpu_plans
from bench_gpu import CASES, Children, Row, Table, run_row
from gpu_cases import Case, tiny
from gpu_plans import Planned, Plans

from modules.errors import ConfigError

CARD = {"name": "stand-in", "gib": 24.0, "flops": 1e15}
PLANNED = Planned(gib=1.0, work=1e12)
CASE = CASES[0]


@pytest.fixture(scope="module")
def plans() -> Plans:
    return Plans(torch.device("cpu"))


@pytest.mark.parametrize("case", map(tiny, CASES), ids=lambda case: case.name)
def test_every_row_is_planned_and_runs(plans: Plans, case: Case) -> None:
    planned = plans.plan(case)
    assert planned.gib > 0
    assert planned.work > 0
    # One of the compiled rows is traced; the others take the same way without it.
    is_traced = "--compile" not in case.options or case.name == "a6"
    with nullcontext() if is_traced else torch.compiler.set_stance("force_eager"):
        measured = gpu_child.measure(case, planned.chosen, "cpu")
    row = Row(case, planned, measured, estimate=planned.seconds(case, 1e15))
    assert measured["ours_seconds"] > 0
    assert ("beside_seconds" in measured) == (case.beside is not None)
    assert row.result({}) != "not run"
    assert len(Table(CARD, None, 1e15).line(row).split(" | ")) == len(bench_gpu.HEADERS)


def test_the_command_measures_in_children_and_writes_both_files(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bench_gpu.main(["--rehearse", "--only", "e1", "f", "--output", str(tmp_path / "rows")])
    text = (tmp_path / "rows.md").read_text(encoding="utf-8")
    assert text == capsys.readouterr().out
    facts = json.loads((tmp_path / "rows.json").read_text(encoding="utf-8"))
    assert [row["case"]["name"] for row in facts["rows"]] == ["e1", "f1", "f2"]
    assert all(row["measured"]["ours_seconds"] > 0 for row in facts["rows"])
    assert facts["card"]["torch"] == torch.__version__


def act(case: Case, chosen: tuple[str, ...], device: str) -> dict[str, Any]:
    """Stands for `gpu_child.measure`."""
    match case.what:
        case "crash":
            os.abort()
        case "hang":
            time.sleep(600)
        case "memory":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
    return {"ours_seconds": 2.0, "first_seconds": 3.0, "parts": {}}


@pytest.fixture
def children() -> Iterator[Children]:
    children = Children(act, keep=False)
    yield children
    children.close()


def ran(case: Case, children: Children, *, planned: Planned | Exception = PLANNED, left: float = 1e3) -> Row:
    future: Future[Planned] = Future()
    if isinstance(planned, Exception):
        future.set_exception(planned)
    else:
        future.set_result(planned)
    return run_row(case, future, children, left, CARD, CARD["flops"], "cpu")


def named(what: str) -> Case:
    return Case(name="a1", what=what)


def test_a_row_that_fails_says_how_and_the_next_one_runs(
    children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_gpu, "SHORTEST_LIMIT", 600.0)
    assert "the process ended with" in ran(named("crash"), children).failure
    assert ran(named("memory"), children).failure.startswith("OutOfMemoryError: CUDA out of memory")
    monkeypatch.setattr(bench_gpu, "SHORTEST_LIMIT", 0.1)
    monkeypatch.setattr(bench_gpu, "PATIENCE", 0.0)
    assert ran(named("hang"), children).failure == "no result after 0 s"
    monkeypatch.setattr(bench_gpu, "SHORTEST_LIMIT", 600.0)
    row = ran(named("runs"), children)
    assert not row.failure
    assert row.measured["ours_seconds"] == 2.0


def test_rows_that_cannot_be_measured_are_left_out_in_words(children: Children) -> None:
    large = ran(CASE, children, planned=Planned(gib=30.0, work=1e12))
    assert large.failure == "not run: the plan is larger than the card's 24 GiB"
    assert ran(CASE, children, left=3.0).failure == "left out: 5 s estimated, 3 s left"
    unfit = ran(CASE, children, planned=ConfigError("does not fit\nmore"))
    assert unfit.failure == "not planned: does not fit"
    assert not any(row.measured for row in (large, unfit))


def test_a_table_compares_rows_and_judges_goals(tmp_path: Path) -> None:
    table = Table(CARD, tmp_path / "rows", 1e15)
    first, second = (
        Case(name="a1", what="one"),
        Case(name="a2", what="two", to="a1", at_most=1.0, at_most_gib=3.0),
    )
    table.add(Row(first, PLANNED, {"ours_seconds": 2.0, "parts": {}}))
    table.add(Row(second, PLANNED, {"ours_seconds": 3.0, "peak_gib": 4.0, "parts": {}}))
    table.add(Row(Case(name="a3", what="three", to="a9"), failure="no result after 9 s"))
    lines = (tmp_path / "rows.md").read_text(encoding="utf-8").splitlines()[-3:]
    assert lines[0].endswith("| ok |")
    assert "| a1 | 1.5 | 1 |" in lines[1]
    assert lines[1].endswith("| ratio above 1, above 3 GiB |")
    assert lines[2].endswith("| no result after 9 s |")


def test_rows_are_told_apart_and_compare_with_earlier_ones() -> None:
    names = [case.name for case in CASES]
    assert len(set(names)) == len(names)
    assert all(case.to is None or case.to in names[:index] for index, case in enumerate(CASES))
    measured = {
        (case.kind, case.task, case.clip, *case.words(), case.card, case.is_pageable) for case in CASES
    }
    assert len(measured) == len(CASES)


def test_the_first_round_goes_once_through_the_parts_in_order() -> None:
    parts = [case.part for case in CASES]
    first = parts[: parts.index("g") + 1]
    assert first == sorted(first)
    assert set(first) == set("abcdefg")


def test_an_estimate_grows_with_the_work_and_what_is_loaded() -> None:
    def seconds(case: Case, **changes: Any) -> float:
        return Planned(**{"gib": 1.0, "work": 1e15} | changes).seconds(case, 1e15)

    plain = seconds(named("x"))
    runs = (CASE.rounds + 2) / gpu_plans.REACHED
    assert plain == pytest.approx(gpu_plans.START_SECONDS + runs)
    assert seconds(named("x"), work=2e15) == pytest.approx(plain + runs)
    assert seconds(named("x"), host_gib=15.0) == pytest.approx(plain + 10)
    assert seconds(Case(name="a1", what="x", options=("--compile",))) == pytest.approx(plain + 75)
