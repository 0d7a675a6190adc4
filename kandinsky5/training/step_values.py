"""Values of one optimizer step, reduced over all processes with one transfer from the device."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor

from kandinsky5.training.plan import StepPlan


def item_keys(plan: StepPlan) -> list[str]:
    """The clips of a step, without those that only fill up."""
    return [key for micro in plan.micro_batches if not micro.is_filler for key in micro.plan.item_keys]


@dataclass(frozen=True, slots=True)
class LocalLosses:
    """What the passes of a step gave on one process."""

    totals: Tensor
    """[2] float32 on the device: its share of the loss, and of the prior term within it."""
    of_clips: Tensor
    """[N] float32 on the device, without clips that only fill up; the prior term included."""
    sigmas: Sequence[float]
    """Of the same clips."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalStep:
    """A step as one process has computed it."""

    losses: LocalLosses
    grad_norm: Tensor
    """[] on the device, over the gradients of all processes."""
    stop_code: int
    """See `TrainingControl`."""
    wants_samples: bool
    layer_norms: Tensor
    """[3] or [0] on the device, `NormLimit.waiting` of the step before."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StepValues:
    """A step over all processes, on the host."""

    loss: float
    prior_loss: float
    clip_losses: Sequence[float]
    """Of this process's clips, the prior term included."""
    grad_norm: float
    stop_code: int
    wants_samples: bool
    layer_norms: Sequence[float]

    @property
    def is_finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


@dataclass(frozen=True, slots=True)
class StepReport:
    """The reported values of a finished step."""

    plan: StepPlan
    values: StepValues
    sigmas: Sequence[float]
    """Of this process's clips."""
    rates: Mapping[str, float]
    """Learning rates by their names in the curves."""

    def describe(self) -> str:
        """Numbers, items and timesteps, for an error message."""
        return (
            f"step {self.plan.step + 1}: loss {self.values.loss}, gradient norm {self.values.grad_norm}; "
            f"items {', '.join(item_keys(self.plan))}; "
            f"timesteps {', '.join(f'{1000 * sigma:.1f}' for sigma in self.sigmas)}"
        )


class StepMeter:
    """Measures what a step costs, without waiting for the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._started = 0.0

    def start(self) -> None:
        """Begin a step."""
        self._started = time.perf_counter()
        if self._device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device)

    def read(self) -> dict[str, float]:
        """Seconds of the step and, on CUDA, its peak of device memory in bytes."""
        cost = {"seconds": round(time.perf_counter() - self._started, 4)}
        if self._device.type == "cuda":
            cost["peak_bytes"] = torch.cuda.max_memory_allocated(self._device)
        return cost


def gather_step(local: LocalStep, accelerator: Accelerator) -> StepValues:
    """Add up the losses of all processes, and take the largest stop code; one transfer from the device."""
    losses = local.losses
    device = losses.totals.device
    requests = torch.tensor([float(local.stop_code), float(local.wants_samples)], device=device)
    shared = torch.cat([losses.totals, requests])
    if accelerator.num_processes > 1:
        rows = torch.zeros(accelerator.num_processes, 4, device=device)
        rows[accelerator.process_index] = shared
        torch.distributed.all_reduce(rows)
        shared = torch.cat([rows[:, :2].sum(dim=0), rows[:, 2:].amax(dim=0)])
    norm = local.grad_norm.float()[None]
    values = torch.cat([shared, norm, losses.of_clips, local.layer_norms]).tolist()
    loss, prior_loss, stop_code, wants_samples, grad_norm, *rest = values
    num_clips = len(losses.of_clips)
    return StepValues(
        loss=loss,
        prior_loss=prior_loss,
        clip_losses=rest[:num_clips],
        grad_norm=grad_norm,
        stop_code=int(stop_code),
        wants_samples=wants_samples > 0,
        layer_norms=rest[num_clips:],
    )
