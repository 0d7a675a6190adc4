"""Linear layers of one byte per weight, float8 and int8 alike: error, memory and dtypes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules import int8
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.quantised_linear import (
    QuantisedLinear,
    dequantise,
    quantise_with,
    round_up_to_bfloat16,
    row_scales,
)
from tests.float8_products import needs_float8_products

OUT, IN, TOKENS = 48, 64, 40
KINDS = [
    pytest.param(Fp8Linear, id="fp8"),
    pytest.param(Int8Linear, id="int8"),
    pytest.param(RotatedInt8Linear, id="rotated"),
]
FAST_KINDS = [
    pytest.param(Fp8Linear, id="fp8", marks=needs_float8_products),
    pytest.param(Int8Linear, id="int8"),
    pytest.param(RotatedInt8Linear, id="rotated"),
]
WIDTH = 1792
"""Of Lite; the largest of so many normal numbers sets a row's scale."""
WEIGHT_ERROR = {Fp8Linear: 2.7e-2, Int8Linear: 8.5e-3, RotatedInt8Linear: 8.5e-3}
"""Of a row of normal weights of that width, relative to its norm: 2.65e-2 and 8.3e-3 are measured."""
FAST_ERROR = {Fp8Linear: 3.9e-2, Int8Linear: 1.3e-2, RotatedInt8Linear: 1.3e-2}
"""Of an output when normal tokens are rounded too."""


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(
    kind: type[QuantisedLinear], dtype: torch.dtype, *, use_fast: bool = False, has_bias: bool = True
) -> QuantisedLinear:
    weight8, scale = kind.quantise(draw(OUT, IN) / 8)
    bias = draw(OUT, seed=1) if has_bias else None
    return kind(weight8, scale, bias, compute_dtype=dtype, use_fast=use_fast)


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm().detach() / expected.norm().detach())


def test_rounding_up_gives_the_next_bfloat16() -> None:
    values = torch.tensor([1.0, 1.001, 3e-9, 1e-40, 65504.0])
    rounded = round_up_to_bfloat16(values)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded >= values).all()
    assert (rounded[:3] <= values[:3] * (1 + 2**-7)).all()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_and_outputs_keep_to_the_stated_error(kind: type[QuantisedLinear]) -> None:
    """The error of the output is that of the weight: rounding errors of a row are independent."""
    weight = draw(64, WIDTH) * torch.logspace(-6, 3, 64)[:, None]
    weight8, scale = kind.quantise(weight)
    assert (weight8.dtype, scale.dtype, scale.shape) == (kind.weight_dtype, torch.float32, (64,))
    restored = dequantise(weight8, scale, torch.float32, kind.rotation_of(WIDTH))
    errors = (restored - weight).norm(dim=1) / weight.norm(dim=1)
    assert float(errors.square().mean().sqrt()) < WEIGHT_ERROR[kind]
    x = draw(256, WIDTH, seed=2)
    exact, plain = x @ weight.t(), kind(weight8, scale, None, compute_dtype=torch.float32)(x)
    assert float(((plain - exact).norm(dim=0) / exact.norm(dim=0)).mean()) < 1.05 * WEIGHT_ERROR[kind]


@pytest.mark.parametrize("kind", FAST_KINDS)
def test_outputs_of_rounded_tokens_keep_to_the_stated_error(kind: type[QuantisedLinear]) -> None:
    weight = draw(64, WIDTH) * torch.logspace(-6, 3, 64)[:, None]
    x = draw(256, WIDTH, seed=2)
    exact = x @ weight.t()
    fast = kind(*kind.quantise(weight), None, compute_dtype=torch.float32, use_fast=True)
    assert fast.use_fast
    assert float(((fast(x) - exact).norm(dim=0) / exact.norm(dim=0)).mean()) < FAST_ERROR[kind]


def test_int8_is_nearer_to_the_weights_than_float8() -> None:
    weight = draw(64, WIDTH)
    float8, whole = (relative_error(dequantise(*k.quantise(weight), torch.float32), weight)
                     for k in (Fp8Linear, Int8Linear))  # fmt: skip
    assert whole < 0.35 * float8


