"""NF4 weights: half a byte each, and the linear layer that holds them.

Blocks of 64 neighbours share a scale, and the scales are stored in 8 bits with one float32 per 256 of them:
0.516 bytes a weight. bitsandbytes rounds and widens them.
Source: Dettmers et al. 2023, "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv 2305.14314), section 3.
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules.errors import ResourceError
from modules.quantised_linear import StoredLinear

BLOCK = 64
"""Weights that share a scale."""
NESTED_BLOCK = 256
"""Scales that share one."""

_PROBE_TOLERANCE = 0.2
"""Relative; normal weights give 0.09."""


class Nf4Weight(NamedTuple):
    """A weight [out, in] in NF4."""

    values: Tensor
    """uint8 [out * in / 2, 1]: two weights a byte."""
    absmax: Tensor
    """uint8 [out * in / BLOCK]: the scales of the blocks, themselves in 8 bits."""
    nested_absmax: Tensor
    """float32, one for `NESTED_BLOCK` scales."""
    offset: Tensor
    """float32 []: the mean of the scales."""
    shape: tuple[int, int]

    def to(self, device: torch.device) -> Nf4Weight:
        values, absmax, nested, offset = (part.to(device) for part in self[:4])
        return Nf4Weight(values, absmax, nested, offset, self.shape)


def quantise_nf4(weight: Tensor) -> Nf4Weight:
    """Round a weight [out, in] to NF4 with double quantisation, on its device."""
    out_features, in_features = weight.shape
    shape = (out_features, in_features)
    if weight.is_meta:
        blocks = -(-weight.numel() // BLOCK)
        nested = -(-blocks // NESTED_BLOCK)
        with torch.device("meta"):
            values = torch.empty(-(-weight.numel() // 2), 1, dtype=torch.uint8)
            absmax = torch.empty(blocks, dtype=torch.uint8)
            return Nf4Weight(values, absmax, torch.empty(nested), torch.empty(()), shape)
    values, state = _functional().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return Nf4Weight(values, state.absmax, state.state2.absmax, state.offset, shape)


def widen_nf4(weight: Nf4Weight, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in a dtype: bfloat16, float16 or float32."""
    functional = _functional()
    code, nested_code = _codes(weight.values.device)
    nested = functional.QuantState(
        absmax=weight.nested_absmax, code=nested_code, blocksize=NESTED_BLOCK, dtype=torch.float32
    )
    state = functional.QuantState(
        absmax=weight.absmax,
        shape=torch.Size(weight.shape),
        code=code,
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=weight.offset,
        state2=nested,
    )
    return functional.dequantize_4bit(weight.values, state)


def check_nf4(device: torch.device) -> None:
    """Refuse machines whose bitsandbytes cannot round and widen NF4 on the device, by doing it.

    Raises:
        ResourceError: bitsandbytes is missing, fails or is wrong.
    """
    weight = torch.randn(64, 128, generator=torch.Generator().manual_seed(0)).to(device)
    try:
        widened = widen_nf4(quantise_nf4(weight), torch.float32)
    except ImportError as error:
        raise ResourceError(
            f"--nf4_base needs bitsandbytes, which cannot be imported ({error}): pip install bitsandbytes, "
            "or use --fp8_base or --int8_base"
        ) from error
    except torch.OutOfMemoryError:
        raise  # says nothing about bitsandbytes
    except (RuntimeError, NotImplementedError, AttributeError, TypeError, ValueError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ResourceError(
            f"--nf4_base cannot be used here: bitsandbytes failed at a small weight on {device}: {reason}. "
            "Use --fp8_base or --int8_base"
        ) from error
    off = float((widened - weight).norm() / weight.norm())
    if not off < _PROBE_TOLERANCE:  # NaN too
        raise ResourceError(
            f"--nf4_base cannot be used here: a small weight on {device} is wrong, relative error {off:.2g}. "
            "Use --fp8_base or --int8_base"
        )


def has_nf4() -> bool:
    """Whether bitsandbytes can be imported."""
    try:
        _functional()
    except ImportError:
        return False
    return True


class Nf4Linear(StoredLinear):
    """A frozen linear layer in NF4, computed in the dtype of its input; `check_nf4` says where it runs.

    Args:
        weight: see `quantise_nf4`.
        bias: [out] or None.
        compute_dtype: dtype of the activations it will see.
    """

    def __init__(self, weight: Nf4Weight, bias: Tensor | None, *, compute_dtype: torch.dtype) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape

        def frozen(part: Tensor) -> nn.Parameter:
            return nn.Parameter(part, requires_grad=False)

        self.weight, self.absmax = frozen(weight.values), frozen(weight.absmax)
        self.nested_absmax, self.offset = frozen(weight.nested_absmax), frozen(weight.offset)
        self.bias = None if bias is None else frozen(bias.to(compute_dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out], both in the compute dtype."""
        flat = _Product.apply(x.reshape(-1, self.in_features), *self._parts, self.bias)
        return flat.view(*x.shape[:-1], self.out_features)

    def unrounded_product(self, x: Tensor) -> Tensor:
        return _Product.apply(x, *self._parts, None)

    def widened(self, device: torch.device | None = None) -> Tensor:
        weight = self._parts if device is None else self._parts.to(device)
        return widen_nf4(weight, torch.float32)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ widen_nf4(self._parts, grad.dtype)

    @property
    def _parts(self) -> Nf4Weight:
        shape = (self.out_features, self.in_features)
        return Nf4Weight(self.weight, self.absmax, self.nested_absmax, self.offset, shape)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class _Product(torch.autograd.Function):
    """Keeps the packed weight for the backward pass instead of its widened copy."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        values: Tensor,
        absmax: Tensor,
        nested_absmax: Tensor,
        offset: Tensor,
        shape: tuple[int, int],
        bias: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(values, absmax, nested_absmax, offset)
        ctx.shape = shape
        weight = Nf4Weight(values, absmax, nested_absmax, offset, shape)
        return F.linear(x, widen_nf4(weight, x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        values, absmax, nested_absmax, offset = ctx.saved_tensors
        weight = Nf4Weight(values, absmax, nested_absmax, offset, ctx.shape)
        needed = ctx.needs_input_grad[0]
        grad = grads[0] @ widen_nf4(weight, grads[0].dtype) if needed else None
        return grad, *[None] * 6


def _functional() -> Any:
    """bitsandbytes' functions, imported where they are used first: the import takes seconds."""
    import bitsandbytes.functional

    return bitsandbytes.functional


@cache
def _codes(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 16 numbers of NF4, and the 256 that its scales are rounded to."""
    functional = _functional()
    with torch.inference_mode(mode=False):
        nested = functional.create_dynamic_map().to(device)
        return functional.get_4bit_type("nf4", device=device), nested
