"""The block Hadamard rotation: the matrix, its blocks, and what it does for loud channels."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules import rotation
from modules.int8 import Int8Linear, RotatedInt8Linear, quantise_rotated_rows
from modules.quantised_linear import QuantisedLinear
from modules.rotation import (
    BLOCKS,
    NO_ROTATION,
    hadamard,
    is_readable_block,
    rotate,
    rotate_exactly,
    rotate_in_place,
    rotation_block,
)
from networks.fused_lora import LowRankLayer, fused_lora

CPU = torch.device("cpu")
FACTOR = torch.tensor([[1, 1, 1, -1], [1, 1, -1, 1], [1, -1, 1, 1], [-1, 1, 1, 1]]).float()
WIDTHS = {
    "Lite": ((1792, 1792), (7168, 1792), (1792, 7168)),
    "Pro": ((4096, 4096), (16384, 4096), (4096, 16384)),
}
"""[out, in] of the layers in the blocks."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def kronecker(block: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < block:
        matrix = torch.kron(matrix, FACTOR)
    return matrix / block**0.5


@pytest.mark.parametrize("block", BLOCKS)
def test_the_matrix_is_the_kronecker_power_of_the_published_one(block: int) -> None:
    matrix = hadamard(block, torch.float32, CPU)
    assert torch.equal(matrix, kronecker(block))
    assert torch.equal(matrix @ matrix, torch.eye(block))
    assert torch.equal(matrix, matrix.t())
    assert matrix.sum(dim=0).unique().tolist() == [1.0]  # regular
    assert torch.equal(hadamard(block, torch.bfloat16, CPU).float(), matrix)


def test_every_width_of_the_models_has_blocks_of_256_and_smaller_ones_the_largest_that_fits() -> None:
    assert {rotation_block(width) for sizes in WIDTHS.values() for _, width in sizes} == {256}
    assert [rotation_block(width) for width in (128, 64, 48, 12, 6, 1)] == [64, 64, 16, 4, NO_ROTATION, 1]


def test_blocks_of_other_programs_are_powers_of_four_that_divide_the_width() -> None:
    assert [block for block in range(2048) if is_readable_block(block, 4096)] == [4, 16, 64, 256, 1024]
    assert not is_readable_block(256, 128)
    assert not any(is_readable_block(block, 4096) for block in (True, "256", 256.0, None, 4096))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_ways_to_rotate_agree_and_undo_themselves(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rotation, "_CHUNK_ELEMENTS", 700)
    x = draw(3, 5, 512).to(dtype)
    exact = (x.double().view(-1, 256) @ kronecker(256).double()).view(x.shape)
    limit = {torch.float32: 1e-6, torch.bfloat16: 3e-3}[dtype]
    for rotated in (
        rotate(x, 256),
        rotate_in_place(x.clone().view(15, 512), 256),
        rotate_exactly(x.float(), 256),
    ):
        rotated = rotated.view(x.shape)
        assert (rotated - exact).norm() / exact.norm() < limit
        assert (rotate_exactly(rotated.float(), 256) - x).norm() / x.norm() < 2 * limit
    assert rotate(x, NO_ROTATION) is x
    assert rotate_in_place(x, NO_ROTATION) is x


def test_weights_are_the_integers_of_the_published_formula() -> None:
    """W_rot = W H in blocks, scale = max |row| / 127, rounded to the nearest even integer."""
    weight = draw(96, 512).bfloat16()
    weight[7] = 0
    weight8, scale = quantise_rotated_rows(weight)
    rotated = (weight.double().view(-1, 256) @ kronecker(256).double()).view(weight.shape)
    exact = (rotated.abs().amax(dim=1) / 127).clamp(min=1e-30)
    torch.testing.assert_close(scale, exact.float(), rtol=3e-7, atol=0)
    assert torch.equal(weight8.double(), (rotated / exact[:, None]).round())
    assert weight8.abs().amax(dim=1).tolist() == [127] * 7 + [0] + [127] * 88


def test_a_row_by_hand() -> None:
    """[8, 0, 0, 0] rotates to [4, 4, 4, -4]; [3, 1, 0, 0] to [2, 2, 1, -1] and steps of 2 / 127."""
    weight8, scale = quantise_rotated_rows(torch.tensor([[8.0, 0, 0, 0], [3, 1, 0, 0]]))
    assert weight8.tolist() == [[127, 127, 127, -127], [127, 127, 64, -64]]
    assert scale.tolist() == pytest.approx([4 / 127, 2 / 127])


def relative(got: Tensor, exact: Tensor) -> float:
    return float(((got.double() - exact).norm() / exact.norm()).detach())


def errors(kind: type[QuantisedLinear], shape: tuple[int, int], loud: str) -> tuple[float, float]:
    """Of output and input gradient of the fast product, bfloat16, 64 tokens."""
    out, width = shape
    weight, x = draw(out, width).bfloat16(), draw(64, width, seed=1)
    grad = draw(64, out, seed=2).bfloat16()
    if loud == "many":
        x[:, ::64] *= 20
    elif loud == "one":
        x[:, 5] *= 100
    x = x.bfloat16().requires_grad_()
    layer = kind(*kind.quantise(weight), None, compute_dtype=torch.bfloat16, use_fast=True)
    assert layer.use_fast
    output = layer(x)
    output.backward(grad)
    assert x.grad is not None
    exact = relative(output, x.detach().double() @ weight.double().t())
    return exact, relative(x.grad, grad.double() @ weight.double())


@pytest.mark.parametrize("width", [1792, 4096])
def test_loud_channels_cost_rotated_products_nothing(width: int) -> None:
    """With few rows and without the widest input; `bench_numerics.py` takes the layers whole."""
    shape = (16, width)
    for loud, least_without in (("none", 0.0), ("many", 3e-2), ("one", 7e-2)):
        output, gradient = errors(RotatedInt8Linear, shape, loud)
        assert output < 1.6e-2
        assert gradient < 1.1e-2
        assert errors(Int8Linear, shape, loud)[0] > least_without


@pytest.mark.slow
@pytest.mark.parametrize("shape", [shape for sizes in WIDTHS.values() for shape in sizes])
def test_loud_channels_cost_nothing_in_every_layer_of_the_models(shape: tuple[int, int]) -> None:
    for loud in ("none", "many", "one"):
        output, gradient = errors(RotatedInt8Linear, shape, loud)
        assert output < 1.7e-2
        assert gradient < 1.1e-2


def test_a_lora_sees_the_input_as_it_is() -> None:
    """Beside a layer whose product is rotated, the change and its gradients are those of plain factors."""
    weight, x = draw(48, 64) / 8, draw(40, 64, seed=1)
    base = RotatedInt8Linear(
        *RotatedInt8Linear.quantise(weight), None, compute_dtype=torch.float32, use_fast=True
    )
    down, up = (draw(*shape, seed=seed).requires_grad_() for shape, seed in (((4, 64), 2), ((48, 4), 3)))
    x.requires_grad_()
    (output,) = fused_lora(x, [LowRankLayer(base, down, up, 0.5)])
    change = 0.5 * (x @ down.t()) @ up.t()
    torch.testing.assert_close(output - base(x), change, rtol=1e-5, atol=1e-5)
    given = draw(40, 48, seed=4)
    got = torch.autograd.grad(output, [down, up, x], given)
    wanted = torch.autograd.grad(change, [down, up, x], given)
    torch.testing.assert_close(got[0], wanted[0])
    torch.testing.assert_close(got[1], wanted[1])
    torch.testing.assert_close(got[2], wanted[2] + base.input_gradient(given), rtol=1e-5, atol=1e-4)
