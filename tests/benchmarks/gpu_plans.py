"""What each case of `bench_gpu.py` should take, before it runs: memory by the planner, seconds by counted work."""

from __future__ import annotations

from dataclasses import dataclass

import gpu_child
import torch
from gpu_cases import CAPS_GIB, Case

from kandinsky5.memory.activations import META, sampling_activations
from kandinsky5.memory.bases import suitable_base
from kandinsky5.memory.budget import CONTEXT_BYTES, choose
from kandinsky5.memory.plan import TrainingPlanner
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.drawn_weights import DrawnWeights
from kandinsky5.tasks import TASKS
from kandinsky5.training import setup
from modules.byte_sizes import GIB
from modules.flops import FlopCounter
from modules.live_bytes import LiveBytes

# Assumed, until a card has shown them: a share of a product's speed that a step reaches, and rates of the start.
REACHED = 0.6
START_SECONDS = 5.0
DRAWN_PER_SECOND = 20 * GIB
TO_HOST_PER_SECOND = 1.5 * GIB
"""Down to pageable memory, and from there into the copies that stream."""
COMPILE_SECONDS = 75.0
KERNEL_SECONDS = 30.0
"""Compiling the sparse attention, forward and backward."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Planned:
    """Before a case runs."""

    gib: float
    """On the device at the peak."""
    host_gib: float = 0.0
    work: float
    """Operations of one run."""
    beside: float = 0.0
    """Operations of what is timed in turn with it."""
    drawn_gib: float = 0.0
    chosen: tuple[str, ...] = ()
    """Words that `--vram_budget` would add."""

    def run_seconds(self, flops: float) -> float:
        """One run, on a device of `flops` bf16 operations a second."""
        return self.work / (flops * REACHED)

    def seconds(self, case: Case, flops: float) -> float:
        """The whole case, with its process."""
        runs = (case.rounds + 2) * self.work + (case.rounds + 1) * self.beside
        seconds = START_SECONDS + runs / (flops * REACHED)
        seconds += self.drawn_gib * GIB / DRAWN_PER_SECOND + self.host_gib * GIB / TO_HOST_PER_SECOND
        if "--compile" in case.options:
            seconds += COMPILE_SECONDS
        return seconds + (KERNEL_SECONDS if TASKS[case.task].nabla is not None else 0.0)


class Plans:
    """Plans of cases for one kind of device; models without data are put together once."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._planners: dict[tuple[str, int | None], TrainingPlanner] = {}

    def plan(self, case: Case) -> Planned:
        """What the case should take.

        Raises:
            ConfigError: no memory options make it fit its card.
        """
        if case.kind == "step":
            return self._plan_step(case)
        return self._plan_forward(case) if case.kind == "forward" else _plan_part(case)

    def _plan_step(self, case: Case) -> Planned:
        planner = self._planner(case)
        options, added = planner.given, ()
        if case.card:
            budget = int(CAPS_GIB[case.card] * GIB) + CONTEXT_BYTES
            choice = choose(planner, case.batch, budget, suitable_base(None))
            options, added = choice.options, choice.added
        plan = planner.plan(options, case.batch)
        return Planned(
            gib=plan.peak / GIB,
            host_gib=plan.usage.host_bytes / GIB,
            work=plan.flops,
            beside=plan.flops if case.beside else 0.0,
            drawn_gib=_file_bytes(case) / GIB,
            chosen=tuple(word for words in added for word in words.split()),
        )

    def _planner(self, case: Case) -> TrainingPlanner:
        config = case.config()
        dtype = setup.training_dtype(config.model, self._device)
        key = (case.task, case.blocks)
        if key not in self._planners:
            source = DrawnWeights(config.model.dit_params, META)
            self._planners[key] = TrainingPlanner(config, self._device, dtype, source=source)
        # All cases of a model have its LoRA and optimizer: their plans differ by the memory options alone.
        self._planners[key].given = config.model
        return self._planners[key]

    def _plan_forward(self, case: Case) -> Planned:
        planner = self._planner(case)
        task, options = planner.task, planner.given

        def velocity(short: DiffusionTransformer3D) -> VelocityModel:
            return VelocityModel(short, task.scale_factor, options.nabla)

        usage = planner.weights_usage(options, ring_size=options.block_swap_ring_size)
        activations = sampling_activations(planner.model(options).dit, task, case.batch, velocity=velocity)
        return Planned(
            gib=(usage.device_bytes + activations.device) / GIB,
            host_gib=usage.host_bytes / GIB,
            work=activations.flops,
            beside=activations.flops if case.beside else 0.0,
            drawn_gib=_file_bytes(case) / GIB,
        )


def _file_bytes(case: Case) -> int:
    infos = DrawnWeights(case.config().model.dit_params, META).tensors.values()
    return sum(info.end - info.start for info in infos)


def _plan_part(case: Case) -> Planned:
    """The VAE or attention alone: counted on tensors without data, inputs and weights included."""
    with LiveBytes() as counted:
        workload = gpu_child.build(case, (), META)
        counted.peak = counted.live
        with FlopCounter() as flops:
            workload.run()
    if workload.beside is None:
        return Planned(gib=counted.peak / GIB, work=flops.total)
    # Without data the sparse attention is counted as if it were dense.
    sparse = flops.total - (1 - gpu_child.KEPT_SHARE) * flops.self_attention
    return Planned(gib=counted.peak / GIB, work=sparse, beside=flops.total)
