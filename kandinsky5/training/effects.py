"""Reports the effect of every saved LoRA on the model: in the log, in the curves and in a text file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from kandinsky5.training.loading import TrainedModel
from kandinsky5.training.results.effect_report import EffectReport
from kandinsky5.training.results.names import average_path, effect_path
from kandinsky5.training.training_log import TrainingLog
from kandinsky5.training.validation.prediction_change import PredictionChange
from modules.files import write_text
from modules.logs import get_logger
from networks.lora_effect import measure_effect

log = get_logger(__name__)


class EffectReporter:
    """Measures saved weights and writes the reports; on the main process."""

    def __init__(self, model: TrainedModel, prediction: PredictionChange, run_log: TrainingLog) -> None:
        self._model, self._prediction, self._run_log = model, prediction, run_log

    def report(self, lora: Path, step: int, *, is_quick: bool) -> None:
        """Report on a LoRA that was saved after `step`, and on its average.

        Args:
            is_quick: leave out the prediction, which needs forward passes.
        """
        with self._model.weights_in_use():
            self._report(lora, step, is_quick=is_quick)
        if self._model.average is not None:
            with self._model.average.in_place():
                self._report(average_path(lora), step, is_quick=is_quick)

    def _report(self, path: Path, step: int, *, is_quick: bool) -> None:
        report = EffectReport(
            path.name,
            step,
            measure_effect(self._model.network, self._model.base_norms),
            None if is_quick else self._measure_prediction(),
            self._prediction.bucket,
        )
        report.log()
        try:
            write_text(effect_path(path), report.text())
        except OSError as error:
            log.warning("%s is not written: %s", effect_path(path).name, error.strerror)
        metrics = self._run_log.metrics
        if metrics is not None:
            metrics.write("lora", step, report.record())
            metrics.scalars(step, report.curves())

    def _measure_prediction(self) -> Mapping[int, float] | None:
        try:
            return self._prediction.measure()
        except torch.OutOfMemoryError as error:
            log.warning("the change of the prediction is not measured: %s", str(error).splitlines()[0])
            return None
