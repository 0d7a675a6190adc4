"""A stage of the small base's training goes on where it was stopped."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from kandinsky5.small_world.stage import Stage, StageConfig

CONFIG = StageConfig(
    name="line",
    steps=12,
    learning_rate=0.05,
    betas=(0.9, 0.99),
    warmup_steps=2,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.9,
)


def run(folder: Path, stop_at: int | None = None) -> nn.Module:
    """Fit a line; `stop_at` ends the run after that step as a kill between two steps would."""
    torch.manual_seed(0)
    model = nn.Linear(3, 1)
    stage = Stage(CONFIG, model, folder)

    def loss(step: int, generator: torch.Generator) -> Tensor:
        if step == stop_at:
            stage.save()
            raise KeyboardInterrupt
        inputs = torch.randn(8, 3, generator=generator)
        return (model(inputs) - inputs.sum(1, keepdim=True)).square().mean()

    stage.run(loss, lambda: {"weight": round(float(model.weight.sum()), 3)})
    return model


def test_a_stopped_and_resumed_stage_equals_one_that_was_not_stopped(tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    whole.mkdir()
    parts.mkdir()
    expected = run(whole)
    with pytest.raises(KeyboardInterrupt):
        run(parts, stop_at=5)
    resumed = run(parts)
    for name, tensor in expected.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name])


def test_a_finished_stage_gives_its_averaged_weights_without_a_step(tmp_path: Path) -> None:
    first = run(tmp_path)
    again = run(tmp_path, stop_at=0)
    assert torch.equal(first.weight, again.weight)


def test_the_log_has_a_line_per_report(tmp_path: Path) -> None:
    run(tmp_path)
    records = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text(encoding="utf-8").splitlines()]
    assert records[-1]["stage"] == "line"
    assert records[-1]["step"] == CONFIG.steps
    assert "weight" in records[-1]


def test_the_learning_rate_warms_up_stays_and_falls() -> None:
    config = replace(CONFIG, steps=100, constant_share=0.4, warmup_steps=10, final_share=0.1)
    rates = [config.rate(step) for step in range(100)]
    assert rates[0] < rates[9] == rates[39] == config.learning_rate
    assert rates[40:] == sorted(rates[40:], reverse=True)
    assert 0.1 * config.learning_rate <= rates[-1] < 0.11 * config.learning_rate
