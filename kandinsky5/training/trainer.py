"""The training loop: accumulate, clip, step, log, save, and stop in good order.

One optimizer step needs one transfer from the device: its loss, its gradient norm and whether anybody asks to
stop travel together, after the backward passes and before the weights move. Several processes agree once more
when the step is done, so that all of them stop after the same one.
"""

from __future__ import annotations

import math
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, nullcontext

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm import tqdm

from dataset.cache.cached_dataset import CachedBatch, CachedDataset
from kandinsky5.configs.train import TrainConfig
from kandinsky5.memory.advice import out_of_memory_message, out_of_memory_while_loading
from kandinsky5.memory.plan import largest_batch
from kandinsky5.model import assembly
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.training import memory as train_memory
from kandinsky5.training import samples as train_samples
from kandinsky5.training import setup as train_setup
from kandinsky5.training.control_file import is_stop_written, take_control_word
from kandinsky5.training.loss import prior
from kandinsky5.training.loss.objective import Objective
from kandinsky5.training.norm_limit import NormLimit
from kandinsky5.training.output import Output
from kandinsky5.training.plan import (
    PlanSequence,
    StepPlan,
    batch_loader,
    data_order_hash,
)
from kandinsky5.training.preparation import PreparedRun, prepare_run
from kandinsky5.training.probe import probe
from kandinsky5.training.results.hub import HubUploads
from kandinsky5.training.results.metadata import RunFacts
from kandinsky5.training.results.names import OutputNames
from kandinsky5.training.results.saved_config import shareable_options
from kandinsky5.training.results.state import RunState
from kandinsky5.training.resume import (
    library_versions,
    network_identity,
    restore,
    resume_average,
)
from kandinsky5.training.sample_files import SampleNames
from kandinsky5.training.samples import TrainingSamples
from kandinsky5.training.step_log import item_keys, log_norms, log_samples, log_step
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.validation.measure import Validation
from kandinsky5.training.validation.prediction_change import PredictionProbe
from kandinsky5.training.validation.schedule import ValidationChecks, model_settings
from modules.dtypes import dtype_name
from modules.errors import DivergedError, ResourceError, UserError
from modules.interruption import StopRequest, exit_on_signal, graceful_stop, leave_at_once
from modules.logs import get_logger
from modules.optimizers import describe_optimizer, learning_rates, set_averaging
from networks.lora import LoRANetwork
from networks.lora_effect import weight_norms

log = get_logger(__name__)

MAX_SKIPPED_IN_A_ROW = 10
_STOP_WORD_CODE = 1
"""Beside 128 + n for signals: the control file asked to stop."""


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
                trainer = None if run is None else Trainer(run)
            except torch.OutOfMemoryError as error:
                raise ResourceError(out_of_memory_while_loading(error)) from error
        if run is None or trainer is None:
            return
        with graceful_stop(stop):
            try:
                trainer.run(stop)
            finally:
                if run.uploads is not None:
                    _finish_uploads(run.uploads, stop, held)
    if stop.exit_code:
        raise SystemExit(stop.exit_code)


def _finish_uploads(uploads: HubUploads, stop: StopRequest, held: ExitStack) -> None:
    try:
        uploads.finish(is_failing=sys.exception() is not None)
    finally:
        # Only a run that is asked to stop leaves some behind; an error of it is still to be said.
        if uploads.is_busy and not isinstance(sys.exception(), Exception):
            held.close()
            leave_at_once(stop.exit_code)


