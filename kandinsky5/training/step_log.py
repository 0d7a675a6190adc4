"""What a training loop tells of its steps and samples: lines of metrics.jsonl, and points of the curves."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from kandinsky5.training.plan import StepPlan
from kandinsky5.training.samples import KIND, Sample
from kandinsky5.training.tracking.metrics import Metrics
from kandinsky5.training.tracking.trackers import ShownSample


def item_keys(plan: StepPlan) -> list[str]:
    """The clips of a step, without those that only fill up."""
    return [key for micro in plan.micro_batches if not micro.is_filler for key in micro.plan.item_keys]


def log_step(
    metrics: Metrics,
    step: int,
    plan: StepPlan,
    *,
    loss: float,
    average: float,
    grad_norm: float,
    sigmas: Sequence[float],
    rates: Mapping[str, float],
    prior_loss: float | None,
) -> None:
    """One optimizer step.

    Args:
        step: steps done, this one included.
        average: of the losses of the last epoch's worth of steps.
        rates: learning rates by their names in the curves.
        prior_loss: distance from the base model's predictions, where the run has such a loss.
    """
    record = {
        "epoch": plan.epoch + 1,
        "loss": loss,
        **({} if prior_loss is None else {"prior_loss": prior_loss}),
        "avr_loss": average,
        "lr": rates.get("lr/unet"),
        **{name: rate for name, rate in rates.items() if name.startswith("lr/d*lr/")},
        "grad_norm": grad_norm,
        "sigma": list(sigmas),
        "items": item_keys(plan),
    }
    metrics.write("step", step, record)
    curves = {"loss/current": loss, "loss/average": average, "grad_norm": grad_norm, **rates}
    metrics.scalars(step, curves if prior_loss is None else {**curves, "loss/prior": prior_loss})


def log_norms(metrics: Metrics | None, step: int, norms: Mapping[str, float]) -> None:
    """The numbers of `--scale_weight_norms`, if there are any."""
    if metrics is not None and norms:
        metrics.write("norms", step, {name.partition("/")[2]: value for name, value in norms.items()})
        metrics.scalars(step, norms)


def log_samples(metrics: Metrics, step: int, folder: Path, samples: Sequence[Sample]) -> None:
    """Samples in the order of their prompts, whichever process has made them.

    Args:
        folder: where their files lie.
    """
    for sample in sorted(samples, key=lambda sample: sample.prompt_number):
        metrics.write(
            KIND, step, {"prompt": sample.prompt_number, "file": f"{folder.name}/{sample.file_name}"}
        )
        name = f"sample_{sample.prompt_number}"
        metrics.sample(step, ShownSample(name, folder / sample.file_name, sample.animation))
