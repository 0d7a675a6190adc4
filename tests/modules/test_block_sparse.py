"""Block-sparse attention equals dense attention under the same mask, and costs what its density says."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._dynamo.exc import FailOnRecompileLimitHit
from torch.nn.attention.flex_attention import BlockMask

from kandinsky5.model.nabla import dense_masked_attention
from modules import block_sparse
from modules.block_sparse import flex_block_attention, gathered_block_attention
from modules.flops import FlopCounter
from modules.live_bytes import LiveBytes

BLOCK = 64
BLOCKS = 20
SHAPE = (2, BLOCKS * BLOCK, 2, 16)  # [B, N, heads, d]


def random_case(density: float, seed: int = 0) -> tuple[list[Tensor], Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tensors = [torch.randn(SHAPE, generator=generator) for _ in range(3)]
    mask = torch.rand(2, 2, BLOCKS, BLOCKS, generator=generator) < density
    return tensors, mask | torch.eye(BLOCKS, dtype=torch.bool)


@pytest.mark.parametrize("density", [0.05, 0.4, 1.0])
@pytest.mark.parametrize("limit", [4096, 7], ids=["one gather", "many gathers"])
def test_gathered_output_and_gradients_equal_the_dense_mask(
    monkeypatch: pytest.MonkeyPatch, density: float, limit: int
) -> None:
    monkeypatch.setattr(block_sparse, "GATHERED_BLOCKS", limit)
    tensors, mask = random_case(density)
    grad = torch.randn(SHAPE, generator=torch.Generator().manual_seed(1))

    def run(attend: Callable[..., Tensor]) -> list[Tensor]:
        inputs = [tensor.clone().requires_grad_(True) for tensor in tensors]
        out = attend(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, grad)]

    ours = run(lambda q, k, v: gathered_block_attention(q, k, v, mask, BLOCK))
    dense = run(lambda q, k, v: dense_masked_attention(q, k, v, mask))
    for a, b in zip(ours, dense, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=2e-6)


def attention_flops(density: float, *, backward: bool) -> int:
    tensors, _ = random_case(1.0)
    kept = round(BLOCKS * density)
    mask = torch.zeros(2, 2, BLOCKS, BLOCKS, dtype=torch.bool)
    mask[..., :kept] = True
    with FlopCounter() as counter:
        inputs = [tensor.requires_grad_(backward) for tensor in tensors]
        out = gathered_block_attention(*inputs, mask, BLOCK)
        if backward:
            out.sum().backward()
    return counter.total


@pytest.mark.parametrize("backward", [False, True])
def test_work_follows_density(backward: bool) -> None:
    """Fails if attention is computed densely and masked afterwards."""
    full = attention_flops(1.0, backward=backward)
    scores = 2 * 2 * (BLOCKS * BLOCK) ** 2 * 16 * 2  # [B, heads, N, N] from d channels
    assert full == scores * (2 + (2 + 5 if backward else 0))  # the gathered keys' attention is made again
    assert attention_flops(0.5, backward=backward) == full // 2
    assert attention_flops(0.2, backward=backward) == full // 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_flex_attention_equals_the_dense_mask_or_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    """Past torch's limit of graphs it would run uncompiled, which attends to all blocks without a word."""
    torch._dynamo.reset()
    tensors, mask = random_case(0.3)
    with torch.no_grad(), torch._dynamo.config.patch(recompile_limit=1):
        for clips in (slice(2), slice(1)):  # one clip and several are different graphs
            inputs = [tensor[clips] for tensor in tensors]
            sparse = flex_block_attention(*inputs, mask[clips], BLOCK)
            dense = dense_masked_attention(*inputs, mask[clips])
            torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=2e-6)
        monkeypatch.setattr(block_sparse, "FLEX_GRAPHS", 1)
        with pytest.raises(FailOnRecompileLimitHit):
            flex_block_attention(*(tensor.double() for tensor in tensors), mask, BLOCK)


@pytest.fixture
def block_masks(monkeypatch: pytest.MonkeyPatch) -> list[BlockMask]:
    """The masks that the kernel was given; it computes nothing."""
    given: list[BlockMask] = []

    def kernel(query: Tensor, key: Tensor, value: Tensor, *, block_mask: BlockMask, **_: object) -> Tensor:
        given.append(block_mask)
        return torch.empty_like(query)

    monkeypatch.setattr(block_sparse, "compiled_flex_attention", lambda: kernel)
    return given


