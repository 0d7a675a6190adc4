"""Block-sparse attention equals dense attention under the same mask, and costs what its density says."""

from __future__ import annotations

import shutil
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from kandinsky5.model.nabla import dense_masked_attention
from modules import block_sparse
from modules.block_sparse import flex_block_attention, gathered_block_attention
from tests.flops import count_flops

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
    with count_flops() as counter:
        inputs = [tensor.requires_grad_(backward) for tensor in tensors]
        out = gathered_block_attention(*inputs, mask, BLOCK)
        if backward:
            out.sum().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("backward", [False, True])
def test_work_follows_density(backward: bool) -> None:
    """Fails if attention is computed densely and masked afterwards."""
    full = attention_flops(1.0, backward=backward)
    scores = 2 * 2 * (BLOCKS * BLOCK) ** 2 * 16 * 2  # [B, heads, N, N] from d channels
    assert full == scores * (2 + (2 + 5 if backward else 0))  # the gathered keys' attention is made again
    assert attention_flops(0.5, backward=backward) == full // 2
    assert attention_flops(0.2, backward=backward) == full // 5


@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling for the CPU needs g++")
def test_compiled_flex_attention_equals_the_dense_mask() -> None:
    tensors, mask = random_case(0.3)
    with torch.no_grad():
        sparse = flex_block_attention(*tensors, mask, BLOCK)
        dense = dense_masked_attention(*tensors, mask)
    torch.testing.assert_close(sparse, dense, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(("platform", "package"), [("win32", "triton-windows"), ("linux", "triton")])
def test_a_missing_compiler_is_named(monkeypatch: pytest.MonkeyPatch, platform: str, package: str) -> None:
    monkeypatch.setattr(block_sparse.sys, "platform", platform)
    monkeypatch.setattr(block_sparse, "_has_triton", lambda: False)
    assert f"pip install {package} " in block_sparse.describe_block_sparse_path(torch.device("cuda"))
    assert block_sparse.describe_block_sparse_path(torch.device("cpu")) == "gathered blocks in plain torch"
