"""Scaled dot-product attention over [B, N, heads, d] tensors, whatever computes it."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def attention(query: Tensor, key: Tensor, value: Tensor, *, key_mask: Tensor | None = None) -> Tensor:
    """softmax(query key^T / sqrt(d)) value, per head.

    Args:
        query: [B, N, heads, d].
        key, value: [B, L, heads, d].
        key_mask: [B, L] bool, true where a key may be seen; None where all may (faster than an all-true mask).
    Returns:
        [B, N, heads, d].
    """
    mask = None if key_mask is None else key_mask[:, None, None, :]
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=mask
    )
    return mixed.transpose(1, 2)