def list_bytes(mask: BlockMask) -> int:
    lists = {id(part): part for part in mask.as_tuple() if isinstance(part, Tensor)}
    return sum(part.nbytes for part in lists.values())


PAIRS = 32 * 1464**2
"""Of blocks, in Pro's heads, for 241 frames of 768x512."""


def long_clip(*, has_grad: bool) -> tuple[list[Tensor], Tensor]:
    """Without data."""
    shape = (1, 1464 * BLOCK, 32, 128)
    tensors = [
        torch.empty(shape, device="meta", dtype=torch.bfloat16, requires_grad=has_grad) for _ in range(3)
    ]
    return tensors, torch.empty(1, 32, 1464, 1464, dtype=torch.bool, device="meta")


@pytest.mark.parametrize(("has_grad", "lists"), [(False, 1), (True, 2)])
def test_a_long_clip_has_no_index_list_too_many(
    block_masks: list[BlockMask], has_grad: bool, lists: int
) -> None:
    """Four bytes per pair of blocks and list; making them takes little more."""
    tensors, mask = long_clip(has_grad=has_grad)
    with LiveBytes() as counted:
        flex_block_attention(*tensors, mask, BLOCK)
    held = list_bytes(block_masks[0])
    assert held == pytest.approx(4 * PAIRS * lists, rel=1e-3)
    assert counted.peak <= held + max(tensors[0].nbytes, 16 * block_sparse.SORTED_PAIRS)
    assert (block_masks[0].q_indices is None) is not has_grad


@pytest.mark.parametrize("has_grad", [False, True])
def test_the_index_lists_are_counted_where_there_is_no_data(
    block_masks: list[BlockMask], has_grad: bool
) -> None:
    tensors, mask = long_clip(has_grad=has_grad)
    with LiveBytes() as real:
        flex_block_attention(*tensors, mask, BLOCK)
    with LiveBytes() as counted:
        out = block_sparse.block_sparse_attention(*tensors, mask, BLOCK)
        waiting = counted.live - out.nbytes
        # The other bytes are a fused kernel's sums, one float32 per query and head.
        assert counted.peak == pytest.approx(real.peak + 4 * 32 * 1464 * BLOCK, rel=1e-3)
        if not has_grad:
            assert waiting == 0
            return
        assert waiting >= list_bytes(block_masks[0])
        out.sum().backward()
        del out
    assert counted.live == sum(tensor.nbytes for tensor in tensors)  # their gradients


@pytest.mark.parametrize("pairs", [2**24, 3 * BLOCKS**2, 1], ids=["one sort", "three heads", "one head"])
def test_index_lists_are_those_that_torch_would_derive(
    monkeypatch: pytest.MonkeyPatch, block_masks: list[BlockMask], pairs: int
) -> None:
    monkeypatch.setattr(block_sparse, "SORTED_PAIRS", pairs)
    tensors, mask = random_case(0.3)
    flex_block_attention(*(tensor.requires_grad_() for tensor in tensors), mask, BLOCK)
    ours = block_masks[0]
    torchs = BlockMask.from_kv_blocks(ours.kv_num_blocks, ours.kv_indices, BLOCK_SIZE=BLOCK)
    assert torch.equal(ours.to_dense().bool(), mask)
    assert ours.shape == torchs.shape
    assert ours.q_num_blocks is not None
    assert torchs.q_num_blocks is not None
    assert ours.q_indices is not None
    assert torchs.q_indices is not None
    assert torch.equal(ours.q_num_blocks, torchs.q_num_blocks)
    assert torch.equal(ours.q_indices, torchs.q_indices)


@pytest.mark.parametrize(("platform", "package"), [("win32", "triton-windows"), ("linux", "triton")])
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, platform: str, package: str) -> None:
    monkeypatch.setattr(block_sparse.sys, "platform", platform)
    monkeypatch.setattr(block_sparse, "has_triton", lambda: False)
    assert f"pip install {package} " in block_sparse.describe_block_sparse_path(torch.device("cuda"))
    assert block_sparse.describe_block_sparse_path(torch.device("cpu")) == "gathered blocks in plain torch"
