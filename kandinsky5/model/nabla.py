"""NABLA: which 64-token blocks attend to which, chosen per head from block means, and attention over them.

Source: kandinskylab/kandinsky-5:kandinsky/models/utils.py (fractal order, STA mask, block selection).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from dataset.geometry import NABLA_STEP
from kandinsky5.tasks import NablaParams
from modules.block_sparse import block_sparse_attention, describe_block_sparse_path, heads_at_a_time
from modules.logs import get_logger

log = get_logger(__name__)

SQUARE = 8
"""Side of the token squares; 64 consecutive tokens in fractal order are one square of one frame."""
BLOCK = SQUARE * SQUARE

MaskObserver = Callable[[Tensor], None]
"""Called with the block mask [B, heads, nb, nb] of every visual block, in order."""


@dataclass(frozen=True, slots=True)
class NablaPlan:
    """Data shared by all visual blocks of one forward pass."""

    params: NablaParams
    sta_mask: Tensor
    """[nb, nb] bool, the sliding window."""
    observer: MaskObserver | None = None
    packed_masks: dict[int, Tensor] = field(default_factory=dict)
    """Decisions of the blocks already passed, so that gradient checkpointing does not take them anew; by the
    id of the attention layer."""


class DensityReport:
    """A `MaskObserver` that logs, after the first forward pass, its density and the implementation.

    Args:
        num_blocks: visual blocks of the model.
    """

    def __init__(self, num_blocks: int) -> None:
        self._densities: list[Tensor] = []
        self._num_blocks = num_blocks

    def __call__(self, block_mask: Tensor) -> None:
        """block_mask [B, heads, nb, nb] of the next visual block."""
        if len(self._densities) == self._num_blocks:
            return
        self._densities.append(block_mask.count_nonzero() / block_mask.numel())
        if len(self._densities) == self._num_blocks:
            log.info(
                "NABLA attends to %.1f %% of all block pairs, by %s",
                100 * torch.stack(self._densities).mean().item(),
                describe_block_sparse_path(block_mask.device),
            )


def to_fractal(grid_tokens: Tensor) -> Tensor:
    """[..., f, h, w, D] row-major -> [..., f*h*w, D] in fractal order; h and w must be multiples of 8."""
    return rearrange(grid_tokens, "... f (Y y) (X x) d -> ... (f Y X y x) d", y=SQUARE, x=SQUARE)


def from_fractal(tokens: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """[..., f*h*w, D] in fractal order -> the same in row-major order of grid (f, h, w)."""
    f, h, w = grid
    return rearrange(
        tokens,
        "... (f Y X y x) d -> ... (f Y y X x) d",
        f=f,
        Y=h // SQUARE,
        X=w // SQUARE,
        y=SQUARE,
        x=SQUARE,
    )


def check_geometry(grid: tuple[int, int, int]) -> None:
    """Raise ValueError unless the token grid (f, h, w) can be cut into 8x8 squares."""
    _, h, w = grid
    if h % SQUARE or w % SQUARE:
        raise ValueError(
            f"NABLA needs a token grid of whole {SQUARE}x{SQUARE} squares, got {h}x{w} tokens: "
            f"the clip's width and height must be multiples of {NABLA_STEP} pixels"
        )


def sta_mask(blocks: tuple[int, int, int], params: NablaParams, device: torch.device | str) -> Tensor:
    """The sliding window over blocks (frames, square rows, square columns) -> [nb, nb] bool.

    A pair is kept when it is no further apart than half the window width along every axis.
    """
    near = []
    for size, window in zip(blocks, (params.wT, params.wH, params.wW), strict=True):
        index = torch.arange(size, device=device)
        near.append((index[:, None] - index).abs() <= window // 2)
    near_t, near_h, near_w = near
    mask = near_t[:, None, None, :, None, None] & near_h[:, None, None, :, None] & near_w[:, None, None, :]
    count = math.prod(blocks)
    return mask.reshape(count, count)


def make_plan(
    grid: tuple[int, int, int],
    params: NablaParams,
    device: torch.device | str,
    observer: MaskObserver | None = None,
) -> NablaPlan:
    """Prepare a forward pass over the token grid (f, h, w); ValueError when it has no whole squares."""
    check_geometry(grid)
    f, h, w = grid
    return NablaPlan(params, sta_mask((f, h // SQUARE, w // SQUARE), params, device), observer)


@torch.no_grad()
def select_blocks(query: Tensor, key: Tensor, plan: NablaPlan) -> Tensor:
    """Choose the key blocks of every query block: the fewest that carry the mass P, and the window.

    Args:
        query, key: [B, N, heads, d] after normalisation and rotation, in fractal order.
    Returns:
        [B, heads, nb, nb] bool.
    """
    query_means, key_means = _block_means(query), _block_means(key)  # [B, heads, nb, d]
    batch, heads, nb, _ = query_means.shape
    mask = torch.empty(batch * heads, nb, nb, dtype=torch.bool, device=query.device)
    # A pair of blocks takes over twenty bytes here and one in the mask: few heads at a time.
    tensors = (mask, query_means.flatten(0, 1), key_means.flatten(0, 1))
    for target, queries, keys in zip(*(t.split(heads_at_a_time(nb)) for t in tensors), strict=True):
        scores = queries @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1])
        target.copy_(_carrying_most(scores.float().softmax(dim=-1), plan.params))
    if plan.params.add_sta:
        mask |= plan.sta_mask
    return mask.view(batch, heads, nb, nb)


def _carrying_most(weights: Tensor, params: NablaParams) -> Tensor:
    """Softmax weights [..., nb] -> bool, the largest ones by the method of `params`."""
    ascending, order = weights.sort(dim=-1)
    if params.method == "topcdf":
        # The smallest entries whose sum stays below 1 - P are left out.
        keep_sorted = ascending.cumsum(dim=-1) >= 1 - params.P
    else:
        count = weights.shape[-1]
        kept = math.ceil(params.P * count) if params.P < 1 else int(params.P)
        keep_sorted = torch.zeros_like(ascending, dtype=torch.bool)
        keep_sorted[..., max(count - kept, 0) :] = True
    return torch.zeros_like(keep_sorted).scatter_(-1, order, keep_sorted)


def _block_means(heads: Tensor) -> Tensor:
    """[B, N, heads, d] -> [B, heads, N / 64, d]."""
    return rearrange(heads, "b (n k) h d -> b h n k d", k=BLOCK).mean(dim=-2)


def dense_masked_attention(query: Tensor, key: Tensor, value: Tensor, block_mask: Tensor) -> Tensor:
    """The reference: dense attention under the block mask repeated 64x64; memory grows with N squared.

    query, key, value [B, N, heads, d], block_mask [B, heads, nb, nb] -> [B, N, heads, d].
    """
    element_mask = block_mask.repeat_interleave(BLOCK, dim=-1).repeat_interleave(BLOCK, dim=-2)
    mixed = F.scaled_dot_product_attention(
        query.transpose(1, 2), key.transpose(1, 2), value.transpose(1, 2), attn_mask=element_mask
    )
    return mixed.transpose(1, 2)


@torch.compiler.disable  # keeps state between passes and brings its own compiled kernel
def nabla_attention(query: Tensor, key: Tensor, value: Tensor, plan: NablaPlan, layer: nn.Module) -> Tensor:
    """Attention over the selected blocks; [B, N, heads, d] in fractal order -> [B, N, heads, d].

    `layer` is the caller: under gradient checkpointing its second pass reuses the decisions of its first. Its
    id is taken here, outside compiled code, where it would tie a graph to one block.
    """
    packed = plan.packed_masks.pop(id(layer), None)
    if packed is None:
        block_mask = select_blocks(query, key, plan)
        if plan.observer is not None:
            plan.observer(block_mask)
        if torch.is_grad_enabled():
            plan.packed_masks[id(layer)] = _pack(block_mask)
    else:
        block_mask = _unpack(packed, len(plan.sta_mask))
    return block_sparse_attention(query, key, value, block_mask, BLOCK)


def _pack(mask: Tensor) -> Tensor:
    """[..., n] bool -> [..., ceil(n / 8)] uint8: all layers' masks of a long clip would fill gigabytes."""
    padded = F.pad(mask, (0, -mask.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (padded * _bit_values(mask.device)).sum(dim=-1, dtype=torch.uint8)


def _unpack(packed: Tensor, count: int) -> Tensor:
    return ((packed[..., None] & _bit_values(packed.device)) != 0).flatten(-2)[..., :count]


def _bit_values(device: torch.device) -> Tensor:
    return 2 ** torch.arange(8, dtype=torch.uint8, device=device)
