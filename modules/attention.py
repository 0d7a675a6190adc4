"""Scaled dot-product attention over [B, N, heads, d] tensors, whatever computes it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts

_ATTENTION_OPERATORS = frozenset({
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops.aten._scaled_dot_product_flash_attention.default,
    torch.ops.aten._scaled_dot_product_efficient_attention.default,
    torch.ops.aten._scaled_dot_product_cudnn_attention.default,
    torch.ops.aten._scaled_dot_product_attention_math.default,
})


def keep_attention_outputs() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
    """A `context_fn` for torch.utils.checkpoint: everything is recomputed but the attention itself."""

    def policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
        kept = operator in _ATTENTION_OPERATORS
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def attention(query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, per head.

    Args:
        query: [B, N, heads, d].
        key, value: [B, L, heads, d].
        key_mask: [B, L] bool, true where a key may be seen; None where all may, which is faster.
    Returns:
        [B, N, heads, d].
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return mixed.transpose(1, 2)
