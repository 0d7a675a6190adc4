"""Names of what a run leaves in its output folder, and which of it is deleted again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kandinsky5.configs.train import SavingConfig
from kandinsky5.training_state import remove_state
from networks.lora_scales import lora_config_path

Unit = Literal["epoch", "step"]


@dataclass(frozen=True, slots=True)
class OutputNames:
    """File names of one `--output_name`."""

    output_dir: Path
    output_name: str

    def lora(self, unit: Unit, number: int) -> Path:
        """The LoRA after an epoch or step."""
        return self.output_dir / f"{self._stem(unit, number)}.safetensors"

    def state(self, unit: Unit, number: int) -> Path:
        """The state directory after an epoch or step."""
        return self.output_dir / f"{self._stem(unit, number)}-state"

    @property
    def final_lora(self) -> Path:
        return self.output_dir / f"{self.output_name}.safetensors"

    @property
    def final_state(self) -> Path:
        return self.output_dir / f"{self.output_name}-state"

    @property
    def lock(self) -> Path:
        """Held while a run of this name goes."""
        return self.output_dir / f"{self.output_name}.lock"

    @property
    def control(self) -> Path:
        """A text file the user may write a word into while the run goes."""
        return self.output_dir / f"{self.output_name}.control"

    @property
    def config(self) -> Path:
        """The options of the run, defaults included, for `--config_file`."""
        return self.output_dir / f"{self.output_name}_config.toml"

    @property
    def validation_plot(self) -> Path:
        """The losses of all checks of the run as a picture."""
        return self.output_dir / f"{self.output_name}_validation.png"

    def _stem(self, unit: Unit, number: int) -> str:
        middle = f"{number:06d}" if unit == "epoch" else f"step{number:08d}"
        return f"{self.output_name}-{middle}"

    def existing_results(self) -> list[Path]:
        """LoRA files and state directories that runs of this name left."""
        return sorted(self._results())

    def _results(self) -> Iterator[Path]:
        for path in self.output_dir.iterdir() if self.output_dir.is_dir() else ():
            # Not a glob: an output name may hold its special characters.
            if not path.name.startswith(self.output_name):
                continue
            ending = path.name.removeprefix(self.output_name)
            ending = ending.removesuffix(".safetensors") if path.is_file() else ending.removesuffix("-state")
            if path.name.endswith((".safetensors", "-state")) and _is_position(ending):
                yield path


def average_path(lora: Path) -> Path:
    """Where the average of the weights (`--ema_decay`) lies beside a saved LoRA."""
    return lora.with_name(f"{lora.stem}-ema.safetensors")


def effect_path(lora: Path) -> Path:
    """Where the report on a saved LoRA lies beside it."""
    return lora.with_name(f"{lora.stem}_effect.txt")


def _is_position(text: str) -> bool:
    text = text.removesuffix("-ema")
    return text == "" or (text.startswith("-") and text[1:].removeprefix("step").isdigit())


def expired(saving: SavingConfig, unit: Unit, number: int, *, state: bool) -> int | None:
    """The epoch or step whose file goes when that of `number` has been saved, by upstream's rules."""
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


def delete_result(path: Path) -> None:
    """Remove a LoRA with its average and what lies beside them, or a state directory; any may be missing."""
    if path.is_dir():
        remove_state(path)
        return
    for file in (path, average_path(path)):
        file.unlink(missing_ok=True)
        lora_config_path(file).unlink(missing_ok=True)
        effect_path(file).unlink(missing_ok=True)
