"""Frozen linear layers whose weights take one byte each: code shared by float8 and int8.

    y = (x @ W8^T) * scale + bias          W8 widened to the dtype of x for the product, nothing wider

The product runs in the activations' dtype on exactly the stored numbers (every float8 value and every int8
value is a bfloat16 and a float16 value too), and the row scale multiplies the output instead of every element
of the weight. Weights may be stored rotated (`modules.rotation`): their inputs are then rotated before the
product, and the gradient of the inputs after it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from modules.errors import ResourceError
from modules.rotation import NO_ROTATION, rotate, rotate_exactly, rotate_in_place

CHUNK_ELEMENTS = 2**19  # bounds the float32 scratch space of quantisation to a few MiB


def row_scales(weight: Tensor, limit: float) -> Tensor:
    """The scale [out], float32, that brings the largest number of each row of [out, in] to `limit` or below.

    Scales are rounded up to a bfloat16 number, so that multiplying bfloat16 outputs by them needs no wider
    type. A row of zeros has scale 1; a row with a NaN has a NaN for a scale, which every product shows.
    """
    low, high = weight.aminmax(dim=1)
    largest = torch.maximum(low.abs(), high.abs()).float()
    scale = round_up_to_bfloat16(largest / limit)
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def quantise_with(
    weight: Tensor, scale: Tensor, dtype: torch.dtype, to_grid: Callable[[Tensor], Tensor]
) -> Tensor:
    """weight [out, in] / scale [out, 1], put on the grid of `dtype` by `to_grid`, in pieces of few rows."""
    quantised = torch.empty_like(weight, dtype=dtype)
    if weight.is_meta:  # thousands of pieces without data to round
        return quantised
    rows = max(1, CHUNK_ELEMENTS // max(1, weight.shape[1]))
    for target, source, divisor in zip(
        quantised.split(rows), weight.split(rows), scale.split(rows), strict=True
    ):
        target.copy_(to_grid(source.float() / divisor[:, None]))
    return quantised


def round_up_to_bfloat16(values: Tensor) -> Tensor:
    """The smallest bfloat16 numbers that are not below positive float32 `values`, as float32; NaN stays."""
    bits = values.view(torch.int32)
    rounded = torch.bitwise_and(bits + 0xFFFF, ~0xFFFF).view(torch.float32)
    return torch.where(values.isfinite(), rounded, values)


def dequantise(weight: Tensor, scale: Tensor, dtype: torch.dtype, rotation: int = NO_ROTATION) -> Tensor:
    """weight [out, in] of any one-byte type times its scale, rotated back and rounded to `dtype` once.

    Args:
        scale: [] or [1] for the tensor, [out] or [out, 1] per row, [out, blocks] or [out, blocks, 1] for
            blocks of neighbours in a row.
        rotation: the block of the rotation that the weight is stored in.
    """
    out_features, in_features = weight.shape
    scale = normalise_scale(scale, out_features)
    blocks = 1 if scale.ndim == 1 else scale.shape[1]
    values = weight.float().view(out_features, blocks, in_features // blocks)
    values = values.mul_(scale.view(out_features, blocks, 1)).view(out_features, in_features)
    return (values if rotation == NO_ROTATION else rotate_exactly(values, rotation)).to(dtype)


def scale_fits(scale: Sequence[int], weight: Sequence[int]) -> bool:
    """Whether a scale of shape `scale` is one that `dequantise` takes for a weight of shape `weight`."""
    if len(weight) != 2:
        return False
    if math.prod(scale) == 1:
        return True
    out_features, in_features = weight
    rows, *blocks = scale
    count = blocks[0] if blocks else 1
    return rows == out_features and blocks[1:] in ([], [1]) and count > 0 and in_features % count == 0


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


class WeightOnlyProduct(torch.autograd.Function):
    """Keeps the one-byte weight for the backward pass instead of its widened copy."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, rotation: int
    ) -> Tensor:
        """x [N, in], not rotated, and weight [out, in], stored in a rotation of this block -> [N, out]."""
        ctx.save_for_backward(weight, scale)
        ctx.rotation = rotation
        output = rotate(x, rotation) @ _widened(weight, scale, x.dtype).t()
        return finish(output, scale if scales_output(x.dtype, scale) else None, bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, None, None, None]:
        weight, scale = ctx.saved_tensors
        needed = ctx.needs_input_grad[0]
        grad = _input_gradient(grads[0], weight, scale, ctx.rotation) if needed else None
        return grad, None, None, None, None


