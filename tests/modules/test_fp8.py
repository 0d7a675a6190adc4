"""Linear layers in float8: exactness, memory and dtypes."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from modules.errors import ResourceError
from modules.fp8 import (
    FP8_DTYPE,
    Fp8Linear,
    check_fp8_matmul,
    dequantise,
    normalise_scale,
    quantise_rows,
    round_up_to_bfloat16,
)

OUT, IN, TOKENS = 48, 64, 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype, *, use_fast: bool = False, has_bias: bool = True) -> Fp8Linear:
    weight8, scale = quantise_rows(draw(OUT, IN) / 8)
    bias = draw(OUT, seed=1) if has_bias else None
    return Fp8Linear(weight8, scale, bias, compute_dtype=dtype, use_fast=use_fast)


def reference(linear: Fp8Linear, x: Tensor) -> Tensor:
    weight = dequantise(linear.weight, linear.scale_weight, torch.float32)
    return F.linear(x.float(), weight, None if linear.bias is None else linear.bias.float())


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm().detach() / expected.norm().detach())


def test_rounding_up_gives_the_next_bfloat16() -> None:
    values = torch.tensor([1.0, 1.001, 3e-9, 1e-40, 65504.0])
    rounded = round_up_to_bfloat16(values)
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert (rounded >= values).all()
    assert (rounded[:3] <= values[:3] * (1 + 2**-7)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantising_keeps_each_row_within_the_stated_error(dtype: torch.dtype) -> None:
    weight = (draw(OUT, IN) * torch.logspace(-6, 3, OUT)[:, None]).to(dtype)
    weight8, scale = quantise_rows(weight)
    assert (weight8.dtype, scale.dtype, scale.shape) == (FP8_DTYPE, torch.float32, (OUT,))
    restored = dequantise(weight8, scale, torch.float32)
    errors = (restored - weight.float()).norm(dim=1) / weight.float().norm(dim=1)
    assert errors.max() < 3.5e-2
    assert relative_error(restored, weight.float()) < 2.9e-2


def test_zero_rows_and_long_matrices_are_quantised(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = draw(OUT, IN)
    weight[3] = 0
    whole = quantise_rows(weight)
    monkeypatch.setattr("modules.fp8._CHUNK_ELEMENTS", 7 * IN)
    pieces = quantise_rows(weight)
    assert torch.equal(whole[0].float(), pieces[0].float())
    assert torch.equal(whole[1], pieces[1])
    assert torch.equal(dequantise(*whole, torch.float32)[3], torch.zeros(IN))


@pytest.mark.parametrize("has_bias", [True, False])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 6e-3), (torch.float16, 1e-3)]
)
def test_forward_and_input_gradient_are_those_of_the_stored_weight(
    dtype: torch.dtype, tolerance: float, has_bias: bool
) -> None:
    linear = layer(dtype, has_bias=has_bias)
    x = draw(2, TOKENS, IN, seed=2).to(dtype).requires_grad_()
    grad = draw(2, TOKENS, OUT, seed=3).to(dtype)
    output = linear(x)
    output.backward(grad)
    assert (output.dtype, x.grad.dtype) == (dtype, dtype)  # type: ignore[union-attr]
    assert relative_error(output, reference(linear, x)) < tolerance
    weight = dequantise(linear.weight, linear.scale_weight, torch.float32)
    assert relative_error(x.grad, grad.float() @ weight) < tolerance  # type: ignore[arg-type]


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1), (OUT, 4), (OUT, 4, 1)])
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_every_checkpoint_layout_are_computed_with(
    shape: tuple[int, ...], weight_dtype: torch.dtype
) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.01  # no bfloat16 numbers
    weight8 = draw(OUT, IN).to(weight_dtype)
    blocks = weight8.float().view(OUT, 4, IN // 4)
    by_block = scale.reshape(1, 1, 1) if scale.numel() == 1 else scale.reshape(OUT, -1, 1)
    weight = (blocks * by_block).view(OUT, IN)
    assert torch.equal(dequantise(weight8, scale, torch.float32), weight)
    x = draw(TOKENS, IN, seed=2).requires_grad_()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        linear = Fp8Linear(weight8, normalise_scale(scale, OUT), None, compute_dtype=dtype)
        inputs = x.detach().to(dtype).requires_grad_()
        output = linear(inputs)
        output.sum().backward()
        assert output.dtype == dtype
        assert relative_error(output.detach(), inputs.detach().float() @ weight.t()) < tolerance
        assert relative_error(inputs.grad, torch.ones(TOKENS, OUT) @ weight) < tolerance  # type: ignore[arg-type]


def test_a_scale_that_fits_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 48 rows"):
        normalise_scale(torch.ones(7), OUT)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_fast_product_is_that_of_quantised_tokens(dtype: torch.dtype) -> None:
    linear = layer(dtype, use_fast=True)
    assert linear.use_fast
    x = draw(2, TOKENS, IN, seed=2).to(dtype)
    x[0, 0] = 0
    x.requires_grad_()
    output = linear(x)
    assert output.dtype == dtype
    assert output.isfinite().all()
    assert relative_error(output, reference(linear, x)) < 4e-2
    output.backward(torch.ones_like(output))
    weight = dequantise(linear.weight, linear.scale_weight, torch.float32)
    exact = torch.ones(2, TOKENS, OUT) @ weight
    assert relative_error(x.grad, exact) < 6e-3  # type: ignore[arg-type]


def test_the_fast_product_is_left_out_where_the_sizes_do_not_fit() -> None:
    weight8, scale = quantise_rows(draw(OUT, 60))
    assert not Fp8Linear(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=True).use_fast


class Watch(TorchDispatchMode):
    """Notes operators whose result is wider than two bytes and larger than a scale or bias."""

    def __init__(self) -> None:
        super().__init__()
        self.wide: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.dtype.itemsize > 2 and result.numel() > max(OUT, TOKENS):
            self.wide.append(str(func))
        return result


@pytest.mark.parametrize("use_fast", [False, True])
def test_nothing_is_wider_than_the_compute_dtype_and_one_byte_per_weight_is_kept(use_fast: bool) -> None:
    linear = layer(torch.bfloat16, use_fast=use_fast)
    x = draw(TOKENS, IN, seed=2).bfloat16().requires_grad_()
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.dtype.itemsize)
        return tensor

    watch = Watch()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), watch:
        linear(x).sum().backward()
    assert watch.wide == []
    assert sum(kept) == OUT * IN + 2 * OUT  # the float8 weight and its bfloat16 row scales


def test_the_weights_are_frozen_parameters_of_one_byte() -> None:
    linear = layer(torch.bfloat16)
    assert not any(p.requires_grad for p in linear.parameters())
    assert linear.weight.dtype == FP8_DTYPE
    assert set(linear.state_dict()) == {"weight", "scale_weight", "bias"}


def test_the_fast_product_is_refused_without_float8_units() -> None:
    with pytest.raises(ResourceError, match="--fp8_fast"):
        check_fp8_matmul(torch.device("cpu"))
