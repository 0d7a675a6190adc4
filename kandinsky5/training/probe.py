"""A trial step of the largest batch before training, to run out of memory at once and not after hours.

The weights do not move: there is a forward and a backward pass and no optimizer step, gradients are thrown
away, and no random stream is read, so that a run with the probe and one without end in the same bytes.
"""

from __future__ import annotations

import torch

from dataset.cache.cached_dataset import BatchPlan, CachedDataset
from kandinsky5.configs.train import RunConfig
from kandinsky5.memory.activations import BatchShape
from kandinsky5.memory.advice import out_of_memory_message
from kandinsky5.memory.plan import TrainingPlanner, batch_elements, batch_of
from kandinsky5.training.loss.objective import Objective
from modules.byte_sizes import size_text
from modules.devices import empty_device_cache
from modules.errors import ResourceError
from networks.lora import LoRANetwork


def is_due(config: RunConfig, device: torch.device) -> bool:
    """Whether the first step is preceded by a probe: on CUDA, unless `--no_probe` is given."""
    return device.type == "cuda" and not config.no_probe


def probe(
    planner: TrainingPlanner, objective: Objective, network: LoRANetwork, data: CachedDataset, step: int
) -> str:
    """Run the largest batch of an epoch forward and backward; returns one line on its peak.

    Args:
        objective: around the bare network, so that no other process waits for this one's gradients.
        network: has no gradients before, and none afterwards.
        step: the next one, whose sigmas are used.
    Raises:
        ResourceError: device memory ran out; the message lists sizes and options that help.
    """
    device = objective.device
    plan = largest_plan(data)
    batch = batch_of(data, plan, planner.text_tokens)
    is_cuda = device.type == "cuda"
    if is_cuda:
        torch.cuda.reset_peak_memory_stats(device)
    dit = objective.model.dit
    observer, dit.nabla_observer = dit.nabla_observer, None
    try:
        loaded = data.load_batch(plan)
        objective.training_losses(loaded, objective.draw(loaded, step)).sum().backward()
    except torch.OutOfMemoryError as error:
        message = out_of_memory_message(planner, batch, "the probe before the first step", error)
        raise ResourceError(message) from error
    finally:
        dit.nabla_observer = observer
        for parameter in network.parameters():
            parameter.grad = None
    measured = torch.cuda.max_memory_allocated(device) if is_cuda else None
    empty_device_cache(device)
    return _result(planner, batch, measured)


def largest_plan(data: CachedDataset) -> BatchPlan:
    """The batch of the first epoch that needs most memory."""
    return max(data.epoch_batches(1), key=lambda plan: batch_elements(batch_of(data, plan, 0)))


def _result(planner: TrainingPlanner, batch: BatchShape, measured: int | None) -> str:
    plan = planner.plan(planner.given, batch)
    optimizer = plan.usage.device["optimizer"]
    predicted = plan.peak - optimizer
    words = (
        f"probe of {batch.clips} x {batch.size}: {size_text(predicted)} predicted "
        f"(and {size_text(optimizer)} once the optimizer has its state)"
    )
    if measured is None:
        return f"{words}; this device does not report its peak"
    return f"{words}, {size_text(measured)} measured, {measured / predicted:.0%} of it"
