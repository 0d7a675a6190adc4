"""What a training run did, step by step, and the first number in which two runs differ."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from kandinsky5.training import trainer as training
from kandinsky5.training.loss import objective
from kandinsky5.training.results.state import SavedState, read_state
from kandinsky5.training.step_values import StepReport
from kandinsky5.training.training_log import TrainingLog
from modules.tensor_files import read_tensors

Record = dict[str, Any]


@contextmanager
def recorded() -> Iterator[list[Record]]:
    """Within the block every step of a run leaves a record: what was drawn, loss, rates, and what is trained.

    Fields stand in the order in which a step computes them, so that the first that differs is the cause.
    """
    records: list[Record] = []
    noise: list[Tensor] = []
    trainers: list[training.Trainer] = []
    draw, write_step, run = objective.draw_noise, TrainingLog.write_step, training.Trainer.run

    def drawn(*arguments: Any) -> Tensor:
        noise.append(draw(*arguments))
        return noise[-1]

    def running(trainer: training.Trainer) -> None:
        trainers.append(trainer)
        run(trainer)

    def written(run_log: TrainingLog, report: StepReport) -> None:
        write_step(run_log, report)
        trainer, values = trainers[-1], report.values
        model = trainer.model
        records.append({
            "step": trainer.progress.step,
            "items": [key for micro in report.plan.micro_batches for key in micro.plan.item_keys],
            "noise": hash_of(noise),
            "timesteps": [value.hex() for value in report.sigmas],
            "loss": [loss.hex() for loss in (values.loss, values.prior_loss)],
            "gradient norm": values.grad_norm.hex(),
            "learning rates": {name: rate.hex() for name, rate in report.rates.items()},
            "LoRA": hash_of(dict(model.network.named_parameters())),
            "optimizer": hash_of(model.optimizer.state_dict()),
            "average": hash_of(None if model.average is None else model.average.state_dict()),
            "mean of the losses": sum(trainer.progress.recent_losses).hex(),
        })
        noise.clear()

    with (
        mock.patch.object(objective, "draw_noise", drawn),
        mock.patch.object(training.Trainer, "run", running),
        mock.patch.object(TrainingLog, "write_step", written),
    ):
        yield records


def hash_of(value: Any) -> str:
    """SHA-256 over all tensors and numbers of nested containers."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()[:16]


def _feed(digest: Any, value: Any) -> None:
    if isinstance(value, dict):
        for key in sorted(value, key=str):
            digest.update(f"{key}:".encode())
            _feed(digest, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(digest, item)
    elif isinstance(value, Tensor):
        digest.update(f"{value.dtype}{list(value.shape)}".encode())
        digest.update(value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    else:
        digest.update(f"{value!r};".encode())


def assert_same_steps(ours: Sequence[Record], theirs: Sequence[Record]) -> None:
    """Fail on the first field of the first step that differs."""
    for mine, other in zip(ours, theirs, strict=False):
        for field, value in other.items():
            assert mine[field] == value, f"step {other['step']}: {field} is {mine[field]}, was {value}"
    steps = [[record["step"] for record in records] for records in (ours, theirs)]
    assert steps[0] == steps[1], f"steps {steps[0]}, were {steps[1]}"


def assert_same_results(ours: Path, theirs: Path) -> None:
    """The final LoRAs, averages and states of two output folders hold the same tensors."""
    for path in sorted(theirs.glob("lora*.safetensors")):
        if "step" in path.name or not path.is_file():
            continue
        mine, other = read_tensors(ours / path.name)[0], read_tensors(path)[0]
        assert hash_of(mine) == hash_of(other), path.name
    if (theirs / "lora-state").is_dir():
        mine_state, other_state = read_state(ours / "lora-state"), read_state(theirs / "lora-state")
        assert state_hashes(mine_state) == state_hashes(other_state)


def state_hashes(state: SavedState) -> dict[str, str]:
    """One hash for each part of a state that must not depend on where a run was stopped."""
    return {
        "step": str(state.run.step),
        "LoRA": hash_of(dict(state.lora)),
        "optimizer": hash_of(state.optimizer),
        "schedule": hash_of(state.scheduler),
        "average": hash_of(None if state.average is None else dict(state.average)),
        "losses": hash_of(state.run.recent_losses),
    }
