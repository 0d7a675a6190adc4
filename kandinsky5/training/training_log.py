"""Reports of a running training: lines of metrics.jsonl, points of the curves, and the progress bar."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from dataset.cache.cached_dataset import CachedDataset
from kandinsky5.configs.train import SavingConfig
from kandinsky5.training.preparation import PreparedRun
from kandinsky5.training.progress import Progress
from kandinsky5.training.report.write import report_run
from kandinsky5.training.samples import KIND, Sample
from kandinsky5.training.step_bar import StepBar
from kandinsky5.training.step_values import StepMeter, StepReport, item_keys
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.tracking.trackers import ShownSample
from modules.logs import get_logger
from modules.messages import counted, duration_text

log = get_logger(__name__)

SHORTEST_ESTIMATE = 60.0
"""Seconds; a shorter rest of the run is not worth a line."""

_MAX_SKIPPED = 100
"""Names of skipped items that a line of metrics.jsonl holds for each dataset."""


def _dataset_records(data: CachedDataset, validation: CachedDataset | None) -> list[dict[str, Any]]:
    """What is trained and validated on, as parts of a line of metrics.jsonl; without folders and captions."""
    return [
        {
            "index": summary.index,
            "use": use,
            "content": summary.content,
            **{key: getattr(summary, key) for key in ("found", "used", "clips", "batches")},
            "num_skipped": len(summary.skipped),
            "skipped": [str(item) for item in summary.skipped[:_MAX_SKIPPED]],
            "buckets": dict(summary.buckets),
        }
        for use, part in (("training", data), ("validation", validation))
        if part is not None
        for summary in part.summaries
        if summary.clips or summary.skipped
    ]


class TrainingLog:
    """The log of a run; until it is opened, and on all but the main process, it writes nothing."""

    def __init__(self, run: PreparedRun, progress: Progress, device: torch.device) -> None:
        self._run, self._config, self._progress = run, run.config, progress
        self._meter = StepMeter(device)
        self._bar: StepBar | None = None
        self.metrics: Metrics | None = None

    def open(self, memory: Mapping[str, Any]) -> None:
        """Open metrics.jsonl, and drop lines of an abandoned part of the run after the current step.

        Args:
            memory: of the plan, for the report of the run.
        """
        saving = self._config.saving
        self.metrics = Metrics(
            saving.output_dir, saving.output_name, start_step=self._progress.step, trackers=self._run.trackers
        )
        datasets = _dataset_records(self._run.data, self._run.validation_data)
        self.metrics.write("start", self._progress.step, {"datasets": datasets, "memory": memory})

    def start_bar(self) -> None:
        """Show the progress bar."""
        if self.metrics is not None:
            self._bar = StepBar(self._progress.step, self._progress.length.total_steps)

    def paused_bar(self) -> AbstractContextManager[None]:
        """Saving, samples and validation within the block are no part of the time of a step."""
        return nullcontext() if self._bar is None else self._bar.paused()

    def begin_step(self) -> None:
        """Begin to measure a step; samples, validation and saving between steps are not in its time."""
        self._meter.start()

    def write_step(self, report: StepReport) -> None:
        """One optimizer step, which `progress` has counted."""
        progress, values = self._progress, report.values
        if self._bar is not None:
            self._log_estimate(self._bar.advance(progress.mean_loss))
        if self.metrics is None:
            return
        has_prior = self._config.loss.prior_loss_weight > 0
        record = {
            "epoch": report.plan.epoch + 1,
            "loss": values.loss,
            **({"prior_loss": values.prior_loss} if has_prior else {}),
            "avr_loss": progress.mean_loss,
            "lr": report.rates.get("lr/unet"),
            **{name: rate for name, rate in report.rates.items() if name.startswith("lr/d*lr/")},
            "grad_norm": values.grad_norm,
            "sigma": list(report.sigmas),
            "losses": list(values.clip_losses),
            "items": item_keys(report.plan),
            **self._meter.read(),
        }
        curves = {
            "loss/current": values.loss,
            "loss/average": progress.mean_loss,
            "grad_norm": values.grad_norm,
            **report.rates,
        }
        self.metrics.write("step", progress.step, record)
        prior = {"loss/prior": values.prior_loss} if has_prior else {}
        self.metrics.scalars(progress.step, {**curves, **prior})

    def _log_estimate(self, seconds: float | None) -> None:
        if seconds is None or seconds < SHORTEST_ESTIMATE:
            return
        left = self._progress.length.total_steps - self._progress.step
        log.info(
            "about %s for the remaining %s (%.2f s/step), without saving, samples and validation; %s",
            duration_text(seconds),
            counted(left, "step"),
            seconds / left,
            _lora_interval(self._config.saving),
        )

    def write_epoch(self, epoch: int) -> None:
        """The mean loss of the epoch that the last step ended."""
        if self.metrics is not None:
            loss = self._progress.mean_loss
            self.metrics.write("epoch", self._progress.step, {"epoch": epoch, "loss": loss})
            self.metrics.scalars(self._progress.step, {"loss/epoch": loss})

    def write_layer_norms(self, norms: Mapping[str, float]) -> None:
        """The numbers of `--scale_weight_norms` after the present step, if there are any."""
        if self.metrics is not None and norms:
            short = {name.partition("/")[2]: value for name, value in norms.items()}
            self.metrics.write("norms", self._progress.step, short)
            self.metrics.scalars(self._progress.step, norms)

    def write_samples(self, samples: Sequence[Sample]) -> None:
        """Samples in the order of their prompts, whichever process has made them."""
        if self.metrics is None:
            return
        folder, step = self._config.saving.output_dir / "sample", self._progress.step
        for sample in sorted(samples, key=lambda sample: sample.prompt_number):
            file = f"{folder.name}/{sample.file_name}"
            self.metrics.write(KIND, step, {"prompt": sample.prompt_number, "file": file})
            name = f"sample_{sample.prompt_number}"
            self.metrics.sample(step, ShownSample(name, folder / sample.file_name, sample.animation))

    def flush(self) -> None:
        """Write the curves to disk."""
        if self.metrics is not None:
            self.metrics.flush()

    def close(self, *, is_failed: bool) -> None:
        """Finish bar and curves, and write the report; `is_failed`: the run ends with an error."""
        if self._bar is not None:
            self._bar.close()
        if self.metrics is not None:
            self.metrics.close(is_failed=is_failed)
            report_run(self._config.saving)


def _lora_interval(saving: SavingConfig) -> str:
    intervals = [
        f"every {unit}" if number == 1 else f"every {number} {unit}s"
        for number, unit in ((saving.save_every_n_steps, "step"), (saving.save_every_n_epochs, "epoch"))
        if number
    ]
    return f"a LoRA {' and '.join([*intervals, 'at the end'])}"
