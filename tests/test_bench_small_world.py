"""The scores on the small world: their rows, and that no prompt of a score is among those that are taught."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent / "benchmarks"))

import bench_small_world as bench

import quickstart
from kandinsky5.small_world.clips import main as draw_clips
from kandinsky5.small_world.score import scene_of_prompt
from kandinsky5.small_world.world import Scene, draw
from modules.fp8 import Fp8Linear


@pytest.fixture
def sampled(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Sampling is replaced by drawing what the prompts say; returns the bases that it was called with."""
    bases = []

    def drawn(base: Any, scenes: Sequence[Scene], *_: Any, **__: Any) -> Tensor:
        bases.append(base)
        return draw(scenes, torch.Generator().manual_seed(0))

    monkeypatch.setattr(bench, "sample", drawn)
    return bases


def test_a_lora_is_scored_on_its_concept_and_on_the_controls_with_the_given_options(
    sampled: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    bench.main(["lora", "--concept", "star", "--seeds", "1", "--", "--fp8_base"])
    taught, controls = map(json.loads, capsys.readouterr().out.splitlines())
    assert (taught["appears"], taught["all_three"], taught["clips"]) == (1.0, 1.0, 10)
    assert (controls["appears"], controls["all_three"], controls["clips"]) == (0.0, 1.0, 10)
    assert any(isinstance(module, Fp8Linear) for module in sampled[0].dit.modules())


def test_guidance_and_steps_and_faults_are_rows_of_one_form(
    sampled: list[Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "STEPS", (4, 8))
    monkeypatch.setattr(bench, "GUIDANCE", (3.0,))
    monkeypatch.setattr(bench, "FAULTS", {"a fault": lambda base: base})
    monkeypatch.setattr(bench, "IMAGE_FAULTS", {})
    bench.main(["sampling", "--seeds", "1"])
    bench.main(["faults", "--seeds", "1"])
    rows = list(map(json.loads, capsys.readouterr().out.splitlines()))
    assert [(row["guidance"], row["steps"]) for row in rows[:2]] == [(3.0, 4), (3.0, 8)]
    assert [(row["fault"], row["with_image"]) for row in rows[2:]] == [
        ("none", False),
        ("a fault", False),
        ("none", True),
    ]
    assert {row["error"] for row in rows[2:]} == {1.0}
    assert {(row["clips"], row["all_three"]) for row in rows} == {(10, 1.0)}


def test_no_prompt_of_the_scores_is_taught_or_shown_by_the_quick_start(tmp_path: Path) -> None:
    for name, shapes, clips in (
        ("taught", [quickstart.TAUGHT], quickstart.CLIPS),
        ("known", quickstart.KNOWN, quickstart.KNOWN_CLIPS),
    ):
        draw_clips([str(tmp_path / name), "--shape", *shapes, "--clips", str(clips)])
    captions = [path.read_text(encoding="utf-8") for path in (tmp_path / "taught").glob("*.txt")]
    used = {scene_of_prompt(text) for text in (*captions, *quickstart.PROMPTS)}
    concept = bench.CONCEPTS[quickstart.TAUGHT]
    assert not used & {*concept.test, *concept.tuning}
    assert not {*concept.test} & {*concept.tuning}
    assert not {*bench.PROMPTS} & {*bench.TUNING_CONTROLS}
    assert not used & {*bench.PROMPTS}
