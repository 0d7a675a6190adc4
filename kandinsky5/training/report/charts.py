"""The curves of a run as PNG pictures: losses by timestep, learning rate and time per step."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from kandinsky5.training.report.records import Record, Step
from kandinsky5.training.validation.measure import NUM_BINS
from kandinsky5.training.validation.plot import DPI, SIZE_PX, comparable, draw_losses, set_up_axes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING, _SINGLE = "#b3541e", "#d9a07f"
_MAX_POINTS = 100
"""Of a curve: longer runs are averaged over so many equal parts."""


def loss_picture(steps: Sequence[Step], validations: Sequence[Record]) -> bytes | None:
    """Training and validation loss, over all timesteps and by their quarters; None without any."""
    if not steps and not validations:
        return None
    figure = _figure(SIZE_PX[1])
    grid = figure.add_gridspec(2, NUM_BINS, height_ratios=(4, 3))
    checks = comparable(validations) if validations else []
    top = figure.add_subplot(grid[0, :])
    clips = [(step.number, step.loss) for step in steps]
    _draw(top, "loss, all timesteps", clips, checks, checks, shows_single=True)
    if top.get_legend_handles_labels()[1]:
        top.legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=4, frameon=False)
    for part in range(NUM_BINS):
        low, high = part / NUM_BINS, (part + 1) / NUM_BINS
        values = [
            (step.number, loss)
            for step in steps
            for sigma, loss in step.clips
            if low <= sigma < high or (sigma >= high == 1.0)
        ]
        parts = [(record, record["timesteps"]) for record in checks]
        fitting = [(record, rows[part]) for record, rows in parts if len(rows) == NUM_BINS]
        axes = figure.add_subplot(grid[1, part])
        title = f"timesteps {1000 * low:g} to {1000 * high:g}"
        _draw(axes, title, values, [record for record, _ in fitting], [row for _, row in fitting])
    return _png(figure)


def rate_picture(steps: Sequence[Step]) -> bytes | None:
    """Learning rate and seconds per step; None where neither is on record."""
    curves = {
        "learning rate": [(step.number, step.learning_rate) for step in steps],
        "seconds per step": [(step.number, step.seconds) for step in steps],
    }
    known = {title: [(x, y) for x, y in points if y is not None] for title, points in curves.items()}
    if not any(known.values()):
        return None
    figure = _figure(260)
    for number, (title, points) in enumerate(known.items(), start=1):
        axes = figure.add_subplot(1, 2, number)
        _plot(axes, averaged(points))
        if points:
            axes.set_ylim(bottom=0)
        set_up_axes(axes, title)
        if title == "learning rate":
            axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return _png(figure)


def averaged(points: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """(step, value), averaged over at most _MAX_POINTS equal parts of the steps; finite values only."""
    finite = [(step, value) for step, value in points if math.isfinite(value)]
    if not finite:
        return []
    first = finite[0][0]
    width = max(1, -(-(finite[-1][0] - first + 1) // _MAX_POINTS))
    parts: dict[int, list[tuple[int, float]]] = {}
    for step, value in finite:
        parts.setdefault((step - first) // width, []).append((step, value))
    return [
        (sum(step for step, _ in part) / len(part), sum(value for _, value in part) / len(part))
        for _, part in sorted(parts.items())
    ]


def _draw(
    axes: Axes,
    title: str,
    training: Sequence[tuple[int, float]],
    checks: Sequence[Record],
    rows: Sequence[Record],
    *,
    shows_single: bool = False,
) -> None:
    if shows_single and len(training) <= 5000:
        axes.plot(*_columns(training), ".", color=_SINGLE, markersize=2, label="training, single steps")
    _plot(axes, averaged(training), label="training")
    if rows:
        draw_losses(axes, title, checks, rows)
    else:
        set_up_axes(axes, title)


def _plot(axes: Axes, points: Sequence[tuple[float, float]], label: str | None = None) -> None:
    marker = "o" if len(points) < 3 else ""  # a line needs two points, and two are easily missed
    axes.plot(*_columns(points), color=_TRAINING, label=label, marker=marker, markersize=4)


def _columns(points: Sequence[tuple[float, float]]) -> tuple[list[float], list[float]]:
    return [x for x, _ in points], [y for _, y in points]


def _figure(height: int) -> Figure:
    from matplotlib.figure import Figure  # imported late: only a run that ends draws

    return Figure(figsize=(SIZE_PX[0] / DPI, height / DPI), dpi=DPI, layout="constrained")


def _png(figure: Figure) -> bytes:
    stream = io.BytesIO()
    figure.savefig(stream, format="png")
    return stream.getvalue()
