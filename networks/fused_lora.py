"""A frozen linear layer and its low-rank change as one step of automatic differentiation.

Written apart, the layer and its change each return a gradient for their common input, and one more pass over
activations adds the two; and the change needs an output of its own. Here both are accumulated by the matrix
product itself (`addmm`), forward and backward.
"""

from __future__ import annotations

from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn


class FrozenLinear(Protocol):
    """A layer that can say its input gradient without autograd."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad [N, out] -> a fresh [N, in]."""
        ...


def can_fuse(base: nn.Module) -> bool:
    """Whether `fused_lora` knows this layer's gradient; compilers fuse the plain form themselves."""
    is_known = type(base) is nn.Linear or hasattr(base, "input_gradient")
    return is_known and not torch.compiler.is_compiling()


def fused_lora(x: Tensor, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
    """base(x) + scale * up @ (down @ x), in the dtype of x.

    Args:
        x: [..., in].
        base: a frozen layer for which `can_fuse` holds; it gets no gradient.
        down, up: [rank, in] and [out, rank], float32 masters; cast to the dtype of x at use.
    Returns:
        [..., out].
    """
    flat = _FusedLora.apply(x.reshape(-1, x.shape[-1]), base, down, up, scale)
    return flat.view(*x.shape[:-1], up.shape[0])


def _input_gradient(base: nn.Module, grad: Tensor) -> Tensor:
    if isinstance(base, nn.Linear):
        return grad @ base.weight
    return cast(FrozenLinear, base).input_gradient(grad)


class _FusedLora(torch.autograd.Function):
    """Keeps x and the rank-sized activation; the frozen weight is asked for again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: nn.Module, down: Tensor, up: Tensor, scale: float) -> Tensor:
        hidden = x @ down.to(x.dtype).t()  # [N, rank]
        ctx.save_for_backward(x, hidden, down, up)
        ctx.base, ctx.scale = base, scale
        return base(x).addmm_(hidden, up.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, None, Tensor | None, Tensor | None, None]:
        x, hidden, down, up = ctx.saved_tensors
        grad, scale = grads[0], ctx.scale
        hidden_grad = grad @ up.to(grad.dtype)  # [N, rank], still without scale
        x_grad = down_grad = up_grad = None
        if ctx.needs_input_grad[0]:
            x_grad = _input_gradient(ctx.base, grad)
            x_grad.addmm_(hidden_grad, down.to(grad.dtype), alpha=scale)
        if ctx.needs_input_grad[2]:
            down_grad = (hidden_grad.t() @ x).to(down.dtype).mul_(scale)
        if ctx.needs_input_grad[3]:
            up_grad = (grad.t() @ hidden).to(up.dtype).mul_(scale)
        return x_grad, None, down_grad, up_grad, None
