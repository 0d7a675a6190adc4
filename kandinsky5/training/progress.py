"""The progress of a run, and its record in a state directory."""

from __future__ import annotations

import math
from collections import deque
from dataclasses import dataclass, field

from kandinsky5.training.loading import TrainedModel
from kandinsky5.training.plan import TrainingLength, data_order_hash
from kandinsky5.training.preparation import PreparedRun
from kandinsky5.training.results.saved_config import shareable_options
from kandinsky5.training.results.state import SavedState, TrainingState
from kandinsky5.training.resume import library_versions, network_identity
from modules.optimizers import describe_optimizer
from networks.lora_saving import alpha_settings


@dataclass(slots=True)
class Progress:
    """Optimizer steps done and the losses of the last epoch's worth of them."""

    length: TrainingLength
    step: int = 0
    """Optimizer steps done, those that were skipped included."""
    skipped_in_a_row: int = 0
    recent_losses: deque[float] = field(default_factory=deque)

    @classmethod
    def at_start(cls, length: TrainingLength, saved: SavedState | None) -> Progress:
        """At the first step, or at that of a saved state."""
        recent = deque(saved.run.recent_losses if saved else (), maxlen=length.steps_per_epoch)
        if saved is None:
            return cls(length, recent_losses=recent)
        return cls(length, saved.run.step, saved.run.skipped_steps, recent)

    @property
    def is_done(self) -> bool:
        return self.step == self.length.total_steps

    @property
    def ended_epoch(self) -> int | None:
        """Number of the epoch that the last step ended, from 1; None within an epoch."""
        epoch, rest = divmod(self.step, self.length.steps_per_epoch)
        return None if rest or not epoch else epoch

    @property
    def mean_loss(self) -> float:
        """Of the last epoch's worth of steps; 0.0 before the first."""
        return sum(self.recent_losses) / max(1, len(self.recent_losses))

    def count_step(self, loss: float) -> None:
        """Count one optimizer step; a loss that is not finite stays out of the mean."""
        self.step += 1
        if math.isfinite(loss):
            self.recent_losses.append(loss)


def starting_state(run: PreparedRun, model: TrainedModel) -> TrainingState:
    """The record of a run at its first step; only step, skipped steps and losses change after it."""
    config, length = run.config, run.length
    return TrainingState(
        output_name=config.saving.output_name,
        task=config.model.task.name,
        seed=run.seed,
        step=0,
        total_steps=length.total_steps,
        steps_per_epoch=length.steps_per_epoch,
        gradient_accumulation_steps=length.gradient_accumulation_steps,
        num_processes=length.num_processes,
        data_order=data_order_hash(run.data),
        network=network_identity(model.network),
        lora_settings=alpha_settings(model.network),
        optimizer=describe_optimizer(model.optimizer, config.optimizer.optimizer_args),
        learning_rate=config.optimizer.learning_rate,
        session_id=run.mark.session_id,
        started_at=run.mark.started_at,
        ema_decay=config.network.ema_decay,
        tracker_run=run.mark.tracker_run,
        options=shareable_options(config),
        library_versions=library_versions(),
        contents=run.contents,
        weights=config.model.stored_as,
        branch=run.mark.branch,
    )
