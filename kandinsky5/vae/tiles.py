"""Runs a function over overlapping windows in time and tiles in space, and cross-fades the results.

Source: kandinskylab/kandinsky-5:kandinsky/models/vae.py for sizes, order and blending. Two windows overlap by
window minus stride; in the overlap the earlier result, itself already blended, fades linearly into the later
one. Unlike there, the last window may be shorter, so that no frame is dropped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

TIME_AXIS, ROW_AXIS, COLUMN_AXIS = 2, 3, 4  # of [B, C, F, H, W]


@dataclass(frozen=True, slots=True)
class Tiling:
    """Windows over one axis, in the units of the input or of the output."""

    size: int
    stride: int

    @property
    def overlap(self) -> int:
        return self.size - self.stride

    def starts(self, length: int) -> range:
        """Where windows begin over an axis of `length`: the last is the first that reaches the end."""
        count = 1 + max(0, -(-(length - self.size) // self.stride))
        return range(0, count * self.stride, self.stride)

    def scaled(self, numerator: int, denominator: int) -> Tiling:
        """The same windows in other units, such as latents for pixels."""
        return Tiling(self.size * numerator // denominator, self.stride * numerator // denominator)


@dataclass(frozen=True, slots=True)
class TileGrid:
    """Tiles over height and width; the same grid on both sides of the VAE."""

    rows: Tiling
    columns: Tiling

    def scaled(self, numerator: int, denominator: int) -> TileGrid:
        return TileGrid(self.rows.scaled(numerator, denominator), self.columns.scaled(numerator, denominator))


def map_windows(
    function: Callable[[Tensor], Tensor], source: Tensor, windows: Tiling, kept: Tiling
) -> Iterator[Tensor]:
    """Finished pieces of `function` over time windows of `source` [B, C, F, H, W], in order.

    Joined on the time axis they are the whole result.

    Args:
        windows: in entries of `source`; the result of a later window's first entry is dropped.
        kept: the same windows in entries of the result, that first entry not counted.
    """
    starts = windows.starts(source.shape[TIME_AXIS])
    previous: Tensor | None = None
    for start in starts:
        current = function(source.narrow(TIME_AXIS, start, min(windows.size, source.shape[2] - start)))
        if previous is not None:
            current = current.narrow(TIME_AXIS, 1, current.shape[TIME_AXIS] - 1)
            _fade_in(previous, current, TIME_AXIS, kept.overlap)
        is_last = start == starts[-1]
        length = kept.stride + (1 if previous is None else 0)
        # A copy: a view would keep the whole window alive beside the pieces already handed out.
        yield current if is_last else current.narrow(TIME_AXIS, 0, length).clone()
        previous = current


def map_tiles(
    function: Callable[[Tensor], Tensor], source: Tensor, grid: TileGrid, result_grid: TileGrid
) -> Tensor:
    """`function` over the tiles of `source` [B, C, F, H, W], joined to the whole result."""
    height, width = source.shape[ROW_AXIS:]
    rows: list[list[Tensor]] = []
    for top in grid.rows.starts(height):
        row: list[Tensor] = []
        band = source.narrow(ROW_AXIS, top, min(grid.rows.size, height - top))
        for left in grid.columns.starts(width):
            tile = function(band.narrow(COLUMN_AXIS, left, min(grid.columns.size, width - left)))
            if rows:
                _fade_in(rows[-1][len(row)], tile, ROW_AXIS, result_grid.rows.overlap)
            if row:
                _fade_in(row[-1], tile, COLUMN_AXIS, result_grid.columns.overlap)
            row.append(tile)
        rows.append(row)
    bands = [_join(row, COLUMN_AXIS, result_grid.columns.stride) for row in rows]
    return _join(bands, ROW_AXIS, result_grid.rows.stride)


def _fade_in(before: Tensor, after: Tensor, axis: int, overlap: int) -> None:
    """Blend the first `overlap` entries of `after`, in place, with the last of `before`."""
    shape = [1] * after.ndim
    shape[axis] = overlap
    weight = (torch.arange(overlap, device=after.device, dtype=after.dtype) / overlap).reshape(shape)
    old = before.narrow(axis, before.shape[axis] - overlap, overlap)
    new = after.narrow(axis, 0, overlap)
    new.copy_(old * (1 - weight) + new * weight)


def _join(parts: list[Tensor], axis: int, stride: int) -> Tensor:
    return torch.cat([*(part.narrow(axis, 0, stride) for part in parts[:-1]), parts[-1]], dim=axis)
