"""The training loop: accumulate, clip, step, log, save, and stop cleanly.

One optimizer step needs one transfer from the device: its losses, its gradient norm and the requests to stop
travel together, after the backward passes and before the weights move. Several processes agree once more when
the step is done, so that all of them stop after the same one.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import replace

import torch
from torch import Tensor, nn

from dataset.cache.cached_dataset import CachedBatch
from kandinsky5.configs.train import TrainConfig
from kandinsky5.memory.advice import out_of_memory_message, out_of_memory_while_loading
from kandinsky5.memory.plan import largest_batch
from kandinsky5.training import memory as train_memory
from kandinsky5.training import probe as memory_probe
from kandinsky5.training.control import TrainingControl
from kandinsky5.training.effects import EffectReporter
from kandinsky5.training.evaluation import Evaluation
from kandinsky5.training.loading import load_trained_model
from kandinsky5.training.loss import prior
from kandinsky5.training.norm_limit import NormLimit
from kandinsky5.training.output import Output
from kandinsky5.training.plan import PlanSequence, StepPlan, batch_loader
from kandinsky5.training.preparation import PreparedRun, prepare_run
from kandinsky5.training.progress import Progress, starting_state
from kandinsky5.training.result_writer import ResultWriter
from kandinsky5.training.results.hub import HubUploads
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.state import TrainingState, how_to_continue
from kandinsky5.training.step_values import LocalLosses, LocalStep, StepReport, gather_step
from kandinsky5.training.training_log import TrainingLog
from kandinsky5.training.validation.prediction_change import PredictionChange
from modules.errors import DivergedError, ResourceError, UserError
from modules.interruption import StopRequest, exit_on_signal, graceful_stop, leave_at_once
from modules.logs import get_logger
from modules.optimizers import learning_rates

log = get_logger(__name__)

MAX_SKIPPED_IN_A_ROW = 10


def train(config: TrainConfig, stop: StopRequest) -> None:
    """Run one training from the first check to the last file.

    Args:
        stop: made when the program began, so that it knows its launcher.
    Raises:
        UserError: with the exit code of its kind; SystemExit with 128 + n after a signal.
    """
    with ExitStack() as held:
        with exit_on_signal():
            try:
                run = prepare_run(config, held, stop)
                trainer = None if run is None else Trainer(run, stop)
            except torch.OutOfMemoryError as error:
                raise ResourceError(out_of_memory_while_loading(error)) from error
        if run is None or trainer is None:
            return
        with graceful_stop(stop):
            try:
                trainer.run()
            finally:
                if run.uploads is not None:
                    _finish_uploads(run.uploads, stop, held)
    if stop.exit_code:
        raise SystemExit(stop.exit_code)


def _finish_uploads(uploads: HubUploads, stop: StopRequest, held: ExitStack) -> None:
    try:
        uploads.finish(is_failing=sys.exception() is not None)
    finally:
        # Only a run that is asked to stop leaves some behind; an error of the run must still be reported.
        if uploads.is_busy and not isinstance(sys.exception(), Exception):
            held.close()
            leave_at_once(stop.exit_code)


class Trainer:
    """A run with its model in memory. Methods that return a stop code: see `TrainingControl`."""

    def __init__(self, run: PreparedRun, stop: StopRequest) -> None:
        config, accelerator = run.config, run.accelerator
        self.config, self.accelerator, self.data, self.seed = config, accelerator, run.data, run.seed
        self.is_main = accelerator.is_main_process
        torch.backends.cuda.matmul.allow_tf32 = config.model.cuda_allow_tf32
        torch.backends.cudnn.benchmark = config.model.cuda_cudnn_benchmark
        self.progress = Progress.at_start(run.length, run.saved)
        self.planner = train_memory.planner_for(config, accelerator)
        if self.is_main:
            train_memory.warn_of_host_memory(self.planner, run.data, accelerator.device)
        self.model = model = load_trained_model(run)
        self.objective = model.objective()
        self.prior = prior.PriorPreservation(self.objective, model.network, config.loss.prior_loss_weight)
        self.norm_limit = NormLimit(model.network, config.network.scale_weight_norms, model.device)
        names = ResultNames(config.saving.output_dir, config.saving.output_name)
        makes_samples = config.samples.sample_prompts is not None
        self.control = TrainingControl(stop, names, accelerator, makes_samples=makes_samples)
        self.run_log = TrainingLog(run, self.progress, model.device)
        self.evaluation = Evaluation(run, model, self.progress, self.control, self.run_log)
        if self.is_main:
            change = PredictionChange(run.data, model.objective(is_local=True), model.network)
            effects = EffectReporter(model, change, self.run_log)
            self.output = Output(config.saving, ResultWriter(run, model), effects)
        self.starts_branch = run.saved is not None and run.mark.branch != run.saved.run.branch
        self.starting_state = starting_state(run, model)

    def run(self) -> None:
        """Train to the last step, or until asked to stop."""
        if self.is_main:
            if self.starts_branch:
                self.output.begin_branch(self.run_state())
            self.run_log.open(train_memory.memory_record(self.planner, self.data, self.model.device))
            self.output.delete_expired(self.progress.step, self.progress.ended_epoch)
        length, index, start = self.progress.length, self.accelerator.process_index, self.progress.step
        plans = PlanSequence(self.data, length, index)
        workers = self.config.data.max_data_loader_n_workers
        batches = batch_loader(self.data, length, index, start_step=start, num_workers=workers)
        self.run_log.start_bar()
        try:
            self._probe_memory()
            self._run_steps(plans, batches)
        except torch.OutOfMemoryError as error:
            step_plans = [micro.plan for micro in plans.step(self.progress.step).micro_batches]
            batch = largest_batch(self.data, step_plans, self.planner.text_tokens)
            where = f"step {self.progress.step + 1}"
            saving = self.config.saving
            then = f"Then {how_to_continue(saving.output_dir, saving.output_name)}."
            message = out_of_memory_message(self.planner, batch, where, error)
            raise ResourceError(f"{message}\n{then}") from error
        finally:
            batches.close()
            self.run_log.close(is_failed=sys.exception() is not None)

    def _probe_memory(self) -> None:
        if memory_probe.is_due(self.config.run, self.model.device):
            local = self.model.objective(is_local=True)
            with self.accelerator.no_sync(self.model.runner):
                result = memory_probe.probe(
                    self.planner, local, self.model.network, self.data, self.progress.step
                )
            if self.is_main:
                log.info("%s", result)

    def _run_steps(self, plans: PlanSequence, batches: Iterator[CachedBatch]) -> None:
        stop_code = self._catch_up_on_resume()
        for plan in plans.steps(self.progress.step) if not stop_code else ():
            stop_code = self.train_step(plan, batches)
            with self.run_log.paused_bar():
                stop_code = self.after_step(stop_code)
            if stop_code:
                break
        if self.progress.is_done:
            stop_code = self.finish(stop_code)
        self.control.exit_with(stop_code)

    def train_step(self, plan: StepPlan, batches: Iterator[CachedBatch]) -> int:
        """One optimizer step; returns the stop code of all processes."""
        self.run_log.begin_step()
        losses = self.accumulate(plan, batches)
        grad_norm = self.clip_gradients()
        word = self.control.take_word()
        local = LocalStep(
            losses=losses,
            grad_norm=grad_norm,
            stop_code=self.control.stop_code(),
            wants_samples=word == "sample",
            layer_norms=self.norm_limit.waiting,
        )
        values = gather_step(local, self.accelerator)
        self.evaluation.are_samples_requested = values.wants_samples
        self.run_log.write_layer_norms(self.norm_limit.take(values.layer_norms))
        report = StepReport(plan, values, losses.sigmas, learning_rates(self.model.optimizer))
        if values.is_finite:
            self.update()
        else:
            self._skip_or_raise(report)
        self.progress.count_step(values.loss)
        self.run_log.write_step(report)
        if word == "save":
            self.output.save_step(self.run_state())
        return values.stop_code

    def accumulate(self, plan: StepPlan, batches: Iterator[CachedBatch]) -> LocalLosses:
        """Forward and backward passes of all micro-batches."""
        totals = torch.zeros(2, device=self.model.device)
        clip_losses, sigmas = [totals[:0]], list[float]()
        for micro in plan.micro_batches:
            batch = next(batches)
            draw = self.objective.draw(batch, plan.step)
            of_batch = torch.zeros(len(batch.item_keys), device=self.model.device)
            for is_prior in (passes := prior.passes(batch)):
                losses = self.prior.losses if is_prior else self.objective.training_losses
                key = (plan.step, micro.position, *([1] if is_prior else []))
                self.model.network.set_step_seed(self.seed, *key)
                # Gradients are exchanged once per step, after its last pass.
                is_last = micro.is_last and is_prior == passes[-1]
                with nullcontext() if is_last else self.accelerator.no_sync(self.model.runner):
                    per_clip = losses(batch, draw)
                    share = per_clip.sum() / plan.num_items * (0.0 if micro.is_filler else 1.0)
                    # Processes average their gradients, the objective sums over their clips.
                    (share * self.accelerator.num_processes).backward()
                totals += torch.stack([share.detach(), share.detach() * is_prior])
                of_batch += per_clip.detach()
            if not micro.is_filler:
                clip_losses.append(of_batch)
                sigmas += draw.sigma.tolist()
        return LocalLosses(totals, torch.cat(clip_losses), sigmas)

    def clip_gradients(self) -> Tensor:
        """Limit the norm of the gradients to `--max_grad_norm`; returns the norm before, [] on the device."""
        limit = self.config.optimizer.max_grad_norm
        parameters = [p for p in self.model.network.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)

    def update(self) -> None:
        """Step the optimizer, then the schedule, the norm limit and the average."""
        self.model.optimizer.step()
        self.progress.skipped_in_a_row = 0
        self._end_update()
        self.norm_limit.apply()
        if self.model.average is not None:
            self.model.average.update(self.progress.step + 1)

    def _end_update(self) -> None:
        if self.model.schedule is not None:
            self.model.schedule.step()
        self.model.optimizer.zero_grad(set_to_none=True)

    def _skip_or_raise(self, report: StepReport) -> None:
        """A number is not finite: the weights have not moved, and do not move in this step."""
        self.progress.skipped_in_a_row += 1
        self.model.optimizer.zero_grad(set_to_none=True)
        if self.config.run.on_nan == "skip" and self.progress.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            log.warning("%s: skipped", report.describe())
            self._end_update()
            return
        broken = self.model.non_finite_weights()
        if broken:
            kept = f"the weights before it were already not finite, first {broken[0]}"
        else:
            kept = f"the weights before it were saved as step {self.progress.step}"
        if self.is_main and not broken:
            self.output.save_step(self.run_state())
        if self.accelerator.num_processes > 1:
            # A launcher ends the others as soon as one has failed, so all wait for the files.
            self.accelerator.wait_for_everyone()
        raise DivergedError(
            f"training diverged at {report.describe()};\n{kept}. Look at the named items, or lower "
            "--learning_rate; --on_nan skip skips such steps."
        )

    def after_step(self, stop_code: int) -> int:
        """Save on the main process, then sample and validate; returns the stop code by now."""
        progress = self.progress
        if stop_code or progress.is_done:  # no next step will bring them
            self.run_log.write_layer_norms(self.norm_limit.take(self.norm_limit.waiting.tolist()))
        if self.is_main:
            if progress.ended_epoch is not None:
                self.run_log.write_epoch(progress.ended_epoch)
            self.output.save_due(self.run_state(), progress.ended_epoch, is_stopping=stop_code != 0)
        if progress.is_done:  # the final files come before what can fail
            return stop_code
        return self._sample_and_validate(stop_code)

    def finish(self, stop_code: int) -> int:
        """Save the final files, then sample and validate; returns the stop code by now."""
        if self.is_main:
            is_stopping = stop_code != 0 or self.control.is_stopping()
            path = self.output.save_final(self.run_state(), is_stopping=is_stopping)
            log.info("all %d steps are done: %s", self.progress.step, path)
        stop_code = self._sample_and_validate(stop_code)
        self.run_log.flush()
        return stop_code

    def _catch_up_on_resume(self) -> int:
        """Before the first step: samples of the bare model, or what a stopped run left undone."""
        if self.progress.is_done:  # after the final files
            return 0
        is_fresh = self.progress.step == 0 and not self.evaluation.are_samples_due()
        return 0 if is_fresh else self._sample_and_validate(0)

    def _sample_and_validate(self, stop_code: int) -> int:
        """What is due after this step and moves no weight: samples on all processes, validation on one.

        A run that is asked to stop leaves it to the resumed run, and saves LoRA and state.
        """
        control, evaluation = self.control, self.evaluation
        if evaluation.are_samples_due():
            stop_code = control.agree(stop_code or control.stop_code())
            if not stop_code:
                evaluation.sample()
        stop_code = stop_code or control.stop_code()
        if not stop_code and evaluation.is_validation_due():
            try:
                evaluation.validate()
            except UserError:
                self.output.save_stopped(self.run_state())
                raise
        stop_code = control.agree(stop_code or control.stop_code())
        if stop_code and self.is_main:
            self._save_stopped()
        if stop_code:
            # A launcher ends the others as soon as one has exited: all wait for the files.
            control.agree(stop_code)
        return stop_code

    def _save_stopped(self) -> None:
        """Save what a resumed run needs, and log what it will catch up on."""
        step = self.progress.step
        if not step:
            log.info("stopping before the first step as requested")
            return
        self.output.save_stopped(self.run_state())
        missing = self.evaluation.missing()
        log.info(
            "stopping after step %d of %d as requested; --resume auto continues from there%s",
            step, self.progress.length.total_steps, f" with its {' and '.join(missing)}" if missing else "",
        )  # fmt: skip

    def run_state(self) -> TrainingState:
        """The present position of the run, for a state directory."""
        return replace(
            self.starting_state,
            step=self.progress.step,
            skipped_steps=self.progress.skipped_in_a_row,
            recent_losses=tuple(self.progress.recent_losses),
        )
