"""Draws lines over steps with axes and a legend, on Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from PIL import Image, ImageDraw, ImageFont

Colour = tuple[int, int, int]
Point = tuple[float, float]

_SCALE = 3
"""Drawn so many times larger and shrunk, which smooths the lines."""
_FONT_SIZE, _TITLE_SIZE = 14, 16
_MARGIN_RIGHT, _MARGIN_TOP, _MARGIN_BOTTOM = 18, 36, 50
_TICK_GAP, _DOT, _DASH = 6, 3.5, 9.0
_DOT_GAP = 12
"""Dots are drawn where they are at least so many pixels apart."""
_INK, _GRID, _FRAME = (40, 40, 40), (228, 228, 228), (120, 120, 120)


@dataclass(frozen=True, slots=True)
class Series:
    """One line. Values that are no finite numbers leave a gap."""

    label: str
    x: Sequence[float]
    y: Sequence[object]
    colour: Colour
    is_dashed: bool = False

    def points(self) -> list[Point | None]:
        """(x, y) of each value, None for a gap."""
        return [
            (float(x), float(y)) if isinstance(y, (int, float)) and math.isfinite(y) else None
            for x, y in zip(self.x, self.y, strict=True)
        ]


@dataclass(frozen=True, slots=True)
class Panel:
    """One pair of axes with its lines; later lines lie on top."""

    title: str
    x_label: str
    series: tuple[Series, ...]
    has_legend: bool = True


def draw_panel(panel: Panel, size: tuple[int, int]) -> Image.Image:
    """Draw a panel as an RGB image of `size` (width, height in pixels)."""
    image = Image.new("RGB", (size[0] * _SCALE, size[1] * _SCALE), "white")
    _Drawing(image, panel).draw()
    return image.resize(size, Image.Resampling.LANCZOS)


def ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten apart) within [low, high]."""
    raw = (high - low) / max(1, count)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(values: Sequence[float]) -> list[str]:
    """All with the digits that tell neighbours apart."""
    gap = min((b - a for a, b in pairwise(values)), default=1.0)
    digits = max(0, -math.floor(math.log10(gap) + 1e-9))
    return [f"{value:.{digits}f}" for value in values]


class _Drawing:
    def __init__(self, image: Image.Image, panel: Panel) -> None:
        self._panel = panel
        self._pen = ImageDraw.Draw(image)
        self._font = ImageFont.load_default(_FONT_SIZE * _SCALE)
        self._title_font = ImageFont.load_default(_TITLE_SIZE * _SCALE)
        points = [point for series in panel.series for point in series.points() if point is not None]
        self._is_empty = not points
        self._x_range = _padded([x for x, _ in points], 0.0)
        self._y_range = _padded([y for _, y in points], 0.08)
        self._y_ticks = ticks(*self._y_range, 5)
        labels = tick_labels(self._y_ticks)
        left = max((self._text_width(label) for label in labels), default=0.0) + (_TICK_GAP + 12) * _SCALE
        width, height = image.size
        self._box = (
            left,
            _MARGIN_TOP * _SCALE,
            width - _MARGIN_RIGHT * _SCALE,
            height - _MARGIN_BOTTOM * _SCALE,
        )

    def draw(self) -> None:
        left, top, right, bottom = self._box
        self._pen.text((left, 8 * _SCALE), self._panel.title, _INK, self._title_font)
        middle = (left + right) / 2
        self._pen.text((middle, bottom + 38 * _SCALE), self._panel.x_label, _INK, self._font, anchor="mm")
        if not self._is_empty:
            self._draw_ticks()
            for series in self._panel.series:
                self._draw_series(series)
        self._pen.rectangle(self._box, outline=_FRAME, width=_SCALE)
        if self._panel.has_legend:
            self._draw_legend(right, top - 16 * _SCALE)

    def _draw_ticks(self) -> None:
        left, top, right, bottom = self._box
        for value, label in zip(self._y_ticks, tick_labels(self._y_ticks), strict=True):
            y = self._place((self._x_range[0], value))[1]
            self._pen.line([(left, y), (right, y)], _GRID, _SCALE)
            self._pen.text((left - _TICK_GAP * _SCALE, y), label, _INK, self._font, anchor="rm")
        widest = self._text_width(f"{self._x_range[1]:.0f}") + 24 * _SCALE
        count = max(2, min(10, int((right - left) / widest)))
        for value in (v for v in ticks(*self._x_range, count) if v == round(v)):
            x = self._place((value, self._y_range[0]))[0]
            self._pen.line([(x, top), (x, bottom)], _GRID, _SCALE)
            self._pen.text((x, bottom + 14 * _SCALE), f"{value:.0f}", _INK, self._font, anchor="mm")

    def _draw_series(self, series: Series) -> None:
        placed = [None if point is None else self._place(point) for point in series.points()]
        travelled = 0.0
        for start, end in pairwise(placed):
            if start is not None and end is not None:
                travelled = self._draw_line(start, end, series, travelled)
        # Dots show single checks; crowded ones would only thicken the line, and they would fill dashes.
        left, _, right, _ = self._box
        is_crowded = len(placed) > 1 and (series.is_dashed or right - left < _DOT_GAP * _SCALE * len(placed))
        if not is_crowded:
            for point in placed:
                if point is not None:
                    self._pen.circle(point, _DOT * _SCALE, fill=series.colour)

    def _draw_line(self, start: Point, end: Point, series: Series, travelled: float = 0.0) -> float:
        """From start to end; dashes go on where `travelled` pixels of the same line have left them."""
        length = math.dist(start, end)
        dash = _DASH * _SCALE if series.is_dashed else length + travelled + 1
        for number in range(int(travelled / dash), math.ceil((travelled + length) / dash)):
            if number % 2 == 0:
                parts = [(edge * dash - travelled) / length for edge in (number, number + 1)]
                ends = [
                    tuple(a + min(1.0, max(0.0, part)) * (b - a) for a, b in zip(start, end, strict=True))
                    for part in parts
                ]
                self._pen.line(ends, series.colour, 2 * _SCALE)
        return travelled + length

    def _draw_legend(self, right: float, y: float) -> None:
        """From the right edge to the left, above the frame, where no line can lie under it."""
        for series in self._panel.series:
            right -= self._text_width(series.label)
            self._pen.text((right, y), series.label, _INK, self._font, anchor="lm")
            right -= 40 * _SCALE
            self._draw_line((right, y), (right + 32 * _SCALE, y), series)
            right -= 24 * _SCALE

    def _place(self, point: Point) -> Point:
        left, top, right, bottom = self._box
        (x_low, x_high), (y_low, y_high) = self._x_range, self._y_range
        inset = 10 * _SCALE
        x = left + inset + (point[0] - x_low) / (x_high - x_low) * (right - left - 2 * inset)
        return x, bottom - (point[1] - y_low) / (y_high - y_low) * (bottom - top)

    def _text_width(self, text: str) -> float:
        return self._font.getlength(text)


def _padded(values: Sequence[float], share: float) -> tuple[float, float]:
    """Lowest and highest value with some room around; never the same number twice."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    room = (high - low) * share or (0.05 * abs(high) or 1.0) * (high == low)
    return low - room, high + room
