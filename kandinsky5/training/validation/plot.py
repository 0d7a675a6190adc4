"""Plot of the validation loss: loss over steps with and without the LoRA, over all clips and by timestep."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from modules.files import atomic_writer

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SIZE_PX, DPI = (1200, 670), 100
_LORA, _BASE = "#145aaa", "#969696"
_MOST_MARKERS = 60
"""Single checks are marked by dots, unless there are so many that these would only thicken the line."""


def write_validation_plot(path: Path, records: Sequence[Mapping[str, Any]]) -> None:
    """Draw the checks of a run, oldest first, as a PNG file of `SIZE_PX`.

    Args:
        records: as `Validation.measure` returns them, each with its `step`. Only those that measured the same
            as the last one are drawn; losses that are not finite leave a gap.
    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # imported late: only a run that is validated draws

    drawn = comparable(records)
    parts = drawn[-1]["timesteps"]
    # A figure of its own, without pyplot: it draws with Agg, needs no display and keeps no global state.
    figure = Figure(figsize=(SIZE_PX[0] / DPI, SIZE_PX[1] / DPI), dpi=DPI, layout="constrained")
    grid = figure.add_gridspec(2, len(parts), height_ratios=(4, 3))
    clips = drawn[-1]["clips"]
    top = figure.add_subplot(grid[0, :])
    title = f"validation loss, {clips} {'clip' if clips == 1 else 'clips'} on fixed noise"
    draw_losses(top, title, drawn, drawn)
    top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    for number, part in enumerate(parts):
        rows = [record["timesteps"][number] for record in drawn]
        axes = figure.add_subplot(grid[1, number])
        draw_losses(axes, f"timesteps {part['from']} to {part['to']}", drawn, rows)
    with atomic_writer(path) as stream:
        figure.savefig(stream, format="png")


def comparable(records: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The checks that measured the same as the last one."""
    return [record for record in records if record.get("set") == records[-1].get("set")]


def draw_losses(
    axes: Axes, title: str, records: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]
) -> None:
    """Draw the validation loss with and without the LoRA.

    Args:
        records: the checks, for their `step`.
        rows: the part of each that is drawn: its `loss` and its `base_loss`.
    """
    steps = [record["step"] for record in records]
    marker = "o" if len(steps) <= _MOST_MARKERS else ""
    base, lora = ([_number(row[key]) for row in rows] for key in ("base_loss", "loss"))
    axes.plot(
        steps,
        base,
        color=_BASE,
        linestyle="--",
        label="validation, without the LoRA",
        marker=marker,
        markersize=3,
    )
    axes.plot(steps, lora, color=_LORA, label="validation, with the LoRA", marker=marker, markersize=4)
    set_up_axes(axes, title)


def set_up_axes(axes: Axes, title: str) -> None:
    """Title, grid, and steps as whole numbers below."""
    from matplotlib.ticker import MaxNLocator

    axes.set_title(title, loc="left", fontsize=10)
    axes.set_xlabel("step")
    axes.xaxis.set_major_locator(MaxNLocator(nbins="auto", integer=True))
    axes.ticklabel_format(style="plain", useOffset=False)
    axes.grid(alpha=0.3)


def _number(value: object) -> float:
    """metrics.jsonl has text for a loss that is not finite."""
    return float(value) if isinstance(value, (int, float)) else math.nan
