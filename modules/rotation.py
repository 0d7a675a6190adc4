"""Block Hadamard rotation of the inputs of a linear layer, which spreads loud channels before rounding.

    x W^T = (x R) (W R)^T         R orthogonal: blocks of one regular Hadamard matrix along the diagonal

Of width 4^k the matrix is the k-th Kronecker power of a 4 x 4 matrix, divided by 2^k. It is symmetric, so R
is its own inverse, and all its rows have one sum, so that a mean of all channels does not gather in one.

Source: Huang et al. 2025, "ConvRot" (arXiv 2512.03673); Ashkboos et al. 2024, "QuaRot" (arXiv 2404.00456).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

BLOCKS = (256, 64, 16, 4)
"""The sizes that are chosen from, largest first."""
NO_ROTATION = 1
"""The block of weights that are not rotated."""
LARGEST_READABLE = 1024
"""Of blocks that another program chose; a larger matrix would be a layer of its own."""

_CHUNK_ELEMENTS = 2**23
"""Bounds the scratch space of a rotation in place."""


def rotation_block(width: int) -> int:
    """The largest of `BLOCKS` that divides `width`; `NO_ROTATION` if none does."""
    return next((block for block in BLOCKS if width % block == 0), NO_ROTATION)


def is_readable_block(block: object, width: int) -> bool:
    """Whether a file's weights of this width may be rotated in such blocks."""
    sizes = (4, 16, 64, 256, LARGEST_READABLE)
    return isinstance(block, int) and not isinstance(block, bool) and block in sizes and width % block == 0


def rotate_exactly(values: Tensor, block: int) -> Tensor:
    """float32 [..., width] -> the same rotated, a fresh tensor, by sums and differences alone.

    No matrix product, whose precision a device may lower (TF32), and the same order of sums everywhere: every
    device gives the same numbers.
    """
    rotated = values.clone()
    stride = 1
    while stride < block:
        # One factor of the Kronecker power: each output is the sum of four inputs less twice one of them.
        a, b, c, d = rotated.view(-1, 4, stride).unbind(1)
        total = ((a + b) + (c + d)).mul_(0.5)
        rotated = torch.stack((total - d, total - c, total - b, total - a), dim=1)
        stride *= 4
    return rotated.view(values.shape)


def rotate(x: Tensor, block: int) -> Tensor:
    """x [..., width] -> the same rotated in its dtype, a fresh tensor; x itself without a rotation."""
    if block == NO_ROTATION:
        return x
    return (x.reshape(-1, block) @ hadamard(block, x.dtype, x.device)).view(x.shape)


def rotate_in_place(x: Tensor, block: int) -> Tensor:
    """Contiguous x [N, width], rotated with little more memory than it has."""
    if block == NO_ROTATION:
        return x
    if torch.compiler.is_compiling():
        return rotate(x, block)
    matrix = hadamard(block, x.dtype, x.device)
    for piece in x.view(-1, block).split(_CHUNK_ELEMENTS // block):
        piece.copy_(piece @ matrix)
    return x


@torch.compiler.assume_constant_result
def hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The regular Hadamard matrix [block, block], orthonormal; its entries are exact in every dtype.

    Args:
        block: a power of four.
    """
    return _hadamard(block, dtype, device)


@cache
def _hadamard(block: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    with torch.inference_mode(mode=False):
        return rotate_exactly(torch.eye(block, dtype=torch.float32, device=device), block).to(dtype)
