"""Measures the state of an optimizer by a step on one parameter of every shape."""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from kandinsky5.configs.train import OptimizerConfig
from modules.live_bytes import LiveBytes
from modules.logs import get_logger
from modules.optimizers import (
    STEP_REFUSALS,
    build_optimizer,
    moments_on_device,
    optimizer_class,
    set_averaging,
)

log = get_logger(__name__)

_BLOCK = 256
_SMALLEST_QUANTISED = 4096
"""bitsandbytes keeps states in 8 bits, blocks of 256 with a float32 scale each; small ones in float32."""
_CUDA_ONLY = ("fused", "capturable", "differentiable")
"""Ways of computing a step, some of which a CPU refuses; none changes what is kept."""


@dataclass(frozen=True, slots=True)
class OptimizerMemory:
    """Memory of an optimizer, in bytes."""

    on_device: int
    on_host: int
    """Of paged optimizers: memory that moves between host and device by itself."""
    scratch: int
    """Temporary memory of each step, on the device."""


def optimizer_memory(
    config: OptimizerConfig, groups: Sequence[Mapping[str, Any]], device: torch.device
) -> OptimizerMemory:
    """State and scratch space for parameter groups without data.

    One parameter of every distinct shape is made on the CPU and stepped once; the others are like it.
    Optimizers of bitsandbytes need their own device: they are taken to hold one byte per number and state,
    two states (Lion: one), as their documentation says. Others that refuse a step on the CPU are taken to
    hold two float32 states, which a warning says.

    Args:
        device: on CUDA torch's optimizers work on all parameters at once, which takes scratch space.
    """
    shapes = Counter(tuple(parameter.shape) for group in groups for parameter in group["params"])
    found = optimizer_class(config.optimizer_type)
    if found.__module__.startswith("bitsandbytes"):
        return _bitsandbytes_memory(found.__name__, shapes)
    given = config.optimizer_args
    is_foreach = "foreach" in inspect.signature(found.__init__).parameters and _is_foreach(given, device)
    arguments = {name: value for name, value in given.items() if name not in _CUDA_ONLY}
    if is_foreach:
        arguments["foreach"] = True
    kept, made = Counter[str](), Counter[str]()
    for shape, count in shapes.items():
        optimizer = _with_gradient(config, arguments, shape)
        try:
            state, scratch = _step_twice(optimizer)
        except STEP_REFUSALS as error:
            log.warning(
                "the memory of %s is assumed, two float32 states: it does not step on the CPU (%s)",
                config.optimizer_type,
                error,
            )
            return OptimizerMemory(
                8 * sum(torch.Size(shape).numel() * n for shape, n in shapes.items()), 0, 0
            )
        kept["all"] += state * count
        made["all"] += scratch * count
        made["one"] = max(made["one"], scratch)
    return OptimizerMemory(kept["all"], 0, made["all" if is_foreach else "one"])


def _is_foreach(given: Mapping[str, Any], device: torch.device) -> bool:
    """Whether a step works on all parameters at once: as told, else on CUDA, without another way."""
    if given.get("foreach") is not None:
        return bool(given["foreach"])
    return device.type == "cuda" and given.get("fused") is None and not given.get("differentiable")


def _with_gradient(
    config: OptimizerConfig, arguments: Mapping[str, Any], shape: tuple[int, ...]
) -> torch.optim.Optimizer:
    """The optimizer of one parameter, which has a gradient."""
    parameter = nn.Parameter(torch.zeros(shape))
    parameter.grad = torch.zeros(shape)
    optimizer = build_optimizer(
        config.optimizer_type, [{"params": [parameter]}], config.learning_rate, arguments
    )
    set_averaging(optimizer, training=True)
    return optimizer


def _step_twice(optimizer: torch.optim.Optimizer) -> tuple[int, int]:
    """(bytes of state, peak of what a step with states makes)."""
    optimizer.step()  # makes the state
    with LiveBytes() as counted:
        optimizer.step()
    # Step counters lie on the host.
    state = sum(tensor.nbytes for tensor in moments_on_device(optimizer) if tensor.ndim > 0)
    return state, counted.peak


def _bitsandbytes_memory(name: str, shapes: Counter[tuple[int, ...]]) -> OptimizerMemory:
    states = 1 if "Lion" in name else 2
    total = 0
    for shape, count in shapes.items():
        elements = torch.Size(shape).numel()
        is_narrow = "8bit" in name and elements >= _SMALLEST_QUANTISED
        one = elements + 4 * -(-elements // _BLOCK) if is_narrow else 4 * elements
        total += count * states * one
    return OptimizerMemory(0, total, 0) if name.startswith("Paged") else OptimizerMemory(total, 0, 0)
