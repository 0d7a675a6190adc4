"""Ticks and labels of the axes, and lines that lie where their numbers are."""

from __future__ import annotations

from itertools import pairwise

import pytest

from kandinsky5.training.validation.line_plot import Panel, Series, draw_panel, tick_labels, ticks

RED = (255, 0, 0)


@pytest.mark.parametrize(
    ("low", "high", "count"),
    [(0.0, 1.0, 5), (0.37, 0.482, 5), (1, 20000, 8), (49.9, 50.1, 4), (-3e-6, 5e-6, 6)],
)
def test_ticks_are_round_even_and_inside(low: float, high: float, count: int) -> None:
    values = ticks(low, high, count)
    assert count / 3 <= len(values) <= 2 * count
    assert low <= values[0] < values[-1] <= high * (1 + 1e-12)
    gaps = [b - a for a, b in pairwise(values)]
    assert max(gaps) == pytest.approx(min(gaps))
    labels = tick_labels(values)
    assert len(set(labels)) == len(labels)
    assert [float(label) for label in labels] == pytest.approx(values)


def test_a_rising_line_rises_and_a_gap_stays_empty() -> None:
    series = Series("a", [0, 10, 20, 30], [0.0, 1.0, float("nan"), 3.0], RED)
    image = draw_panel(Panel("t", "step", (series,), has_legend=False), (300, 200))
    pixels = [
        (x, y)
        for x in range(300)
        for y in range(200)
        if image.getpixel((x, y))[0] > 200 and image.getpixel((x, y))[1] < 60
    ]
    columns = sorted({x for x, _ in pixels})
    middle = [x for x in columns if 130 < x < 260]
    assert not middle, "nothing is drawn over the value that is no number"
    heights = [min(y for x, y in pixels if x == column) for column in columns]
    assert heights[0] > heights[-1]