class StoredLinear(nn.Module, ABC):
    """A frozen linear layer whose weight is stored in fewer bits than it is computed in."""

    in_features: int
    out_features: int
    bias: nn.Parameter | None

    @abstractmethod
    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad [N, out] -> [N, in], a fresh tensor: what the backward pass returns, without autograd."""

    @abstractmethod
    def unrounded_product(self, x: Tensor) -> Tensor:
        """x [N, in] -> [N, out] without the bias, in the dtype of x: no input is rounded."""

    @abstractmethod
    def widened(self, device: torch.device | None = None) -> Tensor:
        """The weight [out, in] that the layer stands for, float32, on a device or where it is."""


class QuantisedLinear(StoredLinear):
    """A frozen linear layer stored in one byte per weight and computed in the dtype of its input.

    Args:
        weight: [out, in], a one-byte type.
        scale: float32, [out] per row or [out, blocks] per block.
        bias: [out] or None.
        compute_dtype: dtype of the activations it will see.
        use_fast: multiply in the one-byte type with inputs quantised per token, where the sizes allow it.
        rotation: the block of the rotation that the weight is stored in; None for what `quantise` gives.
    """

    weight_dtype: ClassVar[torch.dtype]
    """Of the weights that `quantise` makes."""
    fast_product: ClassVar[type[WeightOnlyProduct]]
    fast_multiple: ClassVar[int]
    """What both sides of the weight must be a multiple of for `fast_product`."""
    rounds_scales: ClassVar[bool] = True
    """Whether the scales of `quantise` are bfloat16 numbers."""

    def __init__(
        self,
        weight: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        *,
        compute_dtype: torch.dtype,
        use_fast: bool = False,
        rotation: int | None = None,
    ) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.rotation = self.rotation_of(self.in_features) if rotation is None else rotation
        # Kept in the compute dtype where that is exact, so that no step mixes dtypes.
        is_exact = self.rounds_scales and compute_dtype == torch.bfloat16
        is_exact = is_exact and torch.equal(scale.bfloat16().float(), scale)
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale_weight = nn.Parameter(scale.bfloat16() if is_exact else scale, requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.to(compute_dtype), requires_grad=False)
        fits = self.in_features % self.fast_multiple == 0 and self.out_features % self.fast_multiple == 0
        self.use_fast = use_fast and fits and scale.ndim == 1 and weight.dtype == self.weight_dtype

    @staticmethod
    @abstractmethod
    def quantise(weight: Tensor) -> tuple[Tensor, Tensor]:
        """weight [out, in] -> (one-byte weight [out, in], scale [out] float32)."""

    @staticmethod
    def rotation_of(width: int) -> int:
        """The block of the rotation that `quantise` stores a weight of this width in."""
        return NO_ROTATION

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the compute dtype."""
        product = self.fast_product if self.use_fast else WeightOnlyProduct
        inputs = x.reshape(-1, self.in_features)
        flat = product.apply(inputs, self.weight, self.scale_weight, self.bias, self.rotation)
        return flat.view(*x.shape[:-1], self.out_features)

    def unrounded_product(self, x: Tensor) -> Tensor:
        return WeightOnlyProduct.apply(x, self.weight, self.scale_weight, None, self.rotation)

    def widened(self, device: torch.device | None = None) -> Tensor:
        weight, scale = self.weight.to(device), self.scale_weight.to(device)
        return dequantise(weight, scale, torch.float32, self.rotation)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return _input_gradient(grad, self.weight, self.scale_weight, self.rotation)

    def extra_repr(self) -> str:
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, fast={self.use_fast}, "
            f"rotation={self.rotation}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class FastProduct:
    """Requirements and names of products in a one-byte type."""

    form: str
    """Of the weights, as the options spell it: fp8, int8."""
    units: str
    """Of a device that can."""
    capability: tuple[int, int]
    """The first CUDA compute capability with such units."""
    cards: str
    """The families that begin with it."""

    @property
    def _way_out(self) -> str:
        return f"Leave --{self.form}_fast out: --{self.form}_base alone works everywhere."

    def check(self, device: torch.device, layer_class: type[QuantisedLinear]) -> None:
        """Refuse devices and builds of torch that cannot multiply so, by multiplying.

        Raises:
            ResourceError: no CUDA device, one without such units, or a product that fails or is wrong.
        """
        if device.type != "cuda":
            raise ResourceError(
                f"--{self.form}_fast needs a CUDA device with {self.units} units, not {device.type}. "
                f"{self._way_out}"
            )
        found = torch.cuda.get_device_capability(device)
        if found < self.capability:
            wanted, has = (".".join(map(str, numbers)) for numbers in (self.capability, found))
            raise ResourceError(
                f"--{self.form}_fast needs compute capability {wanted} ({self.cards}) or later; "
                f"{torch.cuda.get_device_name(device)} has {has}. {self._way_out}"
            )
        self.probe(device, layer_class)

    def probe(self, device: torch.device, layer_class: type[QuantisedLinear]) -> None:
        """Compare two small products with those of widened weights: with and without a bias, scales per row.

        Units alone do not say that torch can use them: row-wise float8 products are left out of its builds
        for Windows, and some releases refuse them on a compute capability of 10 or more.

        Raises:
            ResourceError: one fails or is wrong.
        """
        try:
            errors = [_probe_error(device, layer_class, has_bias) for has_bias in (True, False)]
        except torch.OutOfMemoryError:
            raise  # says nothing about the product
        except RuntimeError as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            raise ResourceError(
                f"--{self.form}_fast cannot be used here: torch {torch.__version__} failed at a small "
                f"{self.form} product on {device}: {reason}. {self._way_out}"
            ) from error
        if not max(errors) < _PROBE_TOLERANCE:  # NaN too
            raise ResourceError(
                f"--{self.form}_fast cannot be used here: a small {self.form} product of torch "
                f"{torch.__version__} on {device} is wrong, relative error {max(errors):.2g}. {self._way_out}"
            )


