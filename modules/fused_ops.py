"""Fused elementwise operations of a transformer block, with few passes over memory.

All of them compute in float32 and round once to the dtype of the activations, without ever holding a
float32 copy of a whole activation.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHUNK_ELEMENTS = 2**22
"""How much of an activation is held in float32 at a time."""

LAYER_NORM_EPS = 1e-5
"""The default eps of nn.LayerNorm."""


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float = LAYER_NORM_EPS) -> Tensor:
    """LayerNorm over the last axis, rounded to the dtype of x once; x [..., D], weight and bias [D]."""
    weight, bias = weight.float(), bias.float()
    if kernel_rounds_once(x):
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
        return F.layer_norm(x.float(), x.shape[-1:], weight, bias, eps).to(x.dtype)
    return _ChunkedLayerNorm.apply(x, weight, bias, eps)  # type: ignore[no-any-return]


def kernel_rounds_once(x: Tensor) -> bool:
    """Whether torch's kernel takes float32 weights beside x; other than on a CPU it requires one dtype."""
    return x.device.type == "cpu" or x.dtype == torch.float32


class _ChunkedNorm(NamedTuple):
    """LayerNorm of rows [N, D] in float32, a chunk at a time: what its gradient needs beside the rows."""

    weight: Tensor
    """[D] float32, like the bias."""
    bias: Tensor
    mean: Tensor
    """[N, 1] float32, like the next."""
    inverse_deviation: Tensor

    @staticmethod
    def of(rows: Tensor, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, _ChunkedNorm]:
        """The norm of the rows, in their dtype, and how to find its gradient."""
        result = rows.new_empty(rows.shape)
        statistics = rows.new_empty(2, len(rows), 1, dtype=torch.float32)
        norm = _ChunkedNorm(weight, bias, *statistics)
        for chunk in _chunks(rows, 0):
            wide = rows[chunk].float()
            value, mean, inverse_deviation = torch.native_layer_norm(wide, rows.shape[1:], weight, bias, eps)
            result[chunk] = value
            norm.mean[chunk] = mean
            norm.inverse_deviation[chunk] = inverse_deviation
        return result, norm

    def write_gradient(
        self, grad: Tensor, rows: Tensor, target: Tensor | None, trains: Sequence[bool] = (False, False)
    ) -> list[Tensor | None]:
        """Write the gradient of the rows into `target`, which may be `grad` itself.

        Args:
            trains: whether weight and bias get gradients.
        Returns:
            Those two, [D] float32.
        """
        totals = [torch.zeros_like(self.weight) if is_trained else None for is_trained in trains]
        for chunk in _chunks(rows, 0):
            parts = torch.ops.aten.native_layer_norm_backward(
                grad[chunk].float(),
                rows[chunk].float(),
                rows.shape[1:],
                self.mean[chunk],
                self.inverse_deviation[chunk],
                self.weight,
                self.bias,
                [target is not None, *trains],
            )
            if target is not None:
                target[chunk] = parts[0]
            for total, part in zip(totals, parts[1:], strict=True):
                if total is not None:
                    total += part
        return totals


class _ChunkedLayerNorm(torch.autograd.Function):
    """`_ChunkedNorm` of the last axis, for autograd."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        value, norm = _ChunkedNorm.of(x.reshape(-1, x.shape[-1]), weight, bias, eps)
        ctx.save_for_backward(x, *norm)
        return value.view(x.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, *norm = ctx.saved_tensors
        needs_x, *trains, _ = ctx.needs_input_grad
        rows = x.reshape(-1, x.shape[-1])
        target = rows.new_empty(rows.shape) if needs_x else None
        grad_weight, grad_bias = _ChunkedNorm(*norm).write_gradient(
            grads[0].reshape(rows.shape), rows, target, trains
        )
        return None if target is None else target.view(x.shape), grad_weight, grad_bias, None


def modulated_layer_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """LayerNorm whose weight and bias differ per sample.

    Args:
        x: [B, N, D], or the same rows as [B * N, D].
        weight, bias: [B, D].
    Returns:
        What x is.
    """
    normed = [layer_norm(*sample) for sample in _samples(x, weight, bias)]
    return normed[0] if len(normed) == 1 else torch.cat(normed)


def _samples(x: Tensor, weight: Tensor, bias: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
    """The rows of each sample with its weight and bias [D]."""
    if len(weight) == 1:
        return [(x, weight[0], bias[0])]
    return list(zip(x.split(len(x) // len(weight)), weight, bias, strict=True))


def gated_sum(x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
    """x + gate * branch in one pass; x and branch [B, N, D], gate [B, D], all of one dtype."""
    gate = gate[:, None]
    if torch.compiler.is_compiling() or gate.requires_grad:
        return torch.addcmul(x, branch, gate)
    return _GatedSum.apply(x, branch, gate)  # type: ignore[no-any-return]


def gelu(hidden: Tensor) -> Tensor:
    """Exact GELU of an activation that has no other users; without gradients it is overwritten."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return F.gelu(hidden)
    return torch.ops.aten.gelu_(hidden)


