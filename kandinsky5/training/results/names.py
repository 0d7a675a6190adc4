"""Names of the files of a run in its output folder, and which of them expire."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kandinsky5.configs.train import SavingConfig

Unit = Literal["epoch", "step"]

_LORA_END, _STATE_END, _AVERAGE_END = ".safetensors", "-state", "-ema.safetensors"
_POSITION = re.compile(r"-([0-9]{6}|[1-9][0-9]{6,}|step([0-9]{8}|[1-9][0-9]{8,}))")
"""What `ResultNames` puts behind the name of a run, and nothing like it: `-2` may end another run's name."""


@dataclass(frozen=True, slots=True)
class ResultNames:
    """File names of one `--output_name`."""

    output_dir: Path
    output_name: str

    def lora(self, unit: Unit, number: int) -> Path:
        """The LoRA after an epoch or step."""
        return self.output_dir / f"{self._stem(unit, number)}{_LORA_END}"

    def state(self, unit: Unit, number: int) -> Path:
        """The state directory after an epoch or step."""
        return self.output_dir / f"{self._stem(unit, number)}{_STATE_END}"

    @property
    def final_lora(self) -> Path:
        return self.output_dir / f"{self.output_name}{_LORA_END}"

    @property
    def final_state(self) -> Path:
        return self.output_dir / f"{self.output_name}{_STATE_END}"

    @property
    def lock(self) -> Path:
        """Locked while a run of this name is active."""
        return self.output_dir / f"{self.output_name}.lock"

    @property
    def control(self) -> Path:
        """A text file that the user may write a command into during the run."""
        return self.output_dir / f"{self.output_name}.control"

    @property
    def config(self) -> Path:
        """The options of the run, defaults included, for `--config_file`."""
        return self.output_dir / f"{self.output_name}_config.toml"

    @property
    def validation_plot(self) -> Path:
        """The losses of all checks of the run as a picture."""
        return self.output_dir / f"{self.output_name}_validation.png"

    @property
    def report(self) -> Path:
        """The report of the run as one HTML page."""
        return self.output_dir / f"{self.output_name}_report.html"

    def _stem(self, unit: Unit, number: int) -> str:
        middle = f"{number:06d}" if unit == "epoch" else f"step{number:08d}"
        return f"{self.output_name}-{middle}"


def average_path(lora: Path) -> Path:
    """The path of the averaged weights (`--ema_decay`) beside a saved LoRA."""
    return lora.with_name(f"{lora.stem}{_AVERAGE_END}")


def effect_path(lora: Path) -> Path:
    """The path of the report beside a saved LoRA."""
    return lora.with_name(f"{lora.stem}_effect.txt")


def is_lora_name(name: str, output_name: str) -> bool:
    """Whether a run of this output name may write a LoRA of that name; a run of another one may do so too."""
    return _is_result_name(name, output_name, _LORA_END)


def is_average_name(name: str, output_name: str) -> bool:
    """The same of a LoRA of averaged weights."""
    return _is_result_name(name, output_name, _AVERAGE_END)


def is_state_name(name: str, output_name: str) -> bool:
    """The same of a state directory."""
    return _is_result_name(name, output_name, _STATE_END)


def _is_result_name(name: str, output_name: str, end: str) -> bool:
    # Not a glob: an output name may hold its special characters.
    if not name.startswith(output_name) or not name.endswith(end) or len(name) < len(output_name) + len(end):
        return False
    position = name.removeprefix(output_name).removesuffix(end)
    return position == "" or _POSITION.fullmatch(position) is not None


def expired(saving: SavingConfig, unit: Unit, number: int, *, state: bool) -> int | None:
    """The epoch or step whose file expires when that of `number` has been saved, by musubi-tuner's rules."""
    if unit == "epoch":
        every = saving.save_every_n_epochs
        keep = saving.save_last_n_epochs_state if state else saving.save_last_n_epochs
        old = None if every is None or keep is None else number - every * keep
    else:
        every = saving.save_every_n_steps
        keep = saving.save_last_n_steps_state if state else saving.save_last_n_steps
        old = None
        if every is not None and keep is not None:
            last = number - keep - 1
            old = last - last % every
    return old if old is not None and old > 0 else None