@pytest.mark.parametrize("kind", KINDS)
def test_zero_rows_and_long_matrices_are_quantised(
    kind: type[QuantisedLinear], monkeypatch: pytest.MonkeyPatch
) -> None:
    weight = draw(OUT, IN)
    weight[3] = 0
    whole = kind.quantise(weight)
    monkeypatch.setattr("modules.quantised_linear.CHUNK_ELEMENTS", 7 * IN)
    monkeypatch.setattr("modules.int8.QUANTISED_AT_ONCE", 7 * IN)
    pieces = kind.quantise(weight)
    assert torch.equal(whole[0].float(), pieces[0].float())
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(dequantise(*whole, torch.float32, kind.rotation_of(IN))[3], torch.zeros(IN))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_weight_that_is_not_finite_shows_in_every_output(kind: type[QuantisedLinear], value: float) -> None:
    weight = draw(OUT, IN)
    weight[3, 5] = value
    output = kind(*kind.quantise(weight), None, compute_dtype=torch.bfloat16)(draw(TOKENS, IN).bfloat16())
    assert not output[:, 3].isfinite().any()
    assert output[:, 4:].isfinite().all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_forward_and_input_gradient_are_those_of_the_stored_weight(
    kind: type[QuantisedLinear], dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    linear = layer(kind, dtype, has_bias=has_bias)
    x = draw(2, TOKENS, IN, seed=2).to(dtype).requires_grad_()
    grad = draw(2, TOKENS, OUT, seed=3).to(dtype)
    output = linear(x)
    output.backward(grad)
    assert x.grad is not None
    assert (output.dtype, x.grad.dtype) == (dtype, dtype)
    weight = dequantise(linear.weight, linear.scale_weight, torch.float32, linear.rotation)
    bias = None if linear.bias is None else linear.bias.float()
    assert relative_error(output, F.linear(x.float(), weight, bias)) < tolerance
    assert relative_error(x.grad, grad.float() @ weight) < tolerance
    assert torch.equal(linear.input_gradient(grad.flatten(0, 1)), x.grad.flatten(0, 1))


@pytest.mark.parametrize("kind", FAST_KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_product_is_that_of_quantised_tokens(
    kind: type[QuantisedLinear], dtype: torch.dtype
) -> None:
    linear = layer(kind, dtype, use_fast=True)
    assert linear.use_fast
    x = draw(2, TOKENS, IN, seed=2).to(dtype)
    x[0, 0] = 0
    x.requires_grad_()
    output = linear(x)
    assert output.dtype == dtype
    assert output.isfinite().all()
    weight = dequantise(linear.weight, linear.scale_weight, torch.float32, linear.rotation)
    assert linear.bias is not None
    exact = F.linear(x.float(), weight, linear.bias.float())
    assert relative_error(output, exact) < FAST_ERROR[kind]
    output.backward(torch.ones_like(output))
    assert x.grad is not None
    # The backward pass rounds nothing but its results.
    assert relative_error(x.grad, torch.ones(2, TOKENS, OUT) @ weight) < 6e-3


@pytest.mark.parametrize("kind", KINDS)
def test_the_fast_product_is_left_out_where_the_sizes_do_not_fit(kind: type[QuantisedLinear]) -> None:
    weight8, scale = kind.quantise(draw(OUT, 60))
    assert not kind(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=True).use_fast


class Watch(TorchDispatchMode):
    """Notes operators whose result is wider than two bytes and larger than `allowed` elements."""

    def __init__(self, allowed: int) -> None:
        super().__init__()
        self.allowed = allowed
        self.wide: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype.itemsize > 2 and result.numel() > self.allowed:
            self.wide.append(str(func))
        return result


@pytest.mark.parametrize(
    ("kind", "use_fast"),
    [
        pytest.param(Fp8Linear, False, id="fp8"),
        pytest.param(Int8Linear, False, id="int8"),
        pytest.param(Fp8Linear, True, id="fp8 fast", marks=needs_float8_products),
        pytest.param(Int8Linear, True, id="int8 fast"),
        pytest.param(RotatedInt8Linear, False, id="rotated"),
        pytest.param(RotatedInt8Linear, True, id="rotated fast"),
    ],
)
def test_nothing_is_wider_than_the_compute_dtype_and_one_byte_per_weight_is_kept(
    kind: type[QuantisedLinear], use_fast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    linear = layer(kind, torch.bfloat16, use_fast=use_fast)
    tokens, allowed = TOKENS, max(OUT, TOKENS)
    if issubclass(kind, Int8Linear) and use_fast:
        # Integer sums are 32 bits wide: a bounded number of tokens at a time.
        tokens, allowed = 40 * int8._FAST_ROWS, int8._FAST_ROWS * IN
        monkeypatch.setattr("modules.int8.CHUNK_ELEMENTS", allowed)
    x = draw(tokens, IN, seed=2).bfloat16().requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.dtype.itemsize)
        return tensor

    watch = Watch(allowed)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watch:
        linear(x).sum().backward()
    assert watch.wide == []
    # The one-byte weight and its row scales, in bfloat16 where they were rounded to it.
    assert sum(kept) == OUT * IN + (2 if kind.rounds_scales else 4) * OUT


@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_frozen_parameters_of_one_byte(kind: type[QuantisedLinear]) -> None:
    linear = layer(kind, torch.bfloat16)
    assert not any(p.requires_grad for p in linear.parameters())
    assert linear.weight.dtype == kind.weight_dtype
    assert linear.weight.dtype.itemsize == 1
    assert set(linear.state_dict()) == {"weight", "scale_weight", "bias"}


def test_scales_bring_the_largest_of_each_row_to_the_limit() -> None:
    weight = draw(OUT, IN)
    grid = quantise_with(weight, row_scales(weight, 100.0), torch.float32, lambda values: values)
    largest = grid.abs().amax(dim=1)
    assert largest.max() <= 100
    assert largest.min() > 99.2


@pytest.mark.parametrize("kind", KINDS)
def test_a_weight_without_data_is_not_rounded_piece_by_piece(kind: type[QuantisedLinear]) -> None:
    """A memory plan does this to every layer; Pro's largest would take 240 pieces."""

    class Counting(TorchDispatchMode):
        operators = 0

        def __torch_dispatch__(
            self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
        ) -> Any:
            self.operators += 1
            return func(*args, **(kwargs or {}))

    weight = torch.empty(16384, 4096, dtype=torch.bfloat16, device="meta")
    with Counting() as counting:
        weight8, scale = kind.quantise(weight)
    assert (weight8.shape, scale.shape) == (weight.shape, (16384,))
    assert weight8.element_size() == 1
    assert counting.operators < 50
