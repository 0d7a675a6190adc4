"""Linear layers whose frozen weights take one byte each: float8 with a scale per output row.

    y = (x @ W8^T) * scale + bias          W8 widened to the dtype of x for the product, nothing wider

The product runs in the activations' dtype on exactly the stored numbers (every float8 value is a bfloat16
and a float16 value too), and the row scale multiplies the output instead of every element of the weight.
Formats: Micikevicius et al. 2022, "FP8 formats for deep learning".
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modules.errors import ResourceError

FP8_DTYPE = torch.float8_e4m3fn
FP8_DTYPES = frozenset({torch.float8_e4m3fn, torch.float8_e5m2})
FP8_MAX = torch.finfo(FP8_DTYPE).max

_CHUNK_ELEMENTS = 2**21  # bounds the float32 scratch space of quantisation to 16 MiB
_FAST_MULTIPLE = 16  # what `_scaled_mm` wants both sides of the weight to be a multiple of
_FAST_CAPABILITY = (8, 9)


def quantise_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight [out, in] to float8_e4m3fn with one scale per row, on the device it lies on.

    Returns:
        (weight8 [out, in], scale [out] float32) with weight ~ weight8 * scale[:, None]. Scales are rounded
        up to a bfloat16 number, so that multiplying bfloat16 outputs by them needs no wider type.
    """
    low, high = weight.aminmax(dim=1)
    largest = torch.maximum(low.abs(), high.abs()).float()
    scale = round_up_to_bfloat16(largest / FP8_MAX)
    scale = torch.where(scale > 0, scale, torch.ones_like(scale))
    quantised = torch.empty_like(weight, dtype=FP8_DTYPE)
    rows = max(1, _CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for target, source, divisor in zip(
        quantised.split(rows), weight.split(rows), scale.split(rows), strict=True
    ):
        target.copy_(source.float() / divisor[:, None])
    return quantised, scale


def round_up_to_bfloat16(values: Tensor) -> Tensor:
    """The smallest bfloat16 numbers that are not below positive float32 `values`, as float32."""
    bits = values.view(torch.int32)
    return torch.bitwise_and(bits + 0xFFFF, ~0xFFFF).view(torch.float32)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """weight [out, in] of any float8 type times its scale, rounded to `dtype` once.

    Args:
        scale: [] or [1] for the tensor, [out] or [out, 1] per row, [out, blocks] or [out, blocks, 1] for
            blocks of neighbours in a row.
    """
    out_features, in_features = weight.shape
    scale = normalise_scale(scale, out_features)
    blocks = 1 if scale.ndim == 1 else scale.shape[1]
    values = weight.float().view(out_features, blocks, in_features // blocks)
    return values.mul_(scale.view(out_features, blocks, 1)).view(out_features, in_features).to(dtype)


def normalise_scale(scale: Tensor, out_features: int) -> Tensor:
    """A scale as checkpoints hold it -> float32 [out], or [out, blocks] for more than one block per row.

    Raises:
        ValueError: the shape is none of those that `dequantise` names.
    """
    values = scale.float()
    if values.numel() == 1:
        return values.reshape(1).expand(out_features).contiguous()
    if values.ndim == 3 and values.shape[2] == 1:
        values = values.squeeze(2)
    if values.ndim == 2 and values.shape[1] == 1:
        values = values.squeeze(1)
    if values.ndim not in {1, 2} or values.shape[0] != out_features:
        raise ValueError(f"a scale of shape {list(scale.shape)} does not fit {out_features} rows")
    return values


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
    """Refuse devices without float8 matrix units.

    Raises:
        ResourceError: the device is not a CUDA device of compute capability 8.9 or later.
    """
    if device.type != "cuda":
        raise ResourceError(f"--fp8_fast needs a CUDA device with float8 units, not {device.type}")
    capability = torch.cuda.get_device_capability(device)
    if capability < _FAST_CAPABILITY:
        name = torch.cuda.get_device_name(device)
        raise ResourceError(
            f"--fp8_fast needs compute capability 8.9 (Ada, Hopper) or later; {name} has "
            f"{capability[0]}.{capability[1]}. Leave --fp8_fast out: --fp8_base alone works on every card."
        )


class Fp8Linear(nn.Module):
    """A frozen linear layer stored in float8 and computed in the dtype of its input.

    Args:
        weight: [out, in], a float8 type.
        scale: float32, [out] per row or [out, blocks] per block.
        bias: [out] or None.
        compute_dtype: dtype of the activations it will see.
        use_fast: multiply in float8 with inputs quantised per token; `check_fp8_matmul` says where that runs.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        compute_dtype: torch.dtype,
        use_fast: bool = False,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        # Kept in the compute dtype where that is exact, so that no step mixes dtypes.
        is_exact = compute_dtype == torch.bfloat16 and torch.equal(scale.bfloat16().float(), scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale_weight = nn.Parameter(scale.bfloat16() if is_exact else scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(compute_dtype), requires_grad=False)
        fits = self.in_features % _FAST_MULTIPLE == 0 and self.out_features % _FAST_MULTIPLE == 0
        self.use_fast = use_fast and fits and scale.ndim == 1 and weight.dtype == FP8_DTYPE

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the compute dtype."""
        function = _FastLinear if self.use_fast else _WeightOnlyLinear
        flat = function.apply(x.reshape(-1, self.in_features), self.weight, self.scale_weight, self.bias)
        return flat.view(*x.shape[:-1], self.out_features)

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad [N, out] -> [N, in], a fresh tensor: what the backward pass returns, without autograd."""
        return _input_gradient(grad, self.weight, self.scale_weight)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, fast={self.use_fast}"


def _scales_output(dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether the row scale is applied to the output rather than to the weight.

    Not for blocks, and not in float16, where the unscaled products would overflow.
    """
    return scale.ndim == 1 and dtype != torch.float16


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the compute dtype, with its scale unless `_scales_output`: [out, in]."""
    wide = weight.to(dtype)
    if _scales_output(dtype, scale):
        return wide
    out_features, in_features = weight.shape
    blocks = wide.view(out_features, scale.numel() // out_features, -1)
    blocks.mul_(scale.view(out_features, -1, 1))  # in place: rounds to dtype, makes nothing wider
    return blocks.view(out_features, in_features)


def _input_gradient(grad: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """grad [N, out] -> [N, in] through the weight that the forward pass used."""
    if _scales_output(grad.dtype, scale):
        grad = torch.mul(grad, scale, out=torch.empty_like(grad))
    return grad @ _widened(weight, scale, grad.dtype)


def _finish(output: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply row scale and bias to a fresh output [N, out], in its own dtype."""
    if scale is not None and bias is not None and scale.dtype == output.dtype:
        return torch.addcmul(bias, output, scale)
    if scale is not None:
        output.mul_(scale)
    return output if bias is None else output.add_(bias)


class _WeightOnlyLinear(torch.autograd.Function):
    """Keeps the float8 weight for the backward pass instead of its widened copy."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        output = x @ _widened(weight, scale, x.dtype).t()
        return _finish(output, scale if _scales_output(x.dtype, scale) else None, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None]:
        weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        return _input_gradient(grads[0], weight, scale) if needed else None, None, None, None


class _FastLinear(_WeightOnlyLinear):
    """Multiplies in float8; the backward pass is the weight-only one, where precision matters more."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight, scale)
        tokens, token_scale = _quantise_tokens(x)
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


def _quantise_tokens(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, in] -> (float8 [N, in], scale [N, 1] float32), one scale per token."""
    low, high = x.aminmax(dim=1, keepdim=True)
    largest = torch.maximum(low.abs(), high.abs()).float()
    # The floor keeps a token of zeros, and the reciprocal of its scale, finite in every compute dtype.
    scale = round_up_to_bfloat16((largest / FP8_MAX).clamp(min=2.0**-14))
    return (x / scale.to(x.dtype)).to(FP8_DTYPE), scale