class Trainer:
    """A run with everything it needs in memory."""

    def __init__(self, run: PreparedRun) -> None:
        config, accelerator, length, saved = run.config, run.accelerator, run.length, run.saved
        self.config, self.accelerator, self.data, self.length = config, accelerator, run.data, length
        self.seed, self.branch, self.contents = run.seed, run.mark.branch, run.contents
        self.goes_back = saved is not None and self.branch != saved.run.branch
        self.device = accelerator.device
        self.step = saved.run.step if saved else 0
        self.skipped_in_a_row = saved.run.skipped_steps if saved else 0
        self.recent_losses = deque(saved.run.recent_losses if saved else (), maxlen=length.steps_per_epoch)
        torch.backends.cuda.matmul.allow_tf32 = config.model.cuda_allow_tf32
        torch.backends.cudnn.benchmark = config.model.cuda_cudnn_benchmark

        dtype = train_setup.compute_dtype(config.model, self.device)
        self.planner = train_memory.planner_for(config, accelerator)
        if accelerator.is_main_process:
            train_memory.warn_of_host_memory(self.planner, run.data, self.device)
        self.dit = assembly.load_model(config.model, self.device, dtype)
        self.network: LoRANetwork = assembly.build_network(
            config.network, self.dit, run.seed, allow_partial=config.model.lora_allow_partial
        )
        self.network.train()
        # Before blocks stream: their weights then lie elsewhere. Only the main process reports.
        norms = weight_norms(self.network, self.device) if accelerator.is_main_process else {}
        # Only the LoRA is handed to accelerate: the frozen model is neither wrapped, nor copied, nor saved.
        self.runner: nn.Module = accelerator.prepare(self.network)
        assembly.finish_model(config.model, self.dit, self.device)
        optimizer_config = config.optimizer
        self.optimizer = train_setup.optimizer_for(optimizer_config, self.network)
        self.optimizer_name = describe_optimizer(self.optimizer, optimizer_config.optimizer_args)
        self.schedule: LRScheduler | None = restore(
            saved, optimizer_config, self.network, self.optimizer, length.total_steps
        )
        set_averaging(self.optimizer, training=True)
        self.average = (
            resume_average(saved, self.network, config.network.ema_decay)
            if accelerator.is_main_process
            else None
        )
        self.objective = self._objective(self.runner)
        self.validation = self._validation(run.validation_data, dtype)
        self.prior = prior.PriorPreservation(self.objective, self.network, config.loss.prior_loss_weight)
        self.output = self._output(run, dtype, norms)
        self.is_sampling_asked = self.has_stop_word = False
        self.norm_limit = NormLimit(self.network, config.network.scale_weight_norms, self.device)
        self.waited: list[float] = []
        folder, name = config.saving.output_dir / "sample", config.saving.output_name
        names = SampleNames(folder, name, self.output.facts.session_id)
        self.samples = TrainingSamples(config, run.prompts, self.device, names)
        self.num_prompts = run.num_prompts
        self.data_order = data_order_hash(run.data)
        self.network_identity = network_identity(self.network)

    def _objective(self, runner: nn.Module) -> Objective:
        model = self.config.model
        return Objective(
            VelocityModel(self.dit, model.task.scale_factor, model.nabla, runner),
            self.config.timesteps,
            self.config.conditioning,
            model.task.is_i2v,
            self.seed,
            self.device,
            self.config.loss,
        )

    def _validation(self, data: CachedDataset | None, dtype: torch.dtype) -> ValidationChecks:
        names = OutputNames(self.config.saving.output_dir, self.config.saving.output_name)
        validation = None
        if data is not None and self.accelerator.is_main_process:
            # Not through the wrapper for several processes: the others do not take part.
            settings = model_settings(self.config, dtype_name(dtype))
            objective = self._objective(self.network)
            validation = Validation(data, objective, self.network, model_settings=settings)
        return ValidationChecks(self.config.data, validation, names.validation_plot)

    def _probe(self) -> PredictionProbe | None:
        """What measures the effect of the LoRA on the predictions, on the main process."""
        is_main = self.accelerator.is_main_process
        return PredictionProbe(self.data, self._objective(self.network), self.network) if is_main else None

    def _output(self, run: PreparedRun, dtype: torch.dtype, norms: Mapping[str, float]) -> Output:
        settings = train_setup.schedule_settings(self.config.optimizer, self.length.total_steps)
        facts = RunFacts(
            session_id=run.mark.session_id,
            started_at=run.mark.started_at,
            seed=self.seed,
            num_items=self.data.num_items,
            num_batches=self.length.batches_per_epoch,
            num_epochs=self.length.num_epochs,
            total_steps=self.length.total_steps,
            warmup_steps=settings.warmup_steps,
            optimizer=self.optimizer_name,
            mixed_precision={"bfloat16": "bf16", "float32": "no"}.get(dtype_name(dtype), dtype_name(dtype)),
        )
        return Output(
            self.config,
            run.datasets,
            facts,
            self.network,
            self.optimizer,
            tracker_run=run.mark.tracker_run,
            trackers=run.trackers,
            weight_norms=norms,
            average=self.average,
            probe=self._probe(),
            uploads=run.uploads,
        )

    def run(self, stop: StopRequest) -> None:
        """Train to the last step, or until asked to stop."""
        is_main = self.accelerator.is_main_process
        if is_main and self.goes_back:
            self.output.begin_branch(self._run_state(), self.schedule)
        metrics = self.output.open_metrics(self.step) if is_main else None
        epoch, rest = divmod(self.step, self.length.steps_per_epoch)
        if is_main:
            self.output.delete_expired(self.step, None if rest else epoch)
        plans = PlanSequence(self.data, self.length, self.accelerator.process_index)
        batches = batch_loader(
            self.data,
            self.length,
            self.accelerator.process_index,
            start_step=self.step,
            num_workers=self.config.data.max_data_loader_n_workers,
        )
        bar = tqdm(
            initial=self.step,
            total=self.length.total_steps,
            disable=not is_main,
            desc="steps",
            smoothing=0.05,
        )
        try:
            if self._wants_probe():
                with self.accelerator.no_sync(self.runner):
                    bare = self._objective(self.network)
                    result = probe(self.planner, bare, self.network, self.data, self.step)
                if is_main:
                    log.info("%s", result)
            request = self._make_up(metrics, stop)
            for plan in plans.steps(self.step) if not request else ():
                request = self._after_step(self._train_step(plan, batches, stop, metrics, bar), metrics, stop)
                if request:
                    break
            if self.step == self.length.total_steps:
                request = self._finish(request, metrics, stop)
            if request not in (0, _STOP_WORD_CODE):
                stop.exit_code = request  # another process may have got the signal
        except torch.OutOfMemoryError as error:
            step_plans = [micro.plan for micro in plans.step(self.step).micro_batches]
            batch = largest_batch(self.data, step_plans, self.planner.text_tokens)
            where = f"step {self.step + 1}"
            raise ResourceError(out_of_memory_message(self.planner, batch, where, error)) from error
        finally:
            batches.close()
            bar.close()
            if metrics is not None:
                metrics.close(is_failed=sys.exception() is not None)

    def _wants_probe(self) -> bool:
        return self.device.type == "cuda" and not self.config.run.no_probe

    def _train_step(
        self,
        plan: StepPlan,
        batches: Iterator[CachedBatch],
        stop: StopRequest,
        metrics: Metrics | None,
        bar: tqdm,
    ) -> int:
        """One optimizer step; returns what asks to stop after it, 0 for nothing."""
        terms, sigmas = self._accumulate(plan, batches)
        norm = self._clip()
        word = take_control_word(self.output.names) if self.accelerator.is_main_process else ""
        if word == "sample" and self.config.samples.sample_prompts is None:
            log.info("%s: sample has no effect: add --sample_prompts", self.output.names.control.name)
        self.has_stop_word |= word == "stop"
        asked = self._asked(stop)
        (loss, prior_loss), norm_value, request = self._share(terms, norm, asked, word == "sample")
        log_norms(metrics, self.step, self.norm_limit.take(self.waited))
        rates = learning_rates(self.optimizer)
        if math.isfinite(loss) and math.isfinite(norm_value):
            self._update()
        else:
            self._skip_or_stop(plan, loss, norm_value, sigmas)
        self.step += 1
        self._log_step(plan, (loss, prior_loss), norm_value, sigmas, rates, metrics, bar)
        if word == "save" and self.accelerator.is_main_process:
            self.output.save_all("step", self.step, self._run_state(), self.schedule)
        return request

    def _accumulate(self, plan: StepPlan, batches: Iterator[CachedBatch]) -> tuple[Tensor, list[float]]:
        """Forward and backward of all micro-batches.

        Returns:
            [2] on the device, this process's share: the step's loss and what of it is the prior term.
        """
        totals = torch.zeros(2, device=self.device)
        sigmas: list[float] = []
        for micro in plan.micro_batches:
            batch = next(batches)
            draws = self.objective.draw(batch, plan.step)
            for is_prior in (passes := prior.passes(batch)):
                losses = self.prior.losses if is_prior else self.objective.training_losses
                self.network.set_step_seed(self.seed, plan.step, micro.position, *([1] if is_prior else []))
                # Gradients are exchanged once per step, after its last pass.
                is_last = micro.is_last and is_prior == passes[-1]
                with nullcontext() if is_last else self.accelerator.no_sync(self.runner):
                    share = losses(batch, draws).sum() / plan.num_items
                    if micro.is_filler:
                        share = share * 0.0
                    # Processes average their gradients, the objective sums over their clips.
                    (share * self.accelerator.num_processes).backward()
                totals += torch.stack([share.detach(), share.detach() * is_prior])
            sigmas += [] if micro.is_filler else draws.sigma.tolist()
        return totals, sigmas

    def _clip(self) -> Tensor:
        """Limit the gradients' norm; returns it as it was."""
        limit = self.config.optimizer.max_grad_norm
        parameters = [p for p in self.network.parameters() if p.grad is not None]
        return nn.utils.clip_grad_norm_(parameters, limit if limit > 0 else math.inf)

    def _share(
        self, losses: Tensor, norm: Tensor, request: int, wants_samples: bool
    ) -> tuple[tuple[float, float], float, int]:
        """Agree over all processes on both losses, stopping and samples: one transfer from the device."""
        asked = torch.tensor([float(request), float(wants_samples)], device=self.device)
        shared = torch.cat([losses, asked])
        if self.accelerator.num_processes > 1:
            rows = torch.zeros(self.accelerator.num_processes, 4, device=self.device)
            rows[self.accelerator.process_index] = shared
            torch.distributed.all_reduce(rows)
            shared = torch.cat([rows[:, :2].sum(dim=0), rows[:, 2:].amax(dim=0)])
        values = torch.cat([shared, norm.float()[None], self.norm_limit.waiting]).tolist()
        loss, prior_loss, code, samples, norm_value, *self.waited = values
        self.is_sampling_asked = samples > 0
        return (loss, prior_loss), norm_value, int(code)

    def _update(self) -> None:
        self.optimizer.step()
        self.skipped_in_a_row = 0
        self._end_update()
        self.norm_limit.apply()
        if self.average is not None:
            self.average.update(self.step + 1)

    def _end_update(self) -> None:
        if self.schedule is not None:
            self.schedule.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _skip_or_stop(self, plan: StepPlan, loss: float, norm: float, sigmas: list[float]) -> None:
        """A number is not finite: the weights have not moved, and do not move in this step."""
        what = (
            f"step {plan.step + 1}: loss {loss}, gradient norm {norm}; "
            f"items {', '.join(item_keys(plan))}; timesteps {', '.join(f'{1000 * s:.1f}' for s in sigmas)}"
        )
        self.skipped_in_a_row += 1
        self.optimizer.zero_grad(set_to_none=True)
        if self.config.run.on_nan == "skip" and self.skipped_in_a_row < MAX_SKIPPED_IN_A_ROW:
            log.warning("%s: skipped", what)
            self._end_update()
            return
        broken = self.output.broken_weights()
        kept = f"the weights before it were already not finite, first {broken[0]}" if broken else (
            f"the weights before it were saved as step {self.step}"
        )  # fmt: skip
        if self.accelerator.is_main_process and not broken:
            self.output.save_all("step", self.step, self._run_state(), self.schedule)
        if self.accelerator.num_processes > 1:
            # A launcher ends the others as soon as one has failed, so all wait for the files.
            self.accelerator.wait_for_everyone()
        raise DivergedError(
            f"training diverged at {what};\n{kept}. Look at the named items, or lower --learning_rate; "
            "--on_nan skip leaves such steps out."
        )

    def _log_step(
        self,
        plan: StepPlan,
        losses: tuple[float, float],
        norm: float,
        sigmas: list[float],
        rates: dict[str, float],
        metrics: Metrics | None,
        bar: tqdm,
    ) -> None:
        loss, prior_loss = losses
        if math.isfinite(loss):
            self.recent_losses.append(loss)
        average = sum(self.recent_losses) / max(1, len(self.recent_losses))
        bar.set_postfix(avr_loss=f"{average:.4f}", refresh=False)
        bar.update()
        if metrics is None:
            return
        log_step(
            metrics, self.step, plan, loss=loss, average=average, grad_norm=norm, sigmas=sigmas, rates=rates,
            prior_loss=prior_loss if self.config.loss.prior_loss_weight > 0 else None,
        )  # fmt: skip

    def _after_step(self, request: int, metrics: Metrics | None, stop: StopRequest) -> int:
        """Ends of epochs and saving, on the main process alone, then samples and validation.

        Returns:
            What asks to stop by now, 0 for nothing; LoRA and state are then saved.
        """
        ended_epoch, is_end = self._ended_epoch(), self.step == self.length.total_steps
        if request or is_end:  # no next step will bring them
            log_norms(metrics, self.step, self.norm_limit.take(self.norm_limit.waiting.tolist()))
        if metrics is not None:
            if ended_epoch is not None:
                average = sum(self.recent_losses) / max(1, len(self.recent_losses))
                metrics.write("epoch", self.step, {"epoch": ended_epoch, "loss": average})
                metrics.scalars(self.step, {"loss/epoch": average})
            self.output.save_due(
                self.step,
                ended_epoch,
                self._run_state(),
                self.schedule,
                is_end=is_end,
                is_stopping=request != 0,
            )
        if is_end:  # the final files come before what can fail
            return request
        return self._observe(request, metrics, stop)

    def _ended_epoch(self) -> int | None:
        """Number of the epoch that the last step ended, if it did."""
        epoch, rest = divmod(self.step, self.length.steps_per_epoch)
        return None if rest or not epoch else epoch

    def _make_up(self, metrics: Metrics | None, stop: StopRequest) -> int:
        """Before the first step: samples of the bare model, or what an earlier part left undone."""
        if self.step == self.length.total_steps:  # after the final files
            return 0
        is_fresh = self.step == 0 and not self._are_samples_due()
        return 0 if is_fresh else self._observe(0, metrics, stop)

    def _observe(self, request: int, metrics: Metrics | None, stop: StopRequest) -> int:
        """What is due after this step and moves no weight: samples on all processes, validation on one.

        A run that is asked to stop leaves it, and saves LoRA and state; the resumed run makes up for it.

        Returns:
            What asks to stop by now, known to all processes.
        """
        if self._are_samples_due():
            request = self._agree(request or self._asked(stop))
            if not request:
                self._sample(metrics, stop)
        request = request or self._asked(stop)
        if not request and metrics is not None and self._is_check_missing(metrics):
            self._validate(metrics, stop)
        request = self._agree(request or self._asked(stop))
        if request and metrics is not None:
            self._stop(metrics)
        if request:
            self._agree(request)  # a launcher ends the others as soon as one has gone: all wait for the files
        return request

    def _stop(self, metrics: Metrics) -> None:
        """Save what a resumed run needs, and say what it has to make up for."""
        if not self.step:
            log.info("stopping before the first step as asked")
            return
        self.output.save_stopped(self._run_state(), self.schedule)
        left = ["samples"] if self._are_samples_missing() else []
        left += ["validation"] if self._is_check_missing(metrics) else []
        log.info(
            "stopping after step %d of %d as asked; --resume auto goes on from there%s",
            self.step, self.length.total_steps, f" with its {' and '.join(left)}" if left else "",
        )  # fmt: skip

    def _asked(self, stop: StopRequest) -> int:
        """What asks this process to stop: 128 + n for a signal, a code for the word `stop`, or 0."""
        if stop.is_set():
            return stop.exit_code
        if self.accelerator.is_main_process and is_stop_written(self.output.names):
            self.has_stop_word = take_control_word(self.output.names) == "stop"
        return _STOP_WORD_CODE if self.has_stop_word else 0

    def _agree(self, request: int) -> int:
        """The largest of what asks the processes to stop; waits for all of them."""
        if self.accelerator.num_processes == 1:
            return request
        shared = torch.tensor([request], device=self.device)
        torch.distributed.all_reduce(shared, op=torch.distributed.ReduceOp.MAX)
        return int(shared)

    def _are_samples_due(self) -> bool:
        is_due = train_samples.is_due(self.config.samples, self.step, self._ended_epoch())
        return is_due or self.is_sampling_asked

    def _are_samples_missing(self) -> bool:
        """Whether the options ask for samples of this step that have not been made."""
        return train_samples.are_missing(self.config, self.step, self._ended_epoch(), self.num_prompts)

    def _is_check_missing(self, metrics: Metrics) -> bool:
        is_end = self.step == self.length.total_steps
        return self.validation.is_missed(self.step, self._ended_epoch(), metrics, is_end=is_end)

    def _sample(self, metrics: Metrics | None, stop: StopRequest) -> None:
        """Make the samples of this step, every process its own prompts."""

        def should_stop() -> bool:
            return self._asked(stop) != 0

        with self.output.averaged_weights():
            samples = self.samples.make(self.dit, self.network, self.step, self._ended_epoch(), should_stop)
        if self.accelerator.num_processes > 1:
            samples = gather_object(samples)
        if metrics is not None:
            log_samples(metrics, self.step, self.config.saving.output_dir / "sample", samples)

    def _validate(self, metrics: Metrics, stop: StopRequest) -> None:
        weights = self.output.averaged_weights()
        try:
            self.validation.run(self.step, metrics, weights, lambda: self._asked(stop) != 0)
        except UserError:
            self.output.save_stopped(self._run_state(), self.schedule)
            raise

    def _finish(self, request: int, metrics: Metrics | None, stop: StopRequest) -> int:
        """The final files, and after them what can fail; returns what asks to stop by now."""
        if metrics is not None:
            is_stopping = (request or self._asked(stop)) != 0
            path = self.output.save_final(self._run_state(), self.schedule, is_stopping=is_stopping)
            log.info("all %d steps are done: %s", self.step, path)
        request = self._observe(request, metrics, stop)
        if metrics is not None:
            metrics.flush()
        return request

    def _run_state(self) -> RunState:
        return RunState(
            output_name=self.config.saving.output_name,
            task=self.config.model.task.name,
            seed=self.seed,
            step=self.step,
            total_steps=self.length.total_steps,
            steps_per_epoch=self.length.steps_per_epoch,
            gradient_accumulation_steps=self.length.gradient_accumulation_steps,
            num_processes=self.length.num_processes,
            data_order=self.data_order,
            network=self.network_identity,
            optimizer=self.optimizer_name,
            learning_rate=self.config.optimizer.learning_rate,
            skipped_steps=self.skipped_in_a_row,
            recent_losses=tuple(self.recent_losses),
            session_id=self.output.facts.session_id,
            started_at=self.output.facts.started_at,
            ema_decay=self.config.network.ema_decay,
            tracker_run=self.output.tracker_run,
            options=shareable_options(self.config),
            library_versions=library_versions(),
            contents=self.contents,
            branch=self.branch,
        )
