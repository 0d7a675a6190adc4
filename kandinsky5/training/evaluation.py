"""Samples and validation between steps: they change no weights, and a stopped run defers them."""

from __future__ import annotations

from accelerate.utils import gather_object

from kandinsky5.training import samples as train_samples
from kandinsky5.training.control import TrainingControl
from kandinsky5.training.loading import TrainedModel
from kandinsky5.training.preparation import PreparedRun
from kandinsky5.training.progress import Progress
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.sample_files import SampleNames
from kandinsky5.training.samples import TrainingSamples
from kandinsky5.training.training_log import TrainingLog
from kandinsky5.training.validation.measure import Validation
from kandinsky5.training.validation.schedule import ValidationChecks, model_settings
from modules.dtypes import dtype_name


class Evaluation:
    """Makes the samples of a run on all processes, and measures its validation loss on the main one."""

    def __init__(
        self,
        run: PreparedRun,
        model: TrainedModel,
        progress: Progress,
        control: TrainingControl,
        run_log: TrainingLog,
    ) -> None:
        saving = run.config.saving
        self._config, self._accelerator, self._num_prompts = run.config, run.accelerator, run.num_prompts
        self._model, self._progress, self._control, self._run_log = model, progress, control, run_log
        self._validation = _validation_checks(run, model)
        names = SampleNames(saving.output_dir / "sample", saving.output_name, run.mark.session_id)
        self._samples = TrainingSamples(
            run.config, run.prompts, model.device, names, has_bar=run.accelerator.is_main_process
        )
        self.are_samples_requested = False
        """By the command `sample` in the control file, for the current step."""

    def are_samples_due(self) -> bool:
        """Whether samples of this step are requested, made or not."""
        progress = self._progress
        is_due = train_samples.is_due(self._config.samples, progress.step, progress.ended_epoch)
        return is_due or self.are_samples_requested

    def is_validation_due(self) -> bool:
        """Whether this step is to be validated and has not been; on the main process alone."""
        progress, metrics = self._progress, self._run_log.metrics
        return metrics is not None and self._validation.is_missed(
            progress.step, progress.ended_epoch, metrics, is_end=progress.is_done
        )

    def missing(self) -> list[str]:
        """Evaluations due after this step and not done yet, by name."""
        progress = self._progress
        lacks_samples = train_samples.are_missing(
            self._config, progress.step, progress.ended_epoch, self._num_prompts
        )
        missing = ["samples"] if lacks_samples else []
        return [*missing, "validation"] if self.is_validation_due() else missing

    def sample(self) -> None:
        """Make the samples of this step, each process those of its own prompts."""
        model, progress = self._model, self._progress
        with model.weights_in_use():
            samples = self._samples.make(
                model.dit, model.network, progress.step, progress.ended_epoch, self._control.is_stopping
            )
        if self._accelerator.num_processes > 1:
            samples = gather_object(samples)
        self._run_log.write_samples(samples)

    def validate(self) -> None:
        """Measure the validation loss of this step.

        Raises:
            ResourceError: device memory ran out.
        """
        metrics = self._run_log.metrics
        if metrics is not None:
            weights = self._model.weights_in_use()
            self._validation.run(self._progress.step, metrics, weights, self._control.is_stopping)


def _validation_checks(run: PreparedRun, model: TrainedModel) -> ValidationChecks:
    config, validation = run.config, None
    if run.validation_data is not None and run.accelerator.is_main_process:
        settings = model_settings(config, dtype_name(model.dtype))
        objective = model.objective(is_local=True)
        validation = Validation(run.validation_data, objective, model.network, model_settings=settings)
    names = ResultNames(config.saving.output_dir, config.saving.output_name)
    return ValidationChecks(config.data, validation, names)
