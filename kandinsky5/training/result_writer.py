"""Writes single results of a run: a LoRA with its metadata, and a state directory."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from kandinsky5.training.loading import TrainedModel
from kandinsky5.training.preparation import PreparedRun
from kandinsky5.training.results.metadata import LoraFacts, lora_metadata
from kandinsky5.training.results.names import average_path
from kandinsky5.training.results.state import TrainingState, how_to_continue, write_state
from kandinsky5.training.setup import has_schedule_state, schedule_settings
from modules.dtypes import dtype_from_word, dtype_name
from modules.errors import DivergedError
from modules.files import disk_errors
from modules.logs import get_logger
from modules.optimizers import describe_optimizer
from networks.lora_saving import save_lora

log = get_logger(__name__)


class ResultWriter:
    """Writes LoRAs and states under given names, and hands them to the uploads; on the main process."""

    def __init__(self, run: PreparedRun, model: TrainedModel) -> None:
        self._config, self._datasets, self._uploads = run.config, run.datasets, run.uploads
        self._model = model
        self._facts = _run_facts(run, model)
        self.state_step: int | None = None
        """Step of the last state that was written."""

    def write_lora(self, path: Path, run: TrainingState) -> None:
        """Write a LoRA, and beside it the average of `--ema_decay`.

        Raises:
            DivergedError: a weight is not finite; the file of that name stays as it was.
            ResourceError: the disk refuses.
        """
        model = self._model
        self._check_finite(path)
        metadata = lora_metadata(
            self._config, self._datasets, self._facts, model.network, step=run.step, epoch=run.epoch
        )
        with model.weights_in_use():
            self._save_lora(path, metadata)
        if model.average is not None:
            with model.average.in_place():
                decay = f"{model.average.decay:g}"
                self._save_lora(average_path(path), {**metadata, "ss_ema_decay": decay})

    def write_state(self, folder: Path, run: TrainingState) -> None:
        """Write a state directory.

        Raises:
            ResourceError: the disk refuses.
        """
        model = self._model
        keeps_schedule = model.schedule is not None and has_schedule_state(self._config.optimizer)
        with disk_errors(folder, self._hint):
            write_state(
                folder,
                run,
                model.network.state_dict(),
                model.optimizer.state_dict(),
                model.schedule.state_dict() if keeps_schedule and model.schedule is not None else None,
                None if model.average is None else model.average.state_dict(),
            )
        self.state_step = run.step
        log.info("saved %s", folder)
        if self._uploads is not None:
            self._uploads.add_state(folder)

    def _save_lora(self, path: Path, metadata: Mapping[str, str]) -> None:
        saving = self._config.saving
        with disk_errors(path, self._hint):
            save_lora(
                self._model.network,
                path,
                lora_format=saving.lora_format,
                save_precision=dtype_from_word(saving.save_precision),
                metadata=metadata,
            )
        log.info("saved %s", path)
        if self._uploads is not None:
            self._uploads.add_lora(path)

    @property
    def _hint(self) -> str:
        return how_to_continue(self._config.saving.output_dir, self._config.saving.output_name)

    def _check_finite(self, path: Path) -> None:
        """A weight that is not finite must not replace a good file."""
        bad = self._model.non_finite_weights()
        if bad:
            raise DivergedError(
                f"{len(bad)} trained tensors are not finite, first {bad[0]}: {path.name} is not written. "
                f"Lower --learning_rate and {self._hint}."
            )


def _run_facts(run: PreparedRun, model: TrainedModel) -> LoraFacts:
    optimizer, length = run.config.optimizer, run.length
    precision = dtype_name(model.dtype)
    return LoraFacts(
        session_id=run.mark.session_id,
        started_at=run.mark.started_at,
        seed=run.seed,
        num_items=run.data.num_items,
        num_batches=length.batches_per_epoch,
        num_epochs=length.num_epochs,
        total_steps=length.total_steps,
        warmup_steps=schedule_settings(optimizer, length.total_steps).warmup_steps,
        optimizer=describe_optimizer(model.optimizer, optimizer.optimizer_args),
        mixed_precision={"bfloat16": "bf16", "float32": "no"}.get(precision, precision),
    )
