"""Learning rates as pure functions of the step, so that a resumed run needs nothing but its step number."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from modules.class_names import import_class
from modules.errors import ConfigError

Multiplier = Callable[[int], float]
"""Optimizer steps done -> factor on the base learning rate."""

_REFUSALS = (TypeError, ValueError, ArithmeticError)
"""What schedule classes raise for arguments that they do not take."""

SCHEDULE_NAMES = (
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "inverse_sqrt",
    "cosine_with_min_lr",
    "warmup_stable_decay",
    "piecewise_constant",
    "rex",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class ScheduleSettings:
    """Parameters of a schedule; lengths in optimizer steps."""

    name: str = "constant"
    total_steps: int
    warmup_steps: int = 0
    decay_steps: int = 0
    """Length of the final fall of warmup_stable_decay."""
    num_cycles: float = 1.0
    power: float = 1.0
    timescale: float | None = None
    """Steps over which inverse_sqrt falls to 1/sqrt(2); the warm-up's length if None, else 10000."""
    min_lr_ratio: float | None = None
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Values of `--lr_scheduler_args`, such as step_rules, rex_alpha and rex_beta."""


def multiplier(settings: ScheduleSettings) -> Multiplier:
    """The factor on the base rate as a function of the steps done.

    Formulas: huggingface transformers and diffusers (`get_scheduler` names); rex: Chen et al. 2021,
    "REX: Revisiting Budgeted Training with an Improved Schedule", arXiv 2107.04197, eq. 1.

    Raises:
        ConfigError: unknown name, argument or combination.
    """
    if settings.name not in SCHEDULE_NAMES:
        raise ConfigError(f"--lr_scheduler {settings.name}: use one of {', '.join(SCHEDULE_NAMES)}")
    allowed = {"rex": {"rex_alpha", "rex_beta"}, "piecewise_constant": {"step_rules"}}.get(
        settings.name, set()
    )
    unknown = sorted(set(settings.arguments) - allowed)
    if unknown:
        raise ConfigError(f"--lr_scheduler_args: {settings.name} takes no {', '.join(unknown)}")
    if settings.name == "piecewise_constant":
        return _piecewise(str(settings.arguments.get("step_rules", "")))
    after = _after_warmup(settings)
    # As in transformers, this one alone warms up from its floor.
    start = (settings.min_lr_ratio or 0.0) if settings.name == "warmup_stable_decay" else 0.0

    def factor(step: int) -> float:
        if step < settings.warmup_steps:
            return start + (1.0 - start) * step / settings.warmup_steps
        return after(step)

    return factor


def _after_warmup(settings: ScheduleSettings) -> Multiplier:
    """The part of the schedule that follows the linear warm-up."""
    warmup, total = settings.warmup_steps, settings.total_steps
    span = max(1, total - warmup)
    floor = settings.min_lr_ratio or 0.0

    def progress(step: int) -> float:
        return min(1.0, max(0.0, (step - warmup) / span))

    def polynomial(step: int) -> float:
        # diffusers' end rate of 1e-7 is an absolute one; a ratio keeps the factor free of the base rate.
        return floor + (1.0 - floor) * (1.0 - progress(step)) ** settings.power

    def inverse_sqrt(step: int) -> float:
        timescale = settings.timescale or warmup or 10_000
        return math.sqrt(timescale / (timescale + step - warmup))

    def restarts(step: int) -> float:
        if progress(step) >= 1.0:
            return 0.0
        return 0.5 * (1.0 + math.cos(math.pi * (settings.num_cycles * progress(step) % 1.0)))

    def min_lr_cosine(step: int) -> float:
        return floor + (1.0 - floor) * _cosine(progress(step), settings.num_cycles / 2)

    shapes: dict[str, Multiplier] = {
        "constant": lambda step: 1.0,
        "constant_with_warmup": lambda step: 1.0,
        "linear": lambda step: 1.0 - progress(step),
        # Always one half wave: the number of cycles belongs to cosine_with_restarts.
        "cosine": lambda step: _cosine(progress(step), 0.5),
        "cosine_with_restarts": restarts,
        "polynomial": polynomial,
        "inverse_sqrt": inverse_sqrt,
        "cosine_with_min_lr": min_lr_cosine,
        "warmup_stable_decay": _stable_decay(settings),
        "rex": _rex(settings, progress),
    }
    return shapes[settings.name]


def _cosine(progress: float, num_cycles: float) -> float:
    return max(0.0, 0.5 * (1.0 + math.cos(2.0 * math.pi * num_cycles * progress)))


def _stable_decay(settings: ScheduleSettings) -> Multiplier:
    floor = settings.min_lr_ratio or 0.0
    start = settings.total_steps - settings.decay_steps

    def factor(step: int) -> float:
        if step < start or settings.decay_steps == 0:
            return 1.0
        done = min(1.0, (step - start) / settings.decay_steps)
        return floor + (1.0 - floor) * _cosine(done, settings.num_cycles / 2)

    return factor


def _rex(settings: ScheduleSettings, progress: Multiplier) -> Multiplier:
    given = {"rex_alpha": 0.1, "rex_beta": 0.9, **settings.arguments}
    alpha, beta = given["rex_alpha"], given["rex_beta"]
    are_numbers = all(isinstance(value, (int, float)) and value >= 0 for value in (alpha, beta))
    if not are_numbers or alpha + beta == 0:
        raise ConfigError(
            "--lr_scheduler_args: rex_alpha and rex_beta must be numbers from 0 on, and not both 0; got "
            f"rex_alpha={alpha!r} rex_beta={beta!r}. The usual values are rex_alpha=0.1 rex_beta=0.9"
        )
    floor = 0.01 if settings.min_lr_ratio is None else settings.min_lr_ratio

    def factor(step: int) -> float:
        left = 1.0 - progress(step)
        shape = left / (alpha + beta * left) if left > 0.0 else 0.0
        return floor + (1.0 - floor) * shape

    return factor


def _piecewise(rules: str) -> Multiplier:
    """`1:10,0.1:20,0.01` is factor 1 before step 10, 0.1 before step 20, then 0.01."""
    *pairs, last = rules.split(",")
    try:
        steps = [(int(pair.split(":")[1]), float(pair.split(":")[0])) for pair in pairs]
        final = float(last)
        limits = [0, *(limit for limit, _ in steps)]
        if any(before >= after for before, after in itertools.pairwise(limits)):
            raise ValueError
    except (ValueError, IndexError) as error:
        raise ConfigError(
            "--lr_scheduler piecewise_constant needs factors with ascending steps, for example "
            f"--lr_scheduler_args \"step_rules='1:10,0.1:20,0.01'\"; got step_rules={rules!r}"
        ) from error
    return lambda step: next((factor for limit, factor in steps if step < limit), final)


def build_lr_schedule(
    optimizer: torch.optim.Optimizer,
    settings: ScheduleSettings,
    *,
    steps_done: int = 0,
    class_name: str = "",
    adafactor_initial_lr: float | None = None,
) -> LRScheduler:
    """Build a torch scheduler at `steps_done`; the rates of the optimizer's groups are the base rates.

    Args:
        class_name: a class of torch.optim.lr_scheduler or a dotted path; wins over the named schedule and
            gets `settings.arguments`. Its own state must be loaded on resuming.
        adafactor_initial_lr: for an optimizer that sets its own rate; the schedule then only reports it.
    Raises:
        ConfigError: unknown class, or arguments it refuses.
    """
    if adafactor_initial_lr is not None:
        from transformers.optimization import AdafactorSchedule  # imported late: seconds, and rarely used

        return AdafactorSchedule(optimizer, adafactor_initial_lr)
    if class_name:
        return _custom_schedule(optimizer, class_name, settings.arguments)
    factor = multiplier(settings)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    # The constructor takes one step of its own.
    return LambdaLR(optimizer, factor, last_epoch=steps_done - 1)


def _custom_schedule(
    optimizer: torch.optim.Optimizer, class_name: str, arguments: Mapping[str, Any]
) -> LRScheduler:
    dotted = class_name if "." in class_name else f"torch.optim.lr_scheduler.{class_name}"
    found = import_class(dotted, "--lr_scheduler_type")
    if not issubclass(found, LRScheduler) or found is torch.optim.lr_scheduler.ReduceLROnPlateau:
        raise ConfigError(f"--lr_scheduler_type {class_name}: cannot be stepped without a validation loss")
    try:
        return found(optimizer, **arguments)
    except _REFUSALS as error:
        raise ConfigError(f"--lr_scheduler_args: {class_name} refuses its arguments: {error}") from error


def check_schedule_lasts(
    schedule: LRScheduler, class_name: str, *, steps_done: int, total_steps: int
) -> None:
    """Step a schedule to the end of the run, because some classes end earlier.

    Raises:
        ConfigError: it ends before the run does.
    """
    for step in range(steps_done + 1, total_steps + 1):
        try:
            schedule.step()
        except _REFUSALS as error:
            raise ConfigError(
                f"--lr_scheduler_type {class_name}: fails at step {step} of the {total_steps} of this run: "
                f"{error}. Give --lr_scheduler_args that last for the whole run"
            ) from error
