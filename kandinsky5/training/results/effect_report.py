"""The effect of a saved LoRA on the model, for the log, metrics.jsonl and a text file beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from modules.logs import format_table, get_logger
from modules.messages import names_in_short
from networks.lora_effect import LoraEffect, block_of

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class EffectReport:
    """The effect of one file."""

    file_name: str
    step: int
    weights: LoraEffect
    prediction: Mapping[int, float] | None
    """Timestep -> relative change of the predicted velocity; None if it was not measured."""
    clip_size: str
    """Width x height x frames of the clip it was measured on."""

    @property
    def predicts_the_same(self) -> bool:
        """Whether the weights changed but no prediction did."""
        if self.prediction is None or self.weights.does_nothing:
            return False
        return all(value == 0.0 for value in self.prediction.values())

    def log(self) -> None:
        """Log the effect, and warn of a LoRA that has none."""
        weights, name = self.weights, self.file_name
        if weights.does_nothing:
            log.warning(
                "%s DOES NOTHING: the change of every one of its %d layers is exactly zero. After the first "
                "steps of a warm-up this is normal; later, look at --learning_rate and the schedule",
                name, weights.num_layers,
            )  # fmt: skip
            return
        log.info("%s: %s%s", name, weights.describe(), self._describe_prediction())
        if weights.unchanged:
            log.warning("%s: layers that have not moved: %s", name, names_in_short(weights.unchanged))
        if self.predicts_the_same:
            log.warning(
                "%s DOES NOTHING YET: its weights have changed, but too little to change any "
                "prediction. Train longer, or raise --learning_rate", name,
            )  # fmt: skip

    def record(self) -> dict[str, Any]:
        """A line of metrics.jsonl."""
        prediction = None if self.prediction is None else [
            {"timestep": timestep, "change": change} for timestep, change in self.prediction.items()
        ]  # fmt: skip
        return {
            "file": self.file_name,
            "change": self.weights.change,
            "prediction": prediction,
            "blocks": dict(self.weights.blocks),
            "layers": self.weights.num_layers,
            "unchanged": list(self.weights.unchanged),
        }

    def curves(self) -> dict[str, float]:
        """Points for the trackers."""
        predicted = {f"lora/prediction_{key}": value for key, value in (self.prediction or {}).items()}
        return {"lora/change": self.weights.change, **predicted}

    def text(self) -> str:
        """The file beside the LoRA."""
        weights = self.weights
        unchanged = Counter(block_of(name) for name in weights.unchanged)
        layers = Counter(block_of(name) for name in weights.layers)
        rows = [
            [block, _percent(change), f"{unchanged[block]} of {layers[block]}"]
            for block, change in weights.blocks.items()
        ]
        rows.append([
            "all blocks",
            _percent(weights.change),
            f"{len(weights.unchanged)} of {weights.num_layers}",
        ])
        parts = [
            f"{self.file_name}, after step {self.step}: effect on the model",
            self._prediction_text(),
            "Weights: norm of the change as a share of the norm of the weights.",
            format_table(["block", "change", "layers without change"], rows),
        ]
        if weights.unchanged:
            parts.append("\n".join(["Layers without change:", *(f"  {name}" for name in weights.unchanged)]))
        return "\n\n".join(parts) + "\n"

    def _describe_prediction(self) -> str:
        if self.prediction is None:
            return ""
        parts = [f"{_percent(value)} at timestep {timestep}" for timestep, value in self.prediction.items()]
        return f"; the prediction moves by {', '.join(parts)}"

    def _prediction_text(self) -> str:
        if self.prediction is None:
            return "Prediction: not measured, because the run was asked to stop or memory was short."
        rows = [[timestep, _percent(change)] for timestep, change in self.prediction.items()]
        head = (
            "Prediction: how far the velocity moves, as a share of what the base model predicts, on one\n"
            f"clip of the training data ({self.clip_size}) and fixed noise."
        )
        return f"{head}\n\n{format_table(['timestep', 'change'], rows)}"


def _percent(share: float) -> str:
    """Three digits however small: only what is nothing is shown as nothing."""
    return f"{100 * share:.3g}%"
