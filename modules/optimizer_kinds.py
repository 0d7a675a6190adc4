"""Learning-rate behaviour of optimizers by name and arguments; does not import torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def takes_relative_steps(name: str, arguments: Mapping[str, Any]) -> bool:
    """Whether the optimizer is an Adafactor that sets its own learning rate."""
    if name.lower().rpartition(".")[2] != "adafactor" or name.lower().startswith("torch."):
        return False
    return bool(arguments.get("relative_step", True)) or bool(arguments.get("warmup_init", False))


def is_schedule_free(name: str) -> bool:
    """Whether the optimizer averages its weights by itself: no schedule, and eval() before they are used."""
    return name.endswith("ScheduleFree")
