"""What a run writes: LoRA files with metadata, states, logs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch
from torch.optim.lr_scheduler import LRScheduler

from dataset.config.config import DatasetConfig
from kandinsky5.configs.train import TrainConfig
from kandinsky5.training.results.effect_report import EffectReport
from kandinsky5.training.results.hub import HubUploads
from kandinsky5.training.results.metadata import RunFacts, lora_metadata
from kandinsky5.training.results.names import OutputNames, Unit, average_path, effect_path, expired
from kandinsky5.training.results.ownership import delete_result
from kandinsky5.training.results.state import RunState, write_state
from kandinsky5.training.setup import has_schedule_state
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.tracking.trackers import Tracker
from kandinsky5.training.validation.prediction_change import PredictionProbe
from modules import files
from modules.dtypes import dtype_from_word
from modules.errors import DivergedError, ResourceError
from modules.files import write_text
from modules.logs import get_logger
from modules.optimizers import has_averages, set_averaging
from networks.lora import LoRANetwork
from networks.lora_effect import measure_effect
from networks.lora_files import save_lora
from networks.weight_average import WeightAverage

log = get_logger(__name__)


class Output:
    """Writes the results of one run, on its main process."""

    def __init__(
        self,
        config: TrainConfig,
        datasets: DatasetConfig,
        facts: RunFacts,
        network: LoRANetwork,
        optimizer: torch.optim.Optimizer,
        *,
        tracker_run: str,
        trackers: Sequence[Tracker],
        weight_norms: Mapping[str, float],
        average: WeightAverage | None,
        probe: PredictionProbe | None,
        uploads: HubUploads | None,
    ) -> None:
        self.facts = facts
        self.tracker_run = tracker_run
        self._trackers = trackers
        self.names = OutputNames(config.saving.output_dir, config.saving.output_name)
        self._config = config
        self._datasets = datasets
        self._network = network
        self._optimizer = optimizer
        self._weight_norms = weight_norms
        self._average = average
        self._probe = probe
        self._uploads = uploads
        self._metrics: Metrics | None = None
        self._is_final_written = False
        self._state_step: int | None = None
        """Of the last state that was written."""

    def begin_branch(self, run: RunState, schedule: LRScheduler | None) -> None:
        """Write where a run that has gone back starts, before all else, so that `--resume auto` follows it.

        At the end of a run the final files come first, as always.
        """
        log.info(
            "going back to step %d leaves later states of %s behind: from now on --resume auto goes on from "
            "what this run saves (branch %d)",
            run.step, run.output_name, run.branch,
        )  # fmt: skip
        if run.step < run.total_steps:
            self._put_state(self.names.state("step", run.step), run, schedule)

    def open_metrics(self, step: int) -> Metrics:
        """The log of a run that stands at `step`; files saved from now on are reported in it."""
        self._metrics = Metrics(
            self._config.saving.output_dir,
            self._config.saving.output_name,
            start_step=step,
            trackers=self._trackers,
        )
        return self._metrics

    def save_due(
        self,
        step: int,
        epoch: int | None,
        run: RunState,
        schedule: LRScheduler | None,
        *,
        is_end: bool,
        is_stopping: bool,
    ) -> None:
        """Save what the options ask for after this step.

        Args:
            epoch: the epoch that this step ended, if it did.
            is_end: the final files follow, which the last epoch's would repeat.
            is_stopping: the run is asked to stop: LoRA and state are saved whatever the options say.
        """
        saving = self._config.saving
        due = self._due(step, None if is_end else epoch)
        for unit, number in due:
            self._save(unit, number, run, schedule, with_state=saving.save_state, is_quick=is_stopping)
            self._delete_expired(unit, number)
        if is_stopping:
            self.save_stopped(run, schedule)

    def delete_expired(self, step: int, epoch: int | None) -> None:
        """Delete once more what the saves after this step had to: a kill may have come in between."""
        for unit, number in self._due(step, epoch) if step else ():
            self._delete_expired(unit, number)

    def _due(self, step: int, epoch: int | None) -> list[tuple[Unit, int]]:
        by_step, by_epoch = self._config.saving.save_every_n_steps, self._config.saving.save_every_n_epochs
        due: list[tuple[Unit, int]] = []
        if by_step and step % by_step == 0:
            due.append(("step", step))
        if epoch is not None and by_epoch and epoch % by_epoch == 0:
            due.append(("epoch", epoch))
        return due

    def save_all(self, unit: Unit, number: int, run: RunState, schedule: LRScheduler | None) -> None:
        """LoRA and state, for a run that may end here: what takes time and can wait is left out."""
        self._save(unit, number, run, schedule, with_state=True, is_quick=True)

    def save_stopped(self, run: RunState, schedule: LRScheduler | None) -> None:
        """LoRA and state of a run that is asked to stop, unless this step's state has been written."""
        if self._state_step != run.step:
            self.save_all("step", run.step, run, schedule)

    def save_final(self, run: RunState, schedule: LRScheduler | None, *, is_stopping: bool) -> Path:
        """The files at the end of a run; one that is asked to stop leaves out what takes time."""
        saving = self._config.saving
        with self._rescued(run, schedule):
            self._write_final_lora(run)
            if saving.save_state or saving.save_state_on_train_end:
                self._write_state(self.names.final_state, run, schedule)
        self._report_effects(self.names.final_lora, run.step, is_quick=is_stopping)
        return self.names.final_lora

    @contextmanager
    def averaged_weights(self) -> Iterator[None]:
        """Within the block the weights are those that are meant to be used, for schedule-free optimizers."""
        if not has_averages(self._optimizer):
            yield
            return
        trained = [parameter.detach().clone() for parameter in self._network.parameters()]
        set_averaging(self._optimizer, training=False)
        try:
            yield
        finally:
            set_averaging(self._optimizer, training=True)
            # There and back again rounds: a look at the average must not move the training.
            with torch.no_grad():
                for parameter, value in zip(self._network.parameters(), trained, strict=True):
                    parameter.copy_(value)

    def _save(
        self,
        unit: Unit,
        number: int,
        run: RunState,
        schedule: LRScheduler | None,
        *,
        with_state: bool,
        is_quick: bool = False,
    ) -> None:
        # The LoRA first: it is the smaller file and the one people want if the disk fills up.
        path = self.names.lora(unit, number)
        with self._rescued(run, schedule):
            self._write_lora(path, run)
            if with_state:
                self._write_state(self.names.state(unit, number), run, schedule)
        self._report_effects(path, run.step, is_quick=is_quick)

    @contextmanager
    def _rescued(self, run: RunState, schedule: LRScheduler | None) -> Iterator[None]:
        """When a result cannot be written, LoRA and state go to `--output_dir_fallback`, if there is one.

        Raises:
            ResourceError: in both cases, with where things are.
        """
        try:
            yield
        except ResourceError as error:
            folder = self._config.saving.output_dir_fallback
            if folder is None:
                raise
            names = OutputNames(folder, self._config.saving.output_name)
            lora, state = names.lora("step", run.step), names.state("step", run.step)
            lines = [*error.problems]
            for path, write in (
                (lora, lambda: self._write_lora(lora, run)),
                (state, lambda: self._put_state(state, run, schedule)),
            ):
                try:
                    write()
                except ResourceError as second:
                    lines += second.problems
                else:
                    lines.append(f"--output_dir_fallback: saved {path}")
            raise ResourceError(lines) from error

    def _delete_expired(self, unit: Unit, number: int) -> None:
        saving = self._config.saving
        old = expired(saving, unit, number, state=False)
        old_state = expired(saving, unit, number, state=True) if saving.save_state else None
        lora = None if old is None else self.names.lora(unit, old)
        doomed = [] if lora is None else [lora, average_path(lora)]
        doomed += [] if old_state is None else [self.names.state(unit, old_state)]
        for path in doomed:
            try:
                delete_result(path, self.names.output_name)
            except OSError as error:
                # Such as a file that is open in another program on Windows: no reason to end a run.
                log.warning("%s is old and cannot be deleted: %s", path, error.strerror)

    def _write_final_lora(self, run: RunState) -> None:
        if not self._is_final_written:
            self._write_lora(self.names.final_lora, run)
        self._is_final_written = True

    def _write_lora(self, path: Path, run: RunState) -> None:
        self._check_finite(path)
        saving = self._config.saving
        metadata = lora_metadata(
            self._config, self._datasets, self.facts, self._network, step=run.step, epoch=run.epoch
        )

        def save(target: Path, described: Mapping[str, str]) -> None:
            with disk_errors(target):
                save_lora(
                    self._network,
                    target,
                    lora_format=saving.lora_format,
                    save_precision=dtype_from_word(saving.save_precision),
                    metadata=described,
                )
            log.info("saved %s", target)
            if self._uploads is not None:
                self._uploads.add_lora(target)

        with self.averaged_weights():
            save(path, metadata)
        if self._average is not None:
            with self._average.in_place():
                save(average_path(path), {**metadata, "ss_ema_decay": f"{self._average.decay:g}"})

    def _report_effects(self, path: Path, step: int, *, is_quick: bool = False) -> None:
        """Say what the files do to the model, once they and the state are safe."""
        with self.averaged_weights():
            self._report(path, step, is_quick=is_quick)
        if self._average is not None:
            with self._average.in_place():
                self._report(average_path(path), step, is_quick=is_quick)

    def _report(self, path: Path, step: int, *, is_quick: bool) -> None:
        report = EffectReport(
            path.name,
            step,
            measure_effect(self._network, self._weight_norms),
            None if is_quick else self._prediction_change(),
            self._probe.bucket if self._probe is not None else "",
        )
        report.log()
        try:
            write_text(effect_path(path), report.text())
        except OSError as error:
            log.warning("%s is not written: %s", effect_path(path).name, error.strerror)
        if self._metrics is not None:
            self._metrics.write("lora", step, report.record())
            self._metrics.scalars(step, report.curves())

    def _prediction_change(self) -> Mapping[int, float] | None:
        try:
            return None if self._probe is None else self._probe.measure()
        except torch.OutOfMemoryError as error:
            log.warning("the change of the prediction is not measured: %s", str(error).splitlines()[0])
            return None

    def _write_state(self, folder: Path, run: RunState, schedule: LRScheduler | None) -> None:
        if run.step >= run.total_steps:
            # Such a state says that nothing is left to do, which must be true whenever it is on the disk.
            self._write_final_lora(run)
        self._put_state(folder, run, schedule)

    def _put_state(self, folder: Path, run: RunState, schedule: LRScheduler | None) -> None:
        keep_schedule = schedule is not None and has_schedule_state(self._config.optimizer)
        with disk_errors(folder):
            write_state(
                folder,
                run,
                self._network.state_dict(),
                self._optimizer.state_dict(),
                schedule.state_dict() if keep_schedule and schedule is not None else None,
                None if self._average is None else self._average.state_dict(),
            )
        self._state_step = run.step
        log.info("saved %s", folder)
        if self._uploads is not None:
            self._uploads.add_state(folder)

    def broken_weights(self) -> list[str]:
        """Names of trained tensors that hold a number which is not finite."""
        return [name for name, value in self._network.named_parameters() if not bool(value.isfinite().all())]

    def _check_finite(self, path: Path) -> None:
        """A weight that is not finite must not replace a good file."""
        bad = self.broken_weights()
        if bad:
            raise DivergedError(
                f"{len(bad)} trained tensors are not finite, first {bad[0]}: {path.name} is not written. "
                "Earlier files are as they were; continue with --resume auto and a lower --learning_rate."
            )


def disk_errors(path: Path) -> AbstractContextManager[None]:
    """Around the writing of a result: a disk that refuses is a ResourceError with what to do."""
    return files.disk_errors(path, "continue with --resume auto; earlier files are as they were")
