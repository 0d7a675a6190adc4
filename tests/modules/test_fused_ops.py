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


@pytest.fixture(params=["CPU", "GPU"])
def norm_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Layer norms of narrow activations by the kernel for a CPU, or in chunks as on other devices."""
    if request.param == "GPU":
        monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)


@pytest.mark.usefixtures("norm_path")
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


@pytest.mark.parametrize("chunk", [2**22, 200], ids=["whole", "chunked"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_norm_in_chunks_is_that_of_float32_rounded_once(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    """To the bit, gradients too; weights that are trained get theirs unrounded."""
    monkeypatch.setattr(fused_ops, "CHUNK_ELEMENTS", chunk)
    monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x, grad = (torch.randn(2, 3, 37, 16, generator=generator) + 0.5).to(dtype)
    weight, bias = (torch.randn(16, generator=generator) for _ in range(2))
    results = []
    for narrow in (True, False):
        inputs = [t.clone().requires_grad_() for t in (x if narrow else x.float(), weight, bias)]
        value = fused_ops.layer_norm(*inputs)
        value.backward(grad if narrow else grad.float())
        results.append([value.detach(), *(tensor.grad for tensor in inputs)])
    (value, grad_x, *grads), (wide_value, wide_grad_x, *wide_grads) = results
    assert torch.equal(value, wide_value.to(dtype))
    assert torch.equal(grad_x, wide_grad_x.to(dtype))
    for found, wide in zip(grads, wide_grads, strict=True):
        assert found.dtype == torch.float32
        torch.testing.assert_close(found, wide, rtol=1e-5, atol=1e-5)


def test_a_compiled_norm_rounds_once_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 5, 16, generator=generator).bfloat16()
    weight, bias = torch.randn(2, 16, generator=generator)
    compiled = torch.compile(fused_ops.layer_norm, backend="eager", fullgraph=True)
    assert torch.equal(compiled(x, weight, bias), fused_ops.layer_norm(x.float(), weight, bias).bfloat16())


def test_no_weight_of_a_norm_is_rounded_to_the_dtype_of_the_activations() -> None:
    """On a device whose kernel takes one dtype only, 1 + scale and shift would lose 16 bits."""
    x = torch.empty(2, 8, 16, dtype=torch.bfloat16, device="meta", requires_grad=True)
    norm = fused_ops.ModulatedLayerNorm(*torch.empty(2, 2, 16, device="meta"))
    with RoundedVectors(16) as seen:
        norm.value(x).sum().backward()
        with torch.no_grad():
            value, gradient = norm.again(x.detach())
            gradient(torch.empty_like(value))
    assert seen.calls > 0
    assert seen.found == []


class RoundedVectors(TorchDispatchMode):
    """Collects the operators that make a narrow vector of a given length."""

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length, self.calls = length, 0
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.calls += 1
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor) and tensor.shape == (self.length,) and tensor.dtype.itemsize < 4:
                self.found.append(str(func))
        return out


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


@pytest.mark.usefixtures("norm_path")
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
        with torch.no_grad():
            value, gradient = fused_ops.ModulatedLayerNorm(weight, bias).again(tokens)
            gradient(value)
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
