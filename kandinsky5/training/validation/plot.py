"""The picture of a validation: loss over steps with and without the LoRA, in all and per noise level."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from kandinsky5.training.validation.line_plot import Panel, Series, draw_panel
from modules.files import atomic_writer

WIDTH, TOP_HEIGHT, BIN_HEIGHT = 1200, 380, 290
_LORA, _BASE = (20, 90, 170), (150, 150, 150)


def write_validation_plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw the checks of a run, oldest first, as a PNG file.

    Args:
        records: as `Validation.measure` gives them, each with its `step`. Only those that measured the same
            as the last one are drawn.
    """
    drawn = [record for record in records if record.get("set") == records[-1].get("set")]
    parts = drawn[-1]["timesteps"]
    image = Image.new("RGB", (WIDTH, TOP_HEIGHT + BIN_HEIGHT), "white")
    noun = "clip" if drawn[-1]["clips"] == 1 else "clips"
    title = f"validation loss, {drawn[-1]['clips']} {noun} on fixed noise"
    image.paste(draw_panel(_panel(title, drawn, drawn, has_legend=True), (WIDTH, TOP_HEIGHT)), (0, 0))
    width = WIDTH // len(parts)
    for number, part in enumerate(parts):
        rows = [record["timesteps"][number] for record in drawn]
        panel = _panel(f"timesteps {part['from']} to {part['to']}", drawn, rows, has_legend=False)
        image.paste(draw_panel(panel, (width, BIN_HEIGHT)), (number * width, TOP_HEIGHT))
    with atomic_writer(path) as stream:
        image.save(stream, format="png", optimize=True)


def _panel(
    title: str,
    records: Sequence[Mapping[str, Any]],
    rows: Sequence[Mapping[str, Any]],
    *,
    has_legend: bool,
) -> Panel:
    steps = [record["step"] for record in records]
    return Panel(
        title=title,
        x_label="step",
        series=(
            Series("without the LoRA", steps, [row["base_loss"] for row in rows], _BASE, is_dashed=True),
            Series("with the LoRA", steps, [row["loss"] for row in rows], _LORA),
        ),
        has_legend=has_legend,
    )
