"""The memory of an optimizer is found out for every way of stepping, also for those a CPU refuses."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import nn

from kandinsky5.configs.train import OptimizerConfig
from kandinsky5.memory.optimizer import OptimizerMemory, optimizer_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
SHAPES = ((3, 8), (3, 8), (3, 8), (5,))
NUMBERS = 77


class OnlyOnCuda(torch.optim.SGD):
    """An optimizer whose kernels know no CPU."""

    def step(self, closure: Any = None) -> Any:
        raise AssertionError("only CUDA tensors")


def memory(arguments: dict[str, Any], device: torch.device, kind: str = "AdamW") -> OptimizerMemory:
    parameters = [nn.Parameter(torch.zeros(shape, device="meta")) for shape in SHAPES]
    config = OptimizerConfig(optimizer_type=kind, optimizer_args=arguments, learning_rate=1e-3)
    return optimizer_memory(config, [{"params": parameters}], device)


@pytest.mark.parametrize("name", ["fused", "capturable", "differentiable"])
@pytest.mark.parametrize("device", [CPU, CUDA], ids=str)
def test_ways_of_stepping_that_a_cpu_refuses_keep_what_adamw_keeps(name: str, device: torch.device) -> None:
    assert memory({name: True}, device).on_device == memory({}, device).on_device == 8 * NUMBERS


def test_only_steps_on_all_parameters_at_once_take_scratch_for_all() -> None:
    at_once, one_by_one = memory({}, CUDA).scratch, memory({}, CPU).scratch
    assert at_once >= 4 * NUMBERS > one_by_one
    assert memory({"capturable": True}, CUDA).scratch == at_once
    assert memory({"foreach": True}, CPU).scratch == at_once
    for arguments in ({"foreach": False}, {"fused": True}, {"differentiable": True}):
        assert memory(arguments, CUDA).scratch == one_by_one


def test_an_optimizer_that_a_cpu_refuses_is_taken_to_hold_two_states(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("k5"), "propagate", True)
    found = memory({}, CUDA, f"{__name__}.OnlyOnCuda")
    assert found == OptimizerMemory(8 * NUMBERS, 0, 0)
    assert "is assumed, two float32 states" in caplog.text
    assert "only CUDA tensors" in caplog.text
