"""A dry build on the meta device, which finds invalid settings before a model is loaded.

The functions are those that build the run itself. Model and LoRA are on the meta device; the optimizer takes
one trial step with a few small parameters.
"""

from __future__ import annotations

import warnings

import torch
from torch import nn

from kandinsky5.configs.train import OptimizerConfig, TrainConfig
from kandinsky5.memory.activations import META
from kandinsky5.model import assembly
from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.training import setup as train_setup
from kandinsky5.training.results.state import SavedState
from kandinsky5.training.resume import restore
from modules.lr_schedules import check_schedule_lasts
from modules.optimizers import check_step
from networks.lora import LoRANetwork

_SMALL = 8
"""Side of the parameters of the trial step."""


def check_dry_build(
    config: TrainConfig, saved: SavedState | None, total_steps: int, device: torch.device | None
) -> None:
    """Build LoRA, optimizer and schedule as in the run, and take a trial step.

    Args:
        device: where the optimizer makes its trial step; None for no such step.
    Raises:
        ConfigError: invalid settings, or a LoRA or optimizer that differs from the state's.
        ModelFileError: `--base_weights`, `--network_weights` or a state that does not fit the model.
        ResourceError: a package is missing.
    """
    model, settings = config.model, config.optimizer
    assembly.read_base_weights(model)
    dit = build_meta_dit(model.dit_params, torch.bfloat16)
    network = assembly.build_network(
        config.network, dit, 0, allow_partial=model.lora_allow_partial, device=META
    )
    if device is not None:
        _check_step(settings, network, device)
    optimizer = train_setup.optimizer_for(settings, network)
    with warnings.catch_warnings():
        # That tensors without data take none, and that the schedule steps while the optimizer does not.
        warnings.simplefilter("ignore")
        schedule = restore(saved, settings, network, optimizer, total_steps)
        if schedule is not None and train_setup.has_schedule_state(settings):
            steps_done = saved.run.step if saved else 0
            check_schedule_lasts(
                schedule, settings.lr_scheduler_type, steps_done=steps_done, total_steps=total_steps
            )


def _check_step(settings: OptimizerConfig, network: LoRANetwork, device: torch.device) -> None:
    groups = []
    for group in network.parameter_groups(settings.learning_rate):
        shapes = {tuple(min(_SMALL, side) for side in parameter.shape) for parameter in group["params"]}
        small = [nn.Parameter(torch.zeros(shape, device=device)) for shape in sorted(shapes)]
        groups.append({**group, "params": small})
    check_step(settings.optimizer_type, groups, settings.learning_rate, settings.optimizer_args)
