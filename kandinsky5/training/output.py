"""Saves LoRAs and states by step and epoch, at a stop and at the end."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from kandinsky5.configs.train import SavingConfig
from kandinsky5.training.effects import EffectReporter
from kandinsky5.training.result_writer import ResultWriter
from kandinsky5.training.results.names import ResultNames, Unit, average_path, expired
from kandinsky5.training.results.ownership import delete_result
from kandinsky5.training.results.state import TrainingState
from modules.errors import ResourceError
from modules.logs import get_logger

log = get_logger(__name__)


class Output:
    """Saves the results of one run, and deletes those that expire; on the main process."""

    def __init__(self, saving: SavingConfig, writer: ResultWriter, effects: EffectReporter) -> None:
        self._saving, self._writer, self._effects = saving, writer, effects
        self._names = ResultNames(saving.output_dir, saving.output_name)
        self._is_final_written = False

    def begin_branch(self, run: TrainingState) -> None:
        """Save the state that a run went back to first, so that `--resume auto` follows.

        At the end of a run the final files come first, as always.
        """
        log.info(
            "resuming at step %d abandons later states of %s: --resume auto now continues "
            "this run's states (branch %d)",
            run.step, run.output_name, run.branch,
        )  # fmt: skip
        if run.step < run.total_steps:
            self._writer.write_state(self._names.state("step", run.step), run)

    def save_due(self, run: TrainingState, ended_epoch: int | None, *, is_stopping: bool) -> None:
        """Save the files due after this step.

        Args:
            ended_epoch: the epoch that this step ended, if it did.
            is_stopping: the run is asked to stop: LoRA and state are saved whatever the options.
        """
        # The final files follow the last step, and would repeat those of the last epoch.
        epoch = None if run.step == run.total_steps else ended_epoch
        for unit, number in self._due(run.step, epoch):
            self._save(unit, number, run, with_state=self._saving.save_state, is_quick=is_stopping)
            self._delete_expired(unit, number)
        if is_stopping:
            self.save_stopped(run)

    def delete_expired(self, step: int, ended_epoch: int | None) -> None:
        """Repeat the deletions of the saves after this step: the process may have been killed before them."""
        for unit, number in self._due(step, ended_epoch) if step else ():
            self._delete_expired(unit, number)

    def save_step(self, run: TrainingState) -> None:
        """Save LoRA and state of this step at once, without what takes long and can wait."""
        self._save("step", run.step, run, with_state=True, is_quick=True)

    def save_stopped(self, run: TrainingState) -> None:
        """Save LoRA and state of a run that is asked to stop, unless this step's state has been written."""
        if self._writer.state_step != run.step:
            self.save_step(run)

    def save_final(self, run: TrainingState, *, is_stopping: bool) -> Path:
        """Save the files at the end of a run; one that is asked to stop leaves out what takes long."""
        with self._rescued(run):
            self._write_final_lora(run)
            if self._saving.save_state or self._saving.save_state_on_train_end:
                self._write_state(self._names.final_state, run)
        self._effects.report(self._names.final_lora, run.step, is_quick=is_stopping)
        return self._names.final_lora

    def _due(self, step: int, epoch: int | None) -> list[tuple[Unit, int]]:
        by_step, by_epoch = self._saving.save_every_n_steps, self._saving.save_every_n_epochs
        due: list[tuple[Unit, int]] = []
        if by_step and step % by_step == 0:
            due.append(("step", step))
        if epoch is not None and by_epoch and epoch % by_epoch == 0:
            due.append(("epoch", epoch))
        return due

    def _save(self, unit: Unit, number: int, run: TrainingState, *, with_state: bool, is_quick: bool) -> None:
        # The LoRA first: it is the smaller file and the one people want if the disk fills up.
        path = self._names.lora(unit, number)
        with self._rescued(run):
            self._writer.write_lora(path, run)
            if with_state:
                self._write_state(self._names.state(unit, number), run)
        self._effects.report(path, run.step, is_quick=is_quick)

    def _write_state(self, folder: Path, run: TrainingState) -> None:
        if run.step >= run.total_steps:
            # Such a state means that nothing is left to do, which must be true whenever it is on the disk.
            self._write_final_lora(run)
        self._writer.write_state(folder, run)

    def _write_final_lora(self, run: TrainingState) -> None:
        if not self._is_final_written:
            self._writer.write_lora(self._names.final_lora, run)
        self._is_final_written = True

    @contextmanager
    def _rescued(self, run: TrainingState) -> Iterator[None]:
        """When a result cannot be written, save LoRA and state to `--output_dir_fallback`, if there is one.

        Raises:
            ResourceError: in both cases, with the places of what was saved.
        """
        try:
            yield
        except ResourceError as error:
            folder = self._saving.output_dir_fallback
            if folder is None:
                raise
            names = ResultNames(folder, self._saving.output_name)
            lines = [*error.problems]
            for write, path in (
                (self._writer.write_lora, names.lora("step", run.step)),
                (self._writer.write_state, names.state("step", run.step)),
            ):
                try:
                    write(path, run)
                except ResourceError as second:
                    lines += second.problems
                else:
                    lines.append(f"--output_dir_fallback: saved {path}")
            raise ResourceError(lines) from error

    def _delete_expired(self, unit: Unit, number: int) -> None:
        saving, names = self._saving, self._names
        old = expired(saving, unit, number, state=False)
        old_state = expired(saving, unit, number, state=True) if saving.save_state else None
        lora = None if old is None else names.lora(unit, old)
        paths = [] if lora is None else [lora, average_path(lora)]
        paths += [] if old_state is None else [names.state(unit, old_state)]
        for path in paths:
            try:
                delete_result(path, names.output_name)
            except OSError as error:
                # Such as a file that is open in another program on Windows: no reason to end a run.
                log.warning("%s has expired and cannot be deleted: %s", path, error.strerror)
