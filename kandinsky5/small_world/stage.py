"""One resumable stage of the small base's training: optimizer, averaged weights, checkpoint and log."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from modules.files import open_own_file
from modules.logs import get_logger
from modules.seeding import generator_for

log = get_logger(__name__)

LossOfStep = Callable[[int, torch.Generator], Tensor]

_SAVE_SECONDS = 120.0
_REPORT_SECONDS = 60.0


@dataclass(frozen=True, kw_only=True, slots=True)
class StageConfig:
    """Length and optimizer settings of a stage."""

    name: str
    steps: int
    learning_rate: float
    betas: tuple[float, float]
    warmup_steps: int
    constant_share: float = 0.0
    """Share of the steps before the cosine decay begins."""
    final_share: float = 0.02
    """Share of the learning rate that is left at the end."""
    weight_decay: float
    """On matrices and convolutions; never on biases and norms."""
    clip_norm: float
    ema_decay: float

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        done = step / self.steps
        decayed = max(0.0, (done - self.constant_share) / (1 - self.constant_share))
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, decayed)))
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return self.learning_rate * warmup * (self.final_share + (1 - self.final_share) * cosine)


@dataclass
class Stage:
    """A model in training with its resumable state: `folder`/NAME.pt, and `folder`/log.jsonl."""

    config: StageConfig
    model: nn.Module
    folder: Path
    step: int = 0
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self._params: list[Tensor] = list(self.model.parameters())
        matrices = [param for param in self._params if param.ndim > 1]
        others = [param for param in self._params if param.ndim <= 1]
        self._optimizer = torch.optim.AdamW(
            [
                {"params": matrices, "weight_decay": self.config.weight_decay},
                {"params": others, "weight_decay": 0.0},
            ],
            lr=self.config.learning_rate,
            betas=self.config.betas,
            fused=True,
        )
        self._average = [param.detach().clone() for param in self._params]
        self._losses: list[Tensor] = []
        self._resume()

    @property
    def path(self) -> Path:
        return self.folder / f"{self.config.name}.pt"

    @property
    def is_done(self) -> bool:
        return self.step >= self.config.steps

    def run(self, loss_of_step: LossOfStep, measure: Callable[[], dict[str, Any]]) -> None:
        """Train to the last step; report once a minute, save every two minutes and at the end.

        Args:
            loss_of_step: the loss of a step; every random number comes from the generator it is given, a
                pure function of stage and step.
            measure: figures for the report, taken with the averaged weights.
        """
        if self.is_done:
            return
        last_report = last_save = last_tick = time.monotonic()
        first_step = self.step
        while not self.is_done:
            generator = generator_for("small_world", self.config.name, self.step)
            self._update(loss_of_step(self.step, generator))
            now = time.monotonic()
            self.seconds += now - last_tick
            last_tick = now
            if now - last_report > _REPORT_SECONDS or self.is_done:
                self._report((self.step - first_step) / (now - last_report), measure)
                last_report = last_tick = time.monotonic()
                first_step = self.step
            if now - last_save > _SAVE_SECONDS or self.is_done:
                self.save()
                last_save = time.monotonic()
        with torch.no_grad():
            torch._foreach_copy_(self._params, self._average)

    def _update(self, loss: Tensor) -> None:
        for group in self._optimizer.param_groups:
            group["lr"] = self.config.rate(self.step)
        self._optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self._params, self.config.clip_norm)
        self._optimizer.step()
        self.step += 1
        self._losses.append(loss.detach())
        decay = min(self.config.ema_decay, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            torch._foreach_lerp_(self._average, self._params, 1 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The model with its averaged weights in place."""
        kept = [param.detach().clone() for param in self._params]
        with torch.no_grad():
            torch._foreach_copy_(self._params, self._average)
        try:
            yield
        finally:
            with torch.no_grad():
                torch._foreach_copy_(self._params, kept)

    def _report(self, steps_per_second: float, measure: Callable[[], dict[str, Any]]) -> None:
        with self.averaged(), torch.no_grad():
            figures = measure()
        record = {
            "stage": self.config.name,
            "step": self.step,
            "minutes": round(self.seconds / 60, 1),
            "steps_per_second": round(steps_per_second, 2),
            "learning_rate": float(f"{self.config.rate(self.step - 1):.3g}"),
            "loss": round(float(torch.stack(self._losses).mean()), 4),
            **figures,
        }
        self._losses.clear()
        with open_own_file(self.folder / "log.jsonl") as file:
            file.write((json.dumps(record) + "\n").encode("utf-8"))
        left = (self.config.steps - self.step) / max(steps_per_second, 1e-6) / 60
        log.info("%s, about %.0f min left: %s", self.config.name, left, json.dumps(record))

    def save(self) -> None:
        """Replace the checkpoint in one step, so that a kill leaves the old or the new one."""
        partial = self.path.with_suffix(".partial")
        torch.save(
            {
                "step": self.step,
                "seconds": self.seconds,
                "model": self.model.state_dict(),
                "average": self._average,
                "optimizer": self._optimizer.state_dict(),
            },
            partial,
        )
        partial.replace(self.path)

    def _resume(self) -> None:
        if not self.path.is_file():
            return
        state = torch.load(self.path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self._average = state["average"]
        self._optimizer.load_state_dict(state["optimizer"])
        self.step, self.seconds = state["step"], state["seconds"]
        log.info("%s: continuing at step %d of %d", self.config.name, self.step, self.config.steps)
        if self.is_done:
            with torch.no_grad():
                torch._foreach_copy_(self._params, self._average)
