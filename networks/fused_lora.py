"""Fused autograd function for frozen linear layers with their low-rank changes.

Computed apart, a layer and its change each return a gradient for their common input, and one more pass over
activations adds the two; and the change needs an output of its own. Here both are accumulated by the matrix
products themselves (`addmm`), forward and backward. Layers that share an input (query, key and value) go
through one product with their stacked `down` factors. A function before the layers (GELU, a modulated layer
norm) is part of the step: its input is kept, its value is computed again in the backward pass.

What the backward pass needs is saved before the frozen product runs. Gradient checkpointing stops its
recompute at the last saved tensor, and so never computes the last product of a block a second time.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from modules.fused_ops import Recomputable

_HALF = frozenset({torch.float16, torch.bfloat16})
WIDE_PRODUCT_DEVICES = frozenset({"cuda", "meta"})
"""Where `torch.mm` has `out_dtype`; without data it stands for what a GPU takes."""


class FrozenLinear(Protocol):
    """A layer that computes its input gradient without autograd."""

    def input_gradient(self, grad: Tensor) -> Tensor:
        """grad [N, out] -> a fresh [N, in]."""
        ...


class LowRankLayer(NamedTuple):
    """One frozen layer with its change, scale * up @ down."""

    base: nn.Module
    """A frozen layer for which `can_fuse` holds; it gets no gradient."""
    down: Tensor
    """[rank, in], a float32 master; cast to the dtype of the activations at use."""
    up: Tensor
    """[out, rank], likewise."""
    scale: float


def can_fuse(base: nn.Module) -> bool:
    """Whether `fused_lora` supports this layer; compilers fuse the plain form themselves."""
    is_known = type(base) is nn.Linear or hasattr(base, "input_gradient")
    return is_known and not torch.compiler.is_compiling()


def fused_lora(x: Tensor, layers: Sequence[LowRankLayer], before: Recomputable | None = None) -> list[Tensor]:
    """base(x) + scale * up @ (down @ x) of every layer, in the dtype of x.

    Args:
        x: [..., in].
        before: acts on x first, and is not trained.
    Returns:
        One [..., out] per layer.
    """
    flat = x.reshape(-1, x.shape[-1])
    entering = flat if before is None else before.value(flat.detach())
    ranks = [len(layer.down) for layer in layers]
    with torch.no_grad():
        down = layers[0].down if len(layers) == 1 else torch.cat([layer.down for layer in layers])
        down = down.to(x.dtype)  # [sum of ranks, in]
        ups = [layer.up.to(x.dtype) for layer in layers]
        hidden = entering @ down.t()  # [N, sum of ranks]
    factors = [factor for layer in layers for factor in (layer.down, layer.up)]
    marks = _Gradients.apply(layers, before, flat, hidden, down, *ups, *factors)
    outputs = []
    for layer, up, part, mark in zip(layers, ups, hidden.split(ranks, dim=1), marks, strict=True):
        with torch.no_grad():
            output = layer.base(entering).addmm_(part, up.t(), alpha=layer.scale)
        outputs.append(_WithGradientOf.apply(mark, output).view(*x.shape[:-1], len(up)))
    return outputs


def _base_gradient(base: nn.Module, grad: Tensor, total: Tensor | None) -> Tensor:
    """The gradient of the base's input from that of its output, added to `total`, which is used up."""
    if isinstance(base, nn.Linear):
        return grad @ base.weight if total is None else total.addmm_(grad, base.weight)
    own = cast(FrozenLinear, base).input_gradient(grad)
    return own if total is None else total.add_(own)


def _scaled_product(a: Tensor, b: Tensor, scale: float) -> Tensor:
    """scale * a @ b with one rounding."""
    return torch.addmm(a.new_empty(a.shape[0], b.shape[1]), a, b, beta=0, alpha=scale)


def _master_gradient(a: Tensor, b: Tensor, dtype: torch.dtype, scale: float | None = None) -> Tensor:
    """a @ b, times scale, in the dtype of a master: float32 sums are not rounded to half precision first."""
    if dtype == torch.float32 and a.dtype in _HALF and a.device.type in WIDE_PRODUCT_DEVICES:
        product = torch.mm(a, b, out_dtype=dtype)
        return product if scale is None else product.mul_(scale)
    return (a @ b if scale is None else _scaled_product(a, b, scale)).to(dtype)


class _Gradients(torch.autograd.Function):
    """Keeps x and the rank-sized activations, and returns for each layer a mark that carries its gradient.

    A mark has the shape of the layer's output and no memory. The frozen weights are asked for again in the
    backward pass, not kept: they may have travelled meanwhile.
    """

    @staticmethod
    def forward(
        ctx: Any,
        layers: Sequence[LowRankLayer],
        before: Recomputable | None,
        x: Tensor,
        hidden: Tensor,
        down: Tensor,
        *rest: Tensor,
    ) -> tuple[Tensor, ...]:
        ups = rest[: len(layers)]
        ctx.save_for_backward(x, hidden, down, *ups)
        ctx.before = before
        ctx.layers = [(layer.base, layer.scale) for layer in layers]
        ctx.ranks = [up.shape[1] for up in ups]
        ctx.factor_dtypes = [factor.dtype for factor in rest[len(layers) :]]
        nothing = x.new_empty(1, 1)
        return tuple(nothing.expand(len(x), len(up)) for up in ups)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, hidden, down, *ups = ctx.saved_tensors
        needs_x = ctx.needs_input_grad[2]
        needs_factor = ctx.needs_input_grad[5 + len(ups) :]
        hidden_grad = _hidden_gradient(ctx.layers, grads, ups)
        factor_grads: list[Tensor | None] = [None] * (2 * len(ups))
        entered, gradient_before = (x, None) if ctx.before is None else ctx.before.again(x)
        if any(needs_factor[0::2]):
            down_grad = _master_gradient(hidden_grad.t(), entered, ctx.factor_dtypes[0])
            factor_grads[0::2] = down_grad.split(ctx.ranks)
        del entered  # before the gradient of x takes as much
        for i, part in enumerate(hidden.split(ctx.ranks, dim=1)):
            if needs_factor[2 * i + 1]:
                factor_grads[2 * i + 1] = _master_gradient(
                    grads[i].t(), part, ctx.factor_dtypes[2 * i + 1], ctx.layers[i][1]
                )
        x_grad = None
        if needs_x:
            for (base, _), grad in zip(ctx.layers, grads, strict=True):
                x_grad = _base_gradient(base, grad, x_grad)
        if x_grad is not None:
            x_grad.addmm_(hidden_grad, down)
            x_grad = x_grad if gradient_before is None else gradient_before(x_grad)
        return None, None, x_grad, None, None, *[None] * len(ups), *factor_grads


def _hidden_gradient(
    layers: Sequence[tuple[nn.Module, float]], grads: Sequence[Tensor], ups: Sequence[Tensor]
) -> Tensor:
    """The scaled gradient of the rank-sized activations, [N, sum of ranks]."""
    if len(layers) == 1:
        return _scaled_product(grads[0], ups[0], layers[0][1])
    total = grads[0].new_empty(len(grads[0]), sum(up.shape[1] for up in ups))
    parts = total.split([up.shape[1] for up in ups], dim=1)
    for (_, scale), grad, up, part in zip(layers, grads, ups, parts, strict=True):
        part.addmm_(grad, up, beta=0, alpha=scale)
    return total


class _WithGradientOf(torch.autograd.Function):
    """`output`, whose gradient goes to `mark`."""

    @staticmethod
    def forward(_: Any, mark: Tensor, output: Tensor) -> Tensor:
        return output.detach()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
