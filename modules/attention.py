"""Scaled dot-product attention over [B, N, heads, d] tensors, with a selectable backend."""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

from modules.attention_backends import DEFAULT_BACKEND, load_attention

_HALF_DTYPES = (torch.float16, torch.bfloat16)

_ATTENTION_OPERATORS = frozenset({
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
})


@dataclass(frozen=True, slots=True)
class KeyMask:
    """Mask of valid keys in a right-padded batch."""

    mask: Tensor
    """[B, L] bool."""
    lengths: tuple[int, ...] | None = None
    """The same on the host, for back ends that take no mask."""

    @classmethod
    def for_backend(cls, mask: Tensor, backend: str) -> KeyMask:
        """Copy the lengths from the device only if the backend needs them."""
        return cls(mask, None if backend == DEFAULT_BACKEND else tuple(mask.sum(dim=-1).tolist()))


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    keys: KeyMask | None = None,
    backend: str = DEFAULT_BACKEND,
) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, per head.

    Args:
        query: [B, N, heads, d].
        key, value: [B, L, heads, d].
        keys: which of the keys are real; None where all are, which is faster.
        backend: a name in `ATTENTION_BACKENDS`; all compute the same function, sage_attn with int8 queries
            and keys.
    Returns:
        [B, N, heads, d].
    Raises:
        ValueError: the back end cannot compute in the dtype of the query.
    """
    if backend == DEFAULT_BACKEND:
        return _sdpa(query, key, value, None if keys is None else keys.mask)
    if query.dtype not in _HALF_DTYPES:
        raise ValueError(
            f"{backend} computes in bfloat16 or float16, not {query.dtype}; use --{DEFAULT_BACKEND}"
        )
    attend = load_attention(backend)
    if keys is None:
        return attend(query, key, value)
    if keys.lengths is None:
        raise ValueError(f"{backend} does not support masks: it requires the lengths")
    # One sample at a time over its real keys: exact, and these batches are small.
    samples = [
        attend(query[i : i + 1], key[i : i + 1, :length], value[i : i + 1, :length])
        for i, length in enumerate(keys.lengths)
    ]
    return torch.cat(samples)


def _sdpa(query: Tensor, key: Tensor, value: Tensor, key_mask: Tensor | None) -> Tensor:
    mask = None if key_mask is None else key_mask[:, None, None, :]
    heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    return fused_attention(*heads, mask=mask).transpose(1, 2)


def fused_attention(query: Tensor, key: Tensor, value: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """torch's attention over [B, heads, N, d]; on tensors without data in the form that devices run.

    For those torch itself would choose the form that holds all scores.
    """
    if query.is_meta:
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, attn_mask=mask)[
            0
        ]
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask)


def keep_attention_outputs() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` for torch.utils.checkpoint: recomputes everything except the attention outputs."""

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = operator in _ATTENTION_OPERATORS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)
