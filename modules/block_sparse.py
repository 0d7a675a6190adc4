"""Block-sparse attention: each query block attends to selected key blocks, at proportional cost."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import BlockMask, flex_attention, noop_mask

from modules.attention import fused_attention

GATHERED_BLOCKS = 4096
"""How many key blocks the gathered path copies at a time; it bounds its memory."""

SORTED_PAIRS = 2**24
"""About how many pairs of blocks are sorted at a time."""

FLEX_GRAPHS = 64
"""Most graphs of flex_attention: one each for dtypes, with and without gradients, one clip or several."""

_PADDING_SHARE = 0.125
"""Rows whose counts differ by up to this share are computed together, padded to the longest."""


def block_sparse_path(device: torch.device) -> str:
    """Path of `block_sparse_attention` on a device: "flex" (compiled) or "gathered" (plain torch)."""
    return "flex" if device.type == "cuda" and has_triton() else "gathered"


def describe_block_sparse_path(device: torch.device) -> str:
    """Describe the implementation for the log, and name the faster package if it is missing."""
    if block_sparse_path(device) == "flex":
        return "compiled flex_attention"
    description = "gathered blocks in plain torch"
    if device.type == "cuda":
        package = "triton-windows" if sys.platform == "win32" else "triton"
        description += f" (pip install {package} for compiled flex_attention, which is faster)"
    return description


def has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def block_sparse_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int
) -> Tensor:
    """Exact softmax attention over the kept blocks; work and memory follow the mask's density.

    Args:
        query, key, value: [B, N, heads, d]; N is a multiple of block_size.
        block_mask: [B, heads, nb, nb] bool, nb = N / block_size; every row keeps at least one block.
    Returns:
        [B, N, heads, d].
    """
    if query.is_meta:
        return _without_data(query, key, value, block_mask, block_size)
    if block_sparse_path(query.device) == "flex":
        return flex_block_attention(query, key, value, block_mask, block_size)
    return gathered_block_attention(query, key, value, block_mask, block_size)


def _without_data(query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int) -> Tensor:
    """What the compiled path holds, to count memory: its index lists, and the tensors of a fused kernel."""
    mask = _flex_mask(block_mask, block_size, has_backward=_has_backward(query, key, value))
    heads = query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2)
    mixed = fused_attention(*heads).transpose(1, 2)
    return _HoldForBackward.apply(mixed, mask)  # type: ignore[no-any-return]


class _HoldForBackward(torch.autograd.Function):
    """Passes a tensor on and holds the index lists of a mask until the backward, as the kernel's does."""

    @staticmethod
    def forward(ctx: Any, mixed: Tensor, mask: BlockMask) -> Tensor:
        ctx.save_for_backward(mask.kv_num_blocks, mask.kv_indices, mask.q_num_blocks, mask.q_indices)
        return mixed.view_as(mixed)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, None]:
        del ctx
        return grad_outputs[0], None


# Compiled flex_attention


def flex_block_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int
) -> Tensor:
    """The kept blocks through compiled flex_attention; arguments as in `block_sparse_attention`.

    Un-compiled flex_attention ignores the index lists and computes dense attention, so it is never called:
    past `FLEX_GRAPHS` graphs torch raises `FailOnRecompileLimitHit`.
    """
    mask = _flex_mask(block_mask, block_size, has_backward=_has_backward(query, key, value))
    # A limit of its own: `--compile_cache_size_limit` is about the model's blocks.
    with torch._dynamo.config.patch(recompile_limit=FLEX_GRAPHS):
        mixed = compiled_flex_attention()(
            query.transpose(1, 2),
            key.transpose(1, 2),
            value.transpose(1, 2),
            block_mask=mask,
            kernel_options=_kernel_options(query.device, block_size),
        )
    return mixed.transpose(1, 2)


def _has_backward(*inputs: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)


def _flex_mask(block_mask: Tensor, block_size: int, *, has_backward: bool) -> BlockMask:
    """The index lists of [B, heads, nb, nb]: by rows, and for the backward by columns too.

    Built here, because `BlockMask.from_kv_blocks` derives the second list through a dense int32 mask. The
    kept blocks are given as the partial ones, whose mask is empty: then no lists of full blocks exist.
    """
    rows = _kept_first(block_mask)
    columns = _kept_first(block_mask.mT) if has_backward else (None, None)
    return BlockMask(
        seq_lengths=(block_mask.shape[-2] * block_size, block_mask.shape[-1] * block_size),
        kv_num_blocks=rows[0],
        kv_indices=rows[1],
        full_kv_num_blocks=None,
        full_kv_indices=None,
        q_num_blocks=columns[0],
        q_indices=columns[1],
        full_q_num_blocks=None,
        full_q_indices=None,
        BLOCK_SIZE=(block_size, block_size),
        mask_mod=noop_mask,
    )


def _kept_first(block_mask: Tensor) -> tuple[Tensor, Tensor]:
    """Counts [B, heads, rows] of kept blocks, and [B, heads, rows, columns] their columns before the others.

    Both int32. A sort takes ten bytes per pair of blocks beside the four that stay: few heads at a time.
    """
    indices = torch.empty(block_mask.shape, dtype=torch.int32, device=block_mask.device)
    heads = heads_at_a_time(block_mask.shape[-1])
    masks = block_mask.flatten(0, 1).split(heads)
    for mask, target in zip(masks, indices.flatten(0, 1).split(heads), strict=True):
        bits = mask.to(torch.uint8, memory_format=torch.contiguous_format)
        target.copy_(bits.argsort(dim=-1, descending=True, stable=True))
    return block_mask.sum(dim=-1, dtype=torch.int32), indices