Gradient = Callable[[Tensor], Tensor]
"""Gives the gradient of an input from that of the value, and may use up the memory of the latter."""


class Recomputable(Protocol):
    """A function of the rows of x whose value can be computed again instead of being kept."""

    @property
    def is_trained(self) -> bool:
        """Whether tensors of its own get gradients, of which `again` knows nothing."""
        ...

    def value(self, x: Tensor) -> Tensor:
        """x [..., D] -> [..., D]."""
        ...

    def again(self, x: Tensor) -> tuple[Tensor, Gradient]:
        """The value for the x of an earlier pass, which stays as it is, and the gradient; no autograd."""
        ...


class JointLinear(nn.Module, ABC):
    """A linear layer that can compute several layers of one input in one step; see `project`."""

    @abstractmethod
    def project_jointly(
        self, x: Tensor, layers: Sequence[nn.Module], before: Recomputable | None
    ) -> list[Tensor] | None:
        """What `project` returns, or None where these layers have to be computed one by one."""


def project(x: Tensor, layers: Sequence[nn.Module], before: Recomputable | None = None) -> list[Tensor]:
    """The outputs of several linear layers for one input, in one step where the layers can do that.

    Args:
        x: [..., in].
        before: acts on x before the layers.
    Returns:
        One [..., out] per layer.
    """
    first = layers[0]
    if isinstance(first, JointLinear):
        outputs = first.project_jointly(x, layers, before)
        if outputs is not None:
            return outputs
    if before is not None:
        x = before.value(x)
    return [layer(x) for layer in layers]


class Gelu:
    """`gelu` of an activation that has no other users."""

    @property
    def is_trained(self) -> bool:
        return False

    def value(self, x: Tensor) -> Tensor:
        return gelu(x)

    def again(self, x: Tensor) -> tuple[Tensor, Gradient]:
        return F.gelu(x), lambda grad: torch.ops.aten.gelu_backward.grad_input(grad, x, grad_input=grad)


GELU = Gelu()


