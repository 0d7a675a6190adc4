"""Counts floating-point operations by torch's own formulas, also on the meta device.

torch's `FlopCounterMode` is not used itself: it follows modules through hooks, which keep activations alive
and so would change the memory that is measured in the same run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count, shape_wrapper

Shape = tuple[int, ...]


def _forward(query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _backward(
    grad: Shape, query: Shape, key: Shape, value: Shape, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def _in_place_sum(total: Shape, a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _product(a: Shape, b: Shape, *_: Any, out_shape: Any = None, **__: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


_MISSING = {
    torch.ops.aten._int_mm: _product,
    torch.ops.aten.addmm_: _in_place_sum,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _forward,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _backward,
}
"""What torch's table lacks: products in int8, in-place sums of products, the CPU's fused attention."""
_FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    **{operator: shape_wrapper(formula) for operator, formula in _MISSING.items()},
}
_FIRST_QUERY = {
    operator: 1 if "backward" in str(operator) else 0
    for operator in _FORMULAS
    if "scaled_dot_product" in str(operator)
}
"""Where an attention operator takes its queries; the keys follow. A backward takes the gradient first."""


class FlopCounter(TorchDispatchMode):
    """A context that counts the operations of products, convolutions and attention."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        """A multiply and an add are two."""
        self.self_attention = 0
        """The share of attention with as many keys as queries."""

    def __torch_dispatch__(
        self,
        func: Any,
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        formula = _FORMULAS.get(func._overloadpacket)
        if formula is not None:
            count = formula(*args, **(kwargs or {}), out_val=result)
            self.total += count
            query = _FIRST_QUERY.get(func._overloadpacket)
            if query is not None and args[query].shape == args[query + 1].shape:
                self.self_attention += count
        return result
