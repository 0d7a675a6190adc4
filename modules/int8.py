"""int8 weights: quantising them, and the linear layers that hold them.

Symmetric, without zero points: weight ~ weight8 * scale with whole numbers from -127 to 127. Rotated weights
(`modules.rotation`) have the numbers and scales of ComfyUI's layout `int8_tensorwise` with `convrot`; the
formula is that of Comfy-Org/comfy-kitchen:comfy_kitchen/backends/eager/quantization.py.
Source: Jacob et al. 2018, "Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only
Inference", the symmetric case of section 2.1.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.quantised_linear import (
    CHUNK_ELEMENTS as QUANTISED_AT_ONCE,
)
from modules.quantised_linear import (
    FastProduct,
    QuantisedLinear,
    WeightOnlyProduct,
    finish,
    quantise_with,
    round_up_to_bfloat16,
    row_scales,
    scales_output,
)
from modules.rotation import rotate, rotate_exactly, rotation_block

INT8_MAX = 127

FAST_PRODUCT = FastProduct(form="int8", units="int8", capability=(7, 5), cards="Turing, Ampere")
_FAST_ROWS = 32
"""Fewest tokens of an integer product: on CUDA `_int_mm` refuses 16 and fewer."""
_SMALLEST_SCALE = 1e-30
"""Of a row of zeros."""
CHUNK_ELEMENTS = 2**23
"""Bounds the 32-bit scratch space of an integer product to 32 MiB."""


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to int8 with one scale per row, on its device.

    Returns:
        (weight8 [out, in], scale [out] float32) with weight ~ weight8 * scale[:, None]; see `row_scales`.
    """
    scale = row_scales(weight, INT8_MAX)
    return quantise_with(weight, scale, torch.int8, torch.round), scale


def quantise_rotated_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Rotate a weight [out, in] in float32 and round it to int8 with one scale per row, on its device.

    Returns:
        (weight8 [out, in], scale [out] float32) with weight @ R ~ weight8 * scale[:, None], R in blocks of
        `rotation_block(in)`. A scale is the row's largest number / 127; that of a row with a NaN is NaN.
    """
    quantised = torch.empty_like(weight, dtype=torch.int8)
    scale = torch.empty(weight.shape[0], dtype=torch.float32, device=weight.device)
    if weight.is_meta:
        return quantised, scale
    block = rotation_block(weight.shape[1])
    rows = max(1, QUANTISED_AT_ONCE // max(1, weight.shape[1]))
    for source, target, factor in zip(
        weight.split(rows), quantised.split(rows), scale.split(rows), strict=True
    ):
        rotated = rotate_exactly(source.float(), block)
        torch.div(rotated.abs().amax(dim=1), INT8_MAX, out=factor).clamp_(min=_SMALLEST_SCALE)
        target.copy_(rotated.div_(factor[:, None]).round_())
    return quantised, scale


def check_int8_matmul(device: torch.device) -> None:
    """Refuse devices and builds of torch that cannot multiply in int8.

    Raises:
        ResourceError: see `FastProduct.check`.
    """
    FAST_PRODUCT.check(device, Int8Linear)


class _FastProduct(WeightOnlyProduct):
    """Multiplies in int8; the backward pass is the weight-only one, where precision matters more.

    Sums of products are exact 32-bit integers, of a few tokens at a time.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int
    ) -> Tensor:
        ctx.save_for_backward(weight, scale)
        ctx.rotation = rotation
        on_output = scales_output(x.dtype, scale)
        output = x.new_empty(x.shape[0], weight.shape[0])
        # Equal shares, so that none is left with a few tokens.
        pieces = max(1, -(-x.shape[0] * max(weight.shape) // CHUNK_ELEMENTS))
        for source, target in zip(x.tensor_split(pieces), output.tensor_split(pieces), strict=True):
            tokens, token_scale = _quantise_tokens(rotate(source, rotation))
            sums = _integer_product(tokens, weight)
            if on_output:
                torch.mul(sums, token_scale, out=target)  # rounded to its dtype once
            else:
                target.copy_((sums * token_scale).mul_(scale))
        return finish(output, scale if on_output else None, bias)


class Int8Linear(QuantisedLinear):
    """A frozen linear layer in int8; `check_int8_matmul` says where `use_fast` runs."""

    weight_dtype = torch.int8
    fast_product = _FastProduct
    fast_multiple = 8  # what `_int_mm` asks of both sides of the weight on CUDA
    quantise = staticmethod(quantise_rows)


class RotatedInt8Linear(Int8Linear):
    """The same with the weight stored rotated: loud channels of an input do not set the step of its token."""

    rounds_scales = False  # as the layout has them
    quantise = staticmethod(quantise_rotated_rows)
    rotation_of = staticmethod(rotation_block)


def _integer_product(tokens: Tensor, weight: Tensor) -> Tensor:
    """tokens [N, in] and weight [out, in], both int8 -> their product [N, out], int32."""
    num_tokens = tokens.shape[0]
    if num_tokens < _FAST_ROWS:
        tokens = F.pad(tokens, (0, 0, 0, _FAST_ROWS - num_tokens))
    return torch._int_mm(tokens, weight.t())[:num_tokens]


def _quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, in] -> (int8 [N, in], scale [N, 1] float32), one scale per token."""
    low, high = x.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()).float()
    # The floor keeps a token of zeros finite. A NaN or infinity in a token stays in its scale.
    scale = round_up_to_bfloat16((largest / INT8_MAX).clamp(min=2.0**-100))
    # In float32: halves of a bfloat16 quotient would be rounded a second time.
    return torch.round(x / scale).to(torch.int8), scale
