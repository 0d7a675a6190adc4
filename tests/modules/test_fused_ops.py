"""The fused spellings equal the plain formulas, forward and backward, and stay narrow."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from modules import fused_ops

EPS = torch.finfo(torch.float32).eps


def plain_norm_rotate(x: Tensor, weight: Tensor, rotary: Tensor | None) -> Tensor:
    normed = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS) * weight
    if rotary is None:
        return normed
    a, b = normed.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = rotary.unbind(-1)
    return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)


@pytest.mark.parametrize("rotates", [True, False])
@pytest.mark.parametrize("chunk", [2**22, 200], ids=["whole", "chunked"])
def test_norm_and_rotation_equal_the_formula_and_its_gradients(
    monkeypatch: pytest.MonkeyPatch, rotates: bool, chunk: int
) -> None:
    monkeypatch.setattr(fused_ops, "CHUNK_ELEMENTS", chunk)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 11, 3, 8, generator=generator, dtype=torch.float64).float()
    weight = torch.rand(8, generator=generator) + 0.5
    angles = torch.rand(11, 1, 4, generator=generator) * 6
    rotary = torch.stack([angles.cos(), angles.sin()], -1) if rotates else None
    grad = torch.randn(x.shape, generator=generator)
    results = []
    for function in (
        lambda x, w: fused_ops.rms_norm_rotate(x, w, EPS, rotary),
        lambda x, w: plain_norm_rotate(x, w, rotary),
    ):
        inputs = [x.clone().requires_grad_(True), weight.clone().requires_grad_(True)]
        out = function(*inputs)
        out.backward(grad)
        results.append([out.detach(), *(tensor.grad for tensor in inputs)])
    for ours, plain in zip(*results, strict=True):
        torch.testing.assert_close(ours, plain, rtol=2e-5, atol=2e-6)


def test_modulated_layer_norm_uses_each_samples_own_weights() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 5, 16, generator=generator)
    weight, bias = torch.randn(2, 3, 16, generator=generator)
    plain = F.layer_norm(x, (16,)) * weight[:, None] + bias[:, None]
    torch.testing.assert_close(fused_ops.modulated_layer_norm(x, weight, bias), plain)


@pytest.mark.parametrize("shape", [(3, 5, 16), (15, 16)], ids=["samples", "rows"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_modulated_norm_can_be_computed_again_with_its_gradient(
    dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, *shape, generator=generator).to(dtype)
    norm = fused_ops.ModulatedLayerNorm(*torch.randn(2, 3, 16, generator=generator))
    input_ = x.clone().requires_grad_()
    value = norm.value(input_)
    value.backward(grad)
    again, gradient = norm.again(x)
    assert torch.equal(again, value)
    assert torch.equal(gradient(grad.clone()), input_.grad)


class WideTensors(TorchDispatchMode):
    """Collects the sizes of float32 tensors that operators make."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.dtype in (torch.float32, torch.complex64):
                self.largest = max(self.largest, tensor.numel() * (1 + tensor.is_complex()))
        return out


def test_no_activation_is_ever_held_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ops, "CHUNK_ELEMENTS", 256)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 64, 4, 16, generator=generator).bfloat16().requires_grad_(True)
    angles = torch.rand(64, 1, 8, generator=generator)
    rotary = torch.stack([angles.cos(), angles.sin()], -1)
    weight, bias = torch.ones(2, 1, 64)
    gate = torch.ones(1, 64, dtype=torch.bfloat16)
    with WideTensors() as seen:
        heads = fused_ops.rms_norm_rotate(x, torch.ones(16), EPS, rotary)
        tokens = fused_ops.modulated_layer_norm(heads.flatten(-2), weight, bias)
        fused_ops.gated_sum(tokens, tokens, gate).sum().backward()
    assert seen.largest < x.numel() // 4


def test_gelu_overwrites_its_input_only_when_no_gradient_needs_it() -> None:
    hidden = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    expected = F.gelu(hidden)
    assert torch.equal(fused_ops.gelu(hidden), expected)
    assert not torch.equal(hidden, expected)
    with torch.no_grad():
        assert torch.equal(fused_ops.gelu(hidden), expected)
    assert torch.equal(hidden, expected)


def test_the_gradients_of_a_gated_sum() -> None:
    x, branch = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0))
    gate = torch.tensor([[0.5, 1.0, -2.0, 0.0]]).expand(2, 4)
    inputs = [x.clone().requires_grad_(), branch.clone().requires_grad_()]
    for given in (gate, gate.clone().requires_grad_()):
        out = fused_ops.gated_sum(*inputs, given)
        assert torch.equal(out, x + gate[:, None] * branch)
        grads = torch.autograd.grad(out, [t for t in (*inputs, given) if t.requires_grad], x)
        assert torch.equal(grads[0], x)
        assert torch.equal(grads[1], gate[:, None] * x)
        if given.requires_grad:
            torch.testing.assert_close(grads[2], (branch * x).sum(dim=1))
