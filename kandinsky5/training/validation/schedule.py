"""Schedules validation and reports its results: metrics.jsonl, curves, plot and log."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch

from kandinsky5.configs.train import DataConfig, SavingConfig, TrainConfig
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.state import how_to_continue
from kandinsky5.training.tracking.metrics import FILE_NAME, Metrics, read_records
from kandinsky5.training.validation.measure import Validation
from kandinsky5.training.validation.plot import write_validation_plot
from modules.errors import ResourceError
from modules.interruption import Interrupted
from modules.logs import get_logger

log = get_logger(__name__)

KIND = "validation"
"""Of the lines in metrics.jsonl."""


def model_settings(config: TrainConfig, dtype: str) -> str:
    """The settings that determine the base model's output, without device and memory options."""
    model = config.model
    size = model.dit.stat().st_size if model.dit.is_file() else None
    settings = [
        *(model.task.name, model.dit.name, size, asdict(model.dit_params)),
        *(None if model.nabla is None else asdict(model.nabla), model.storage_form, dtype),
        *([path.name for path in model.base_weights], model.base_weights_multiplier),
        asdict(config.conditioning),
    ]
    return json.dumps(settings, default=str, sort_keys=True)


def was_measured(saving: SavingConfig, step: int) -> bool:
    """Whether a check after `step` is on record."""
    records = read_records(saving.output_dir / FILE_NAME, saving.output_name, KIND)
    return any(record["step"] == step for record in records)


class ValidationChecks:
    """The checks of one run, on its main process; none at all without a dataset to measure."""

    def __init__(self, config: DataConfig, validation: Validation | None, names: ResultNames) -> None:
        self._config, self._validation, self._names = config, validation, names
        self._has_begun = False

    def is_due(self, step: int, ended_epoch: int | None, *, is_end: bool) -> bool:
        """Whether the options ask for a check after `step`, which ended an epoch if that is given."""
        if self._validation is None:
            return False
        by_step, by_epoch = self._config.validate_every_n_steps, self._config.validate_every_n_epochs
        due_by_step = by_step is not None and step % by_step == 0
        due_by_epoch = by_epoch is not None and ended_epoch is not None and ended_epoch % by_epoch == 0
        return due_by_step or due_by_epoch or is_end

    def is_missed(self, step: int, ended_epoch: int | None, metrics: Metrics, *, is_end: bool) -> bool:
        """Whether the check that is due after `step` has not been made."""
        if step == 0 or not self.is_due(step, ended_epoch, is_end=is_end):
            return False
        return all(record["step"] != step for record in metrics.records(KIND))

    def run(
        self,
        step: int,
        metrics: Metrics,
        weights_in_use: AbstractContextManager[None],
        should_stop: Callable[[], bool],
    ) -> None:
        """Measure and log; a run that is asked to stop drops the check, and is resumed with it.

        Args:
            weights_in_use: context in which the network has the weights for use.
            should_stop: called before every forward pass.
        """
        if self._validation is None:
            return
        if not self._has_begun:
            self._validation.reuse_base(metrics.records(KIND))
            self._has_begun = True
        try:
            with weights_in_use:
                values = self._validation.measure(should_stop)
        except Interrupted:
            return
        except torch.OutOfMemoryError as error:
            raise ResourceError(
                f"out of device memory while validating after step {step}: {str(error).splitlines()[0]}\n"
                "Validate on smaller or shorter clips, in smaller batches, or not at all; then "
                f"{how_to_continue(self._names.output_dir, self._names.output_name)}."
            ) from error
        metrics.write(KIND, step, values)
        metrics.scalars(step, _curves(values))
        parts = [f"{part['from']}-{part['to']} {_change(part):+.2%}" for part in values["timesteps"]]
        log.info(
            "step %d: validation loss %.5f with the LoRA, %.5f without (%s); by timestep %s",
            step, values["loss"], values["base_loss"], f"{_change(values):+.2%}", ", ".join(parts),
        )  # fmt: skip
        metrics.draw(self._names.validation_plot, KIND, write_validation_plot)


def _change(values: Mapping[str, Any]) -> float:
    """What the LoRA does to a loss, as a share of the base model's."""
    return values["loss"] / values["base_loss"] - 1.0 if values["base_loss"] else 0.0


def _curves(values: Mapping[str, Any]) -> dict[str, float]:
    curves = {"loss/validation": values["loss"], "loss/validation_base": values["base_loss"]}
    parts = {f"timestep_{part['from']}_{part['to']}": part for part in values["timesteps"]}
    parts |= {f"bucket_{part['bucket']}": part for part in values["buckets"]}
    for name, part in parts.items():
        curves[f"validation/{name}"] = part["loss"]
        curves[f"validation_base/{name}"] = part["base_loss"]
    return curves