class ModulatedLayerNorm(NamedTuple):
    """`modulated_layer_norm` of an activation that may have other uses."""

    weight: Tensor
    """[B, D], like the bias. Both are held, not saved, as they come from outside the block."""
    bias: Tensor

    @property
    def is_trained(self) -> bool:
        return self.weight.requires_grad or self.bias.requires_grad

    def value(self, x: Tensor) -> Tensor:
        return modulated_layer_norm(x, self.weight, self.bias)

    def again(self, x: Tensor) -> tuple[Tensor, Gradient]:
        pairs = [_layer_norm_again(*sample) for sample in _samples(x, self.weight, self.bias)]
        values, gradients = zip(*pairs, strict=True)
        if len(gradients) == 1:
            return values[0], gradients[0]

        def gradient(grad: Tensor) -> Tensor:
            for part, of_sample in zip(grad.split(len(grad) // len(gradients)), gradients, strict=True):
                part.copy_(of_sample(part))
            return grad

        return torch.cat(values), gradient


def _layer_norm_again(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Gradient]:
    weight, bias, width = weight.float(), bias.float(), x.shape[-1:]
    if kernel_rounds_once(x):
        value, mean, inverse_deviation = torch.native_layer_norm(x, width, weight, bias, LAYER_NORM_EPS)
        return value, lambda grad: torch.ops.aten.native_layer_norm_backward(
            grad, x, width, mean, inverse_deviation, weight, bias, [True, False, False]
        )[0]
    rows = x.reshape(-1, *width)
    value, norm = _ChunkedNorm.of(rows, weight, bias, LAYER_NORM_EPS)

    def gradient(grad: Tensor) -> Tensor:
        flat = grad.view(rows.shape)
        norm.write_gradient(flat, rows, flat)
        return grad

    return value.view(x.shape), gradient


def rms_norm_rotate(x: Tensor, weight: Tensor, eps: float, rotary: Tensor | None) -> Tensor:
    """RMS-normalise the last axis and rotate its channel pairs (2i, 2i + 1).

    Args:
        x: [B, N, heads, d].
        weight: [d].
        rotary: [N, 1, d/2, 2] cosines and sines, or None to rotate nothing.
    Returns:
        [B, N, heads, d] in the dtype of x.
    """
    if torch.compiler.is_compiling():  # the compiler fuses the formula by itself
        return _plain_rms_norm_rotate(x, weight, eps, rotary)
    return _RmsNormRotate.apply(x, weight, eps, rotary)  # type: ignore[no-any-return]


def _plain_rms_norm_rotate(x: Tensor, weight: Tensor, eps: float, rotary: Tensor | None) -> Tensor:
    wide = x.float()
    normed = wide * torch.rsqrt(wide.square().mean(dim=-1, keepdim=True) + eps) * weight.float()
    if rotary is None:
        return normed.to(x.dtype)
    first, second = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.unbind(-1)
    rotated = torch.stack([first * cos - second * sin, first * sin + second * cos], dim=-1)
    return rotated.flatten(-2).to(x.dtype)


class _GatedSum(torch.autograd.Function):
    """For a gate that gets no gradient: holds it rather than saving it, as it comes from outside the block.

    As nothing is saved here, gradient checkpointing stops its recompute before the product that makes
    `branch`, if this is the last step of the block.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, branch: Tensor, gate: Tensor) -> Tensor:
        ctx.gate = gate
        return torch.addcmul(x, branch, gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None]:
        return grads[0], grads[0] * ctx.gate, None


@cache
def _constants(dim: int, eps: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """sqrt(dim * eps) as [] and sqrt(dim) as [1], which makes products with it float32."""
    with torch.inference_mode(mode=False):
        root_eps = torch.full((), math.sqrt(dim * eps), dtype=torch.float32, device=device)
        return root_eps, torch.full((1,), math.sqrt(dim), dtype=torch.float32, device=device)


class _RmsNormRotate(torch.autograd.Function):
    """y = rotate(weight * x * sqrt(d) / size), size = sqrt(|x|^2 + d * eps), a chunk of tokens at a time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, rotary: Tensor | None) -> Tensor:
        out = torch.empty_like(x)
        root_eps, root_dim = _constants(x.shape[-1], eps, x.device)
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        size = norm.hypot_(root_eps)  # [B, N, heads, 1]
        scaled_weight = weight * root_dim
        for tokens in _chunks(x):
            normed = x[:, tokens] / size[:, tokens]
            if rotary is None:
                torch.mul(normed, scaled_weight, out=out[:, tokens])
            else:
                normed *= scaled_weight
                _as_complex(normed).mul_(torch.view_as_complex(rotary[tokens]))
                out[:, tokens] = normed
        ctx.save_for_backward(x, scaled_weight, size, rotary)
        ctx.weight_dtype = weight.dtype
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        (grad,) = grad_outputs
        x, scaled_weight, size, rotary = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        grad_weight = torch.zeros_like(scaled_weight) if ctx.needs_input_grad[1] else None
        for tokens in _chunks(x):
            direction = x[:, tokens] / size[:, tokens]
            if rotary is None and grad_weight is None:
                inner = grad[:, tokens] * scaled_weight
            else:
                inner = grad[:, tokens].to(torch.float32, copy=True)
                if rotary is not None:
                    _as_complex(inner).mul_(torch.view_as_complex(rotary[tokens]).conj())
                if grad_weight is not None:
                    grad_weight += (inner * direction).sum(dim=(0, 1, 2)) * math.sqrt(x.shape[-1])
                inner *= scaled_weight
            # d(x / size) = (dx - direction * <direction, dx>) / size
            along = (inner * direction).sum(dim=-1, keepdim=True)
            inner.addcmul_(direction, along, value=-1)
            torch.div(inner, size[:, tokens], out=grad_x[:, tokens])
        return grad_x, None if grad_weight is None else grad_weight.to(ctx.weight_dtype), None, None


def _as_complex(real: Tensor) -> Tensor:
    return torch.view_as_complex(real.unflatten(-1, (-1, 2)))


def _chunks(x: Tensor, axis: int = 1) -> list[slice]:
    """Runs along an axis of at most CHUNK_ELEMENTS elements each."""
    length = x.shape[axis]
    step = max(1, CHUNK_ELEMENTS * length // max(1, x.numel()))
    # Without data nothing is computed: the first chunk shows what all of them take.
    end = min(step, length) if x.is_meta else length
    return [slice(start, start + step) for start in range(0, end, step)]
