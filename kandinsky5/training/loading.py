"""Loads the frozen model, its LoRA, the optimizer and the schedule, on their device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from torch.optim.lr_scheduler import LRScheduler

from kandinsky5.configs.train import TrainConfig
from kandinsky5.model import assembly
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.training import setup as train_setup
from kandinsky5.training.loss.objective import Objective
from kandinsky5.training.preparation import PreparedRun
from kandinsky5.training.resume import restore, resume_average
from modules.optimizers import has_averages, set_averaging
from networks.lora import LoRANetwork
from networks.lora_effect import weight_norms
from networks.weight_average import WeightAverage


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainedModel:
    """The frozen model, its LoRA, the optimizer and the schedule."""

    config: TrainConfig
    seed: int
    device: torch.device
    dtype: torch.dtype
    """In which the frozen model computes."""
    dit: DiffusionTransformer3D
    network: LoRANetwork
    runner: nn.Module
    """The network as accelerate wraps it, which exchanges gradients between processes."""
    optimizer: torch.optim.Optimizer
    schedule: LRScheduler | None
    average: WeightAverage | None
    """Of `--ema_decay`, on the main process."""
    base_norms: Mapping[str, float]
    """Norms of the frozen weights under each adapter, on the main process."""

    def objective(self, *, is_local: bool = False) -> Objective:
        """The losses of this model.

        Args:
            is_local: around the bare network, for work in which other processes take no part.
        """
        model = self.config.model
        runner = self.network if is_local else self.runner
        return Objective(
            VelocityModel(self.dit, model.task.scale_factor, model.nabla, runner),
            self.config.timesteps,
            self.config.conditioning,
            model.task.is_i2v,
            self.seed,
            self.device,
            self.config.loss,
        )

    @contextmanager
    def weights_in_use(self) -> Iterator[None]:
        """Within the block the network has the weights for use, which schedule-free optimizers average."""
        if not has_averages(self.optimizer):
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.network.parameters()]
        set_averaging(self.optimizer, training=False)
        try:
            yield
        finally:
            set_averaging(self.optimizer, training=True)
            # There and back again rounds: a look at the average must not move the training.
            with torch.no_grad():
                for parameter, value in zip(self.network.parameters(), trained, strict=True):
                    parameter.copy_(value)

    def non_finite_weights(self) -> list[str]:
        """Names of trained tensors with a number that is not finite."""
        return [name for name, value in self.network.named_parameters() if not bool(value.isfinite().all())]


def load_trained_model(run: PreparedRun) -> TrainedModel:
    """Load the frozen model, and build or resume the trained parts.

    Raises:
        ModelFileError, ConfigError: see `assembly` and `restore`.
    """
    config, accelerator = run.config, run.accelerator
    device = accelerator.device
    dtype = train_setup.training_dtype(config.model, device)
    dit = assembly.load_model(config.model, device, dtype)
    network = assembly.build_network(
        config.network, dit, run.seed, allow_partial=config.model.lora_allow_partial
    )
    network.train()
    # Before blocks stream: their weights then lie elsewhere. Only the main process reports.
    base_norms = weight_norms(network, device) if accelerator.is_main_process else {}
    # Only the LoRA is handed to accelerate: the frozen model is neither wrapped, nor copied, nor saved.
    runner: nn.Module = accelerator.prepare(network)
    assembly.finish_model(config.model, dit, device)
    optimizer = train_setup.optimizer_for(config.optimizer, network)
    schedule = restore(run.saved, config.optimizer, network, optimizer, run.length.total_steps)
    set_averaging(optimizer, training=True)
    average = None
    if accelerator.is_main_process:
        average = resume_average(run.saved, network, config.network.ema_decay)
    return TrainedModel(
        config=config,
        seed=run.seed,
        device=device,
        dtype=dtype,
        dit=dit,
        network=network,
        runner=runner,
        optimizer=optimizer,
        schedule=schedule,
        average=average,
        base_norms=base_norms,
    )