_PROBE_TOLERANCE = 0.2
"""Relative; inputs rounded to float8 give 0.03."""


def _probe_error(device: torch.device, layer_class: type[QuantisedLinear], has_bias: bool) -> float:
    """How far the fast product of 40 tokens lies from the one with widened weights."""
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(2, 64, 64, generator=generator).bfloat16().to(device)
    bias = torch.randn(64, generator=generator).to(device) if has_bias else None
    weight8, scale = layer_class.quantise(weight)
    fast, plain = (
        layer_class(weight8, scale, bias, compute_dtype=torch.bfloat16, use_fast=use_fast)(x[:40]).float()
        for use_fast in (True, False)
    )
    return float((fast - plain).norm() / plain.norm())


def scales_output(dtype: torch.dtype, scale: Tensor) -> bool:
    """Whether the row scale is applied to the output rather than to the weight.

    Not for blocks, and not in float16, where the unscaled products would overflow.
    """
    return scale.ndim == 1 and dtype != torch.float16


def finish(output: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
    """Apply row scale and bias to a fresh output [N, out], in its own dtype."""
    if scale is not None and bias is not None and scale.dtype == output.dtype:
        return torch.addcmul(bias, output, scale)
    if scale is not None:
        output.mul_(scale)
    return output if bias is None else output.add_(bias)


def _widened(weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight in the compute dtype, with its scale unless `scales_output`: [out, in]."""
    wide = weight.to(dtype)
    if scales_output(dtype, scale):
        return wide
    out_features, in_features = weight.shape
    blocks = wide.view(out_features, scale.numel() // out_features, -1)
    blocks.mul_(scale.view(out_features, -1, 1))  # in place: rounds to dtype, makes nothing wider
    return blocks.view(out_features, in_features)


def _input_gradient(grad: Tensor, weight: Tensor, scale: Tensor, rotation: int) -> Tensor:
    """grad [N, out] -> [N, in] through the weight that the forward pass used."""
    if scales_output(grad.dtype, scale):
        grad = torch.mul(grad, scale, out=torch.empty_like(grad))
    return rotate_in_place(grad @ _widened(weight, scale, grad.dtype), rotation)
