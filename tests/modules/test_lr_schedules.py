"""Learning rates by their formulas, and equal to an uninterrupted schedule wherever they are picked up."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers.optimization import get_scheduler

from modules.errors import ConfigError
from modules.lr_schedules import SCHEDULE_NAMES, ScheduleSettings, build_lr_schedule, multiplier


def one_optimizer(lr: float = 1.0) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=lr)


def settings(name: str) -> ScheduleSettings:
    arguments = {"step_rules": "1:10,0.1:20,0.01"} if name == "piecewise_constant" else {}
    warmup = 0 if name in ("constant", "piecewise_constant") else 5
    return ScheduleSettings(
        name=name, total_steps=40, warmup_steps=warmup, decay_steps=10, arguments=arguments, num_cycles=2
    )


@pytest.mark.parametrize("name", SCHEDULE_NAMES)
@pytest.mark.parametrize("stop", [1, 5, 23])
def test_a_schedule_picked_up_at_a_step_continues_exactly(name: str, stop: int) -> None:
    optimizer = one_optimizer(3e-4)
    schedule = build_lr_schedule(optimizer, settings(name))
    rates = []
    for _ in range(40):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    resumed = one_optimizer(3e-4)
    again = build_lr_schedule(resumed, settings(name), steps_done=stop)
    for step in range(stop, 40):
        assert resumed.param_groups[0]["lr"] == rates[step]
        resumed.step()
        again.step()


@pytest.mark.parametrize(
    ("name", "extra", "theirs"),
    [
        ("constant_with_warmup", {}, {}),
        ("linear", {}, {}),
        ("cosine", {}, {}),
        ("cosine_with_restarts", {"num_cycles": 3}, {"num_cycles": 3}),
        ("inverse_sqrt", {"timescale": 7}, {"timescale": 7}),
        (
            "cosine_with_min_lr",
            {"min_lr_ratio": 0.1},
            {"num_cycles": 0.5, "min_lr_rate": 0.1},
        ),
        (
            "warmup_stable_decay",
            {"decay_steps": 12, "min_lr_ratio": 0.2},
            {"num_decay_steps": 12, "num_stable_steps": 23, "min_lr_ratio": 0.2},
        ),
    ],
)
def test_the_formulas_are_those_of_transformers(name: str, extra: dict, theirs: dict) -> None:
    factor = multiplier(ScheduleSettings(name=name, total_steps=40, warmup_steps=5, **extra))
    optimizer = one_optimizer()
    schedule = get_scheduler(
        name, optimizer, num_warmup_steps=5, num_training_steps=40, scheduler_specific_kwargs=theirs
    )
    for step in range(40):
        assert factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-9), step
        optimizer.step()
        schedule.step()


def test_rex_falls_from_the_rate_to_its_floor() -> None:
    factor = multiplier(ScheduleSettings(name="rex", total_steps=100, min_lr_ratio=0.01))
    assert factor(0) == 1.0
    assert factor(50) == pytest.approx(0.01 + 0.99 * 0.5 / (0.1 + 0.9 * 0.5))
    assert factor(100) == pytest.approx(0.01)


def test_piecewise_rules_change_at_their_steps() -> None:
    factor = multiplier(settings("piecewise_constant"))
    assert [factor(step) for step in (0, 9, 10, 19, 20, 99)] == [1, 1, 0.1, 0.1, 0.01, 0.01]


def test_wrong_names_arguments_and_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="use one of"):
        multiplier(ScheduleSettings(name="cosin", total_steps=1))
    with pytest.raises(ConfigError, match="takes no rex_alpha"):
        multiplier(ScheduleSettings(name="linear", total_steps=1, arguments={"rex_alpha": 1}))
    with pytest.raises(ConfigError, match="step_rules"):
        multiplier(ScheduleSettings(name="piecewise_constant", total_steps=1))


def test_a_class_of_torch_can_be_named() -> None:
    optimizer = one_optimizer()
    described = ScheduleSettings(name="constant", total_steps=9, arguments={"step_size": 2, "gamma": 0.5})
    schedule = build_lr_schedule(optimizer, described, class_name="StepLR")
    for _ in range(2):
        optimizer.step()
        schedule.step()
    assert optimizer.param_groups[0]["lr"] == 0.5
