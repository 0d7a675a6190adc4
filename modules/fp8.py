"""float8 weights: quantising them, and the linear layer that holds them.

Formats: Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from modules.quantised_linear import (
    FastProduct,
    QuantisedLinear,
    WeightOnlyProduct,
    quantise_with,
    round_up_to_bfloat16,
    row_scales,
)
from modules.rotation import rotate

FP8_DTYPE = torch.float8_e4m3fn
FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
FP8_MAX = torch.finfo(FP8_DTYPE).max

FAST_PRODUCT = FastProduct(form="fp8", units="float8", capability=(8, 9), cards="Ada, Hopper")


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to float8_e4m3fn with one scale per row, on its device.

    Returns:
        (weight8 [out, in], scale [out] float32) with weight ~ weight8 * scale[:, None]; see `row_scales`.
    """
    scale = row_scales(weight, FP8_MAX)
    return quantise_with(weight, scale, FP8_DTYPE, lambda values: values), scale


def quantise_like(
    values: Tensor, dtype: torch.dtype, scale_shape: tuple[int, ...] | None
) -> tuple[Tensor, Tensor | None]:
    """Round float32 values [out, in] to a float8 type with scales of a given layout.

    Args:
        scale_shape: one of the shapes that `dequantise` takes; None for a plain cast, which saturates.
    Returns:
        (weight [out, in], scale float32 of `scale_shape` or None).
    """
    limit = torch.finfo(dtype).max
    if scale_shape is None:
        return values.clamp(-limit, limit).to(dtype), None
    groups = torch.Size(scale_shape).numel()
    grouped = values.reshape(groups, -1)
    scale = grouped.abs().amax(dim=1, keepdim=True) / limit
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    return (grouped / scale).to(dtype).view(values.shape), scale.view(scale_shape)


def check_fp8_matmul(device: torch.device) -> None:
    """Refuse devices and builds of torch that cannot multiply in float8.

    Raises:
        ResourceError: see `FastProduct.check`.
    """
    FAST_PRODUCT.check(device, Fp8Linear)


class _FastProduct(WeightOnlyProduct):
    """Multiplies in float8; the backward pass is the weight-only one, where precision matters more."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.rotation = rotation
        tokens, token_scale = _quantise_tokens(rotate(x, rotation))
        # Row-wise scales give bfloat16 on CUDA; only the CPU knows other types.
        out_dtype = x.dtype if x.device.type == "cpu" else torch.bfloat16
        output = torch._scaled_mm(
            tokens,
            weight.t(),
            scale_a=token_scale,
            scale_b=scale.float()[None],
            bias=None if bias is None else bias.to(out_dtype),
            out_dtype=out_dtype,
            use_fast_accum=True,
        )
        return output.to(x.dtype)


class Fp8Linear(QuantisedLinear):
    """A frozen linear layer in float8; `check_fp8_matmul` says where `use_fast` runs."""

    weight_dtype = FP8_DTYPE
    fast_product = _FastProduct
    fast_multiple = 16  # what `_scaled_mm` asks of both sides of the weight
    quantise = staticmethod(quantise_rows)


def _quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, in] -> (float8 [N, in], scale [N, 1] float32), one scale per token."""
    low, high = x.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()).float()
    # The floor keeps a token of zeros, and the reciprocal of its scale, finite in every compute dtype.
    scale = round_up_to_bfloat16((largest / FP8_MAX).clamp(min=2.0**-14))
    return (x / scale.to(x.dtype)).to(FP8_DTYPE), scale