def heads_at_a_time(num_blocks: int) -> int:
    """Number of heads whose block pairs are sorted together; bounds the scratch memory for long clips."""
    return max(1, SORTED_PAIRS // num_blocks**2)


@cache
def compiled_flex_attention() -> Any:
    return torch.compile(flex_attention, dynamic=True, fullgraph=True)


def _kernel_options(device: torch.device, block_size: int) -> dict[str, int] | None:
    """Tile sizes that divide the mask's blocks and, at head dim 128, fit a consumer card's shared memory."""
    if device.type != "cuda":
        return None
    half = block_size // 2
    return {
        "BLOCK_M": block_size, "BLOCK_N": half,
        "BLOCK_M1": half, "BLOCK_N1": block_size, "BLOCK_M2": block_size, "BLOCK_N2": half,
    }  # fmt: skip


# Gathered blocks


@dataclass(frozen=True, slots=True)
class _Group:
    """Query blocks that keep about equally many key blocks."""

    rows: Tensor
    """[n], indices into the flat list of query blocks."""
    key_blocks: Tensor
    """[n, count], indices into the flat list of key blocks."""
    key_mask: Tensor | None
    """[n, 1, count * block_size] bool, false on padding; None where nothing is padded."""


def gathered_block_attention(
    query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor, block_size: int
) -> Tensor:
    """The kept blocks gathered and attended in plain torch; arguments as in `block_sparse_attention`.

    Reads the counts of kept blocks on the host, so on an accelerator it waits for the mask.
    """
    batch, _, heads, _ = query.shape
    flat = [_to_blocks(tensor, block_size) for tensor in (query, key, value)]
    groups = list(_group_rows(block_mask.flatten(0, 1), block_size))
    out: Tensor = _GatheredAttention.apply(*flat, groups)  # type: ignore[assignment]
    blocks = out.view(batch, heads, -1, block_size, out.shape[-1])  # [B, heads, nb, block, d]
    return blocks.permute(0, 2, 3, 1, 4).flatten(1, 2)


def _to_blocks(tensor: Tensor, block_size: int) -> Tensor:
    """[B, N, heads, d] -> [B * heads * nb, block, d]."""
    return tensor.unflatten(1, (-1, block_size)).permute(0, 3, 1, 2, 4).flatten(0, 2)


def _group_rows(mask: Tensor, block_size: int) -> Iterator[_Group]:
    """mask [B * heads, nb, nb] -> groups of rows of similar counts, few enough to gather at once."""
    nb = mask.shape[-1]
    rows_mask = mask.flatten(0, 1)  # [rows, nb]
    counts = rows_mask.sum(dim=-1)
    columns = rows_mask.to(torch.uint8).argsort(dim=-1, descending=True, stable=True)
    first_key = torch.arange(len(rows_mask), device=mask.device) // nb * nb
    sorted_counts, order = counts.sort()
    for start, end, count in _similar_runs(sorted_counts.tolist()):
        rows = order[start:end]
        is_kept = torch.arange(count, device=mask.device) < counts[rows, None]
        key_mask = None
        if sorted_counts[start] != count:
            key_mask = is_kept.repeat_interleave(block_size, dim=-1)[:, None]
        yield _Group(rows, columns[rows, :count] + first_key[rows, None], key_mask)


def _similar_runs(counts: Sequence[int]) -> Iterator[tuple[int, int, int]]:
    """Ascending counts -> (start, end, largest count) of runs to compute together."""
    start = 0
    while start < len(counts):
        limit = counts[start] * (1 + _PADDING_SHARE)
        end = start + 1
        while (
            end < len(counts) and counts[end] <= limit and (end + 1 - start) * counts[end] <= GATHERED_BLOCKS
        ):
            end += 1
        yield start, end, counts[end - 1]
        start = end


class _GatheredAttention(torch.autograd.Function):
    """Attention group by group; the gathered keys and values are made again in the backward."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, groups: list[_Group]) -> Tensor:
        out = torch.empty_like(query)
        for group in groups:
            out[group.rows] = _attend(
                query[group.rows], key[group.key_blocks], value[group.key_blocks], group
            )
        ctx.save_for_backward(query, key, value)
        ctx.groups = groups
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        (grad,) = grad_outputs
        query, key, value = ctx.saved_tensors
        # Key and value gradients are sums over many query blocks: kept in float32 until all are in.
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros_like(tensor, dtype=torch.float32) for tensor in (key, value))
        for group in ctx.groups:
            sources = (query[group.rows], key[group.key_blocks], value[group.key_blocks])
            with torch.enable_grad():
                inputs = [source.detach().requires_grad_(True) for source in sources]
                mixed = _attend(inputs[0], inputs[1], inputs[2], group)
            parts = torch.autograd.grad(mixed, inputs, grad[group.rows])
            grad_query[group.rows] = parts[0]
            blocks = group.key_blocks.flatten()
            grad_key.index_add_(0, blocks, parts[1].flatten(0, 1).float())
            grad_value.index_add_(0, blocks, parts[2].flatten(0, 1).float())
        return grad_query, grad_key.to(key.dtype), grad_value.to(value.dtype), None


def _attend(query: Tensor, keys: Tensor, values: Tensor, group: _Group) -> Tensor:
    """query [n, block, d], keys and values [n, count, block, d] -> [n, block, d]."""
    mask = None if group.key_mask is None else group.key_mask[:, None]
    mixed = F.scaled_dot_product_attention(
        query[:, None], keys.flatten(1, 2)[:, None], values.flatten(1, 2)[:, None], attn_mask=mask
    )
    return mixed[:, 0]
