"""NF4 weights by bitsandbytes: size, error, what the backward pass keeps, and where they are refused."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modules import nf4
from modules.block_swap import BlockSwap
from modules.errors import ResourceError
from modules.nf4 import Nf4Linear, check_nf4, has_nf4, quantise_nf4, widen_nf4

CPU = torch.device("cpu")
OUT, IN = 48, 128


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def layer(dtype: torch.dtype, seed: int = 0) -> Nf4Linear:
    return Nf4Linear(quantise_nf4(draw(OUT, IN, seed=seed) / 8), draw(OUT, seed=1), compute_dtype=dtype)


def size(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def test_half_a_byte_per_weight_and_the_error_of_normal_weights() -> None:
    weight = draw(1024, 1024)
    packed = quantise_nf4(weight)
    linear = Nf4Linear(packed, None, compute_dtype=torch.bfloat16)
    assert size(linear) == 1024**2 // 2 + 1024**2 // 64 + 4 * (1024**2 // 64 // 256) + 4
    assert not any(p.requires_grad for p in linear.parameters())
    errors = (widen_nf4(packed, torch.float32) - weight).norm() / weight.norm()
    assert 0.08 < errors < 0.1
    assert torch.equal(linear.widened(), widen_nf4(packed, torch.float32))


def test_numbers_are_those_of_the_published_formula() -> None:
    """The nearest of 16 numbers times the largest of 64 neighbours, that itself in 8 bits."""
    weight = draw(OUT, IN)
    code, nested_code = nf4._codes(CPU)
    packed = quantise_nf4(weight)
    blocks = packed.shape[0] * packed.shape[1] // nf4.BLOCK
    scales = nested_code[packed.absmax.long()] * packed.nested_absmax.repeat_interleave(256)[:blocks]
    scales = scales + packed.offset
    largest = weight.view(blocks, nf4.BLOCK).abs().amax(dim=1)
    assert ((scales - largest).abs() / largest).max() < 0.02
    numbers = torch.stack((packed.values >> 4, packed.values & 15), dim=-1).view(blocks, nf4.BLOCK).long()
    nearest = (weight.view(blocks, -1, 1) / largest[:, None, None] - code).abs().argmin(dim=2)
    assert (numbers != nearest).float().mean() < 1e-3
    expected = (code[numbers] * scales[:, None]).view(OUT, IN)
    torch.testing.assert_close(widen_nf4(packed, torch.float32), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_outputs_and_gradients_are_those_of_the_widened_weight(dtype: torch.dtype) -> None:
    linear = layer(dtype)
    x = draw(2, 20, IN, seed=2).to(dtype).requires_grad_()
    grad = draw(2, 20, OUT, seed=3).to(dtype)
    output = linear(x)
    output.backward(grad)
    assert x.grad is not None
    weight, wide = linear.widened(), x.detach().float()
    assert linear.bias is not None
    limit = {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]
    for got, exact in (
        (output, F.linear(wide, weight, linear.bias.float())),
        (x.grad, grad.float() @ weight),
        (linear.unrounded_product(x[0]), wide[0] @ weight.t()),
    ):
        assert got.dtype == dtype
        assert (got.float() - exact).norm() / exact.norm() < limit
    assert torch.equal(linear.input_gradient(grad.flatten(0, 1)), x.grad.flatten(0, 1))


def test_the_backward_pass_keeps_the_packed_weight_alone() -> None:
    linear = layer(torch.bfloat16)
    kept: list[int] = []

    def pack(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        linear(draw(20, IN).bfloat16().requires_grad_())
    assert linear.bias is not None
    assert sum(kept) == size(linear) - linear.bias.nbytes


def test_weights_without_data_have_the_same_sizes() -> None:
    real, planned = quantise_nf4(draw(OUT, IN)), quantise_nf4(torch.empty(OUT, IN, device="meta"))
    for one, other in zip(real[:4], planned[:4], strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
    linear = Nf4Linear(planned, None, compute_dtype=torch.bfloat16)
    x = torch.empty(20, IN, dtype=torch.bfloat16, device="meta", requires_grad=True)
    linear(x).sum().backward()
    assert x.grad is not None


def test_swapped_layers_compute_the_same() -> None:
    blocks = [layer(torch.float32, seed) for seed in range(3)]
    x = draw(20, IN)
    expected = [block(x) for block in blocks]
    swap = BlockSwap(blocks, CPU, travels=lambda _: True, ring_size=2)
    assert swap.host_bytes >= 3 * (OUT * IN // 2)
    assert all(torch.equal(block(x), wanted) for block, wanted in zip(blocks, expected, strict=True))


def test_it_is_refused_without_bitsandbytes(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nf4(CPU)
    assert has_nf4()
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    monkeypatch.delattr("bitsandbytes.functional")
    assert not has_nf4()
    with pytest.raises(ResourceError, match=r"--nf4_base needs bitsandbytes.*pip install bitsandbytes"):
        check_nf4(CPU)


@pytest.mark.parametrize("words", ["Error named symbol not found", ""])
def test_it_is_refused_where_its_kernels_are_missing(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def fail(*_: object, **__: object) -> None:
        raise RuntimeError(words)

    monkeypatch.setattr("bitsandbytes.functional.quantize_4bit", fail)
    with pytest.raises(ResourceError, match=f"failed at a small weight on cpu: {words or 'RuntimeError'}"):
        check_nf4(CPU)


def test_it_is_refused_where_it_is_wrong(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nf4, "widen_nf4", lambda weight, dtype: torch.zeros(64, 128, dtype=dtype))
    with pytest.raises(ResourceError, match="is wrong, relative error 1"):
        check_nf4(CPU)
