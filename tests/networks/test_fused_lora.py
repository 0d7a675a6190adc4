"""Layers that share an input go through one product, and checkpointing leaves the last one out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from modules import fused_ops
from modules.fp8 import Fp8Linear, quantise_rows
from modules.fused_ops import GELU, ModulatedLayerNorm, gelu, project
from networks import fused_lora as fused
from networks.fused_lora import LowRankLayer, fused_lora
from networks.lora import LoRANetwork, inject

NAMES = ["query", "key", "value"]


def values(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).div(4).to(dtype)


def frozen(out_features: int, seed: int, dtype: torch.dtype, *, is_fp8: bool) -> nn.Module:
    linear = nn.Linear(16, out_features, dtype=dtype).requires_grad_(False)
    for parameter in linear.parameters():
        parameter.copy_(values(*parameter.shape, seed=seed))
    return Fp8Linear(*quantise_rows(linear.weight), linear.bias, compute_dtype=dtype) if is_fp8 else linear


def model(dtype: torch.dtype, *, is_fp8: bool = False) -> tuple[nn.ModuleDict, LoRANetwork]:
    """Three layers of different widths, with adapters of different ranks and strengths."""
    layers = nn.ModuleDict({n: frozen(8 + 4 * i, i, dtype, is_fp8=is_fp8) for i, n in enumerate(NAMES)})
    network = inject(
        layers,
        NAMES,
        rank={name: 2 + i for i, name in enumerate(NAMES)},
        alpha={name: 1.0 + i for i, name in enumerate(NAMES)},
        seed=0,
    )
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(values(*parameter.shape, seed=i))
    return layers, network


def outputs_and_gradients(
    layers: nn.ModuleDict, network: LoRANetwork, dtype: torch.dtype, *, together: bool
) -> tuple[list[Tensor], list[Tensor]]:
    x = values(2, 5, 16, seed=9, dtype=dtype).requires_grad_()
    modules = [layers[name] for name in NAMES]
    outputs = project(x, modules) if together else [module(x) for module in modules]
    for i, output in enumerate(outputs):
        output.backward(values(*output.shape, seed=20 + i, dtype=dtype), retain_graph=True)
    assert x.grad is not None
    return outputs, [x.grad, *(p.grad for p in network.parameters() if p.grad is not None)]


@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_projected_together_equal_those_projected_apart(dtype: torch.dtype, is_fp8: bool) -> None:
    results = [
        outputs_and_gradients(*model(dtype, is_fp8=is_fp8), dtype, together=together)
        for together in (True, False)
    ]
    tolerance = 1e-6 if dtype == torch.float32 else 1.5e-2
    for ours, apart in zip(*(outputs + gradients for outputs, gradients in results), strict=True):
        assert ours.dtype == apart.dtype
        torch.testing.assert_close(ours, apart, rtol=tolerance, atol=tolerance)


def test_one_layer_without_an_adapter_sends_all_through_their_own_forward(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layers, network = model(torch.float32)
    monkeypatch.setattr(fused, "fused_lora", None)
    modules = [layers["query"], frozen(8, 0, torch.float32, is_fp8=False)]
    with network.disabled():
        outputs = project(values(3, 16), modules)
    assert torch.equal(outputs[0], layers["query"].base(values(3, 16)))  # type: ignore[operator]


def test_where_products_of_half_precision_can_be_float32_gradients_of_masters_are_not_rounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """`torch.mm` has `out_dtype` on CUDA only: here its place is taken by the sum in float32."""
    plain = torch.mm

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        assert a.dtype == b.dtype == torch.bfloat16
        return plain(a.to(out_dtype), b.to(out_dtype))

    def gradients() -> list[Tensor]:
        layers, network = model(torch.bfloat16)
        outputs_and_gradients(layers, network, torch.bfloat16, together=True)
        return [p.grad for p in network.parameters() if p.grad is not None]

    rounded = gradients()
    monkeypatch.setattr(fused, "WIDE_PRODUCT_DEVICES", {"cpu"})
    monkeypatch.setattr(torch, "mm", mm)
    for found, narrow in zip(gradients(), rounded, strict=True):
        assert torch.equal(narrow, narrow.bfloat16().float())
        assert not torch.equal(found, found.bfloat16().float())
        torch.testing.assert_close(found, narrow, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_for_masters_give_float32_on_a_device_without_data(dtype: torch.dtype) -> None:
    a, b = (torch.empty(4, 4, dtype=dtype, device="meta") for _ in range(2))
    products = []

    class Products(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            products.append(func)
            return func(*args, **(kwargs or {}))

    with Products():
        assert fused._master_gradient(a, b, torch.float32).dtype == torch.float32
    assert (torch.ops.aten.mm.dtype in products) == (dtype == torch.bfloat16)


class CountedLinear(nn.Linear):
    """A frozen layer that knows its gradient and counts its products."""

    def __init__(self, width: int) -> None:
        super().__init__(width, width)
        self.requires_grad_(False)
        self.products = 0

    def forward(self, x: Tensor) -> Tensor:
        self.products += 1
        return super().forward(x)

    def input_gradient(self, grad: Tensor) -> Tensor:
        return grad @ self.weight


def test_the_last_frozen_product_of_a_checkpointed_part_is_computed_once() -> None:
    first, last = CountedLinear(8), CountedLinear(8)
    factors = [
        (values(2, 8, seed=i).requires_grad_(), values(8, 2, seed=9 + i).requires_grad_()) for i in (0, 1)
    ]

    def part(x: Tensor) -> Tensor:
        hidden = fused_lora(x, [LowRankLayer(first, *factors[0], 0.5)])[0]
        return fused_lora(torch.tanh(hidden), [LowRankLayer(last, *factors[1], 0.5)])[0]

    gradients = []
    for run in (part, lambda x: checkpoint(part, x, use_reentrant=False)):
        x = values(5, 8).requires_grad_()
        first.products = last.products = 0
        run(x).square().sum().backward()
        gradients.append([x.grad, *(factor.grad for pair in factors for factor in pair)])
        for pair in factors:
            for factor in pair:
                factor.grad = None
    assert (first.products, last.products) == (2, 1)
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def activated_part(dtype: torch.dtype, *, is_fp8: bool) -> tuple[nn.Module, nn.Module, LoRANetwork]:
    """A feed-forward branch: its first layer, its second, and adapters on both."""
    layers = nn.ModuleDict({name: nn.Module() for name in ("in_layer", "out_layer")})
    layers["in_layer"] = nn.Linear(16, 16, bias=False, dtype=dtype).requires_grad_(False)
    layers["in_layer"].weight.copy_(values(16, 16, seed=3))
    layers["out_layer"] = frozen(12, 4, dtype, is_fp8=is_fp8)
    network = inject(layers, ["in_layer", "out_layer"], rank=4, alpha=2.0, seed=0)
    with torch.no_grad():
        for i, parameter in enumerate(network.parameters()):
            parameter.copy_(values(*parameter.shape, seed=i))
    return layers["in_layer"], layers["out_layer"], network


def activated_output(first: nn.Module, last: nn.Module, x: Tensor, *, is_joint: bool) -> Tensor:
    return project(first(x), [last], GELU)[0] if is_joint else last(gelu(first(x)))


@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("is_fp8", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_activation_computed_again_changes_no_bit(
    dtype: torch.dtype, is_fp8: bool, is_checkpointed: bool
) -> None:
    results = []
    for is_joint in (True, False):
        first, last, network = activated_part(dtype, is_fp8=is_fp8)

        part = partial(activated_output, first, last, is_joint=is_joint)
        x = values(2, 5, 16, seed=9, dtype=dtype).requires_grad_()
        output = checkpoint(part, x, use_reentrant=False) if is_checkpointed else part(x)
        output.backward(values(*output.shape, seed=20, dtype=dtype))
        with torch.no_grad():
            without_gradients = part(x)
        results.append([output, without_gradients, x.grad, *(p.grad for p in network.parameters())])
    assert torch.equal(results[0][0], results[0][1])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@contextmanager
def noted_shapes() -> Iterator[dict[int, tuple[int, ...]]]:
    """Within the block: the shapes of what is saved for the backward pass, by the address of its memory."""
    kept: dict[int, tuple[int, ...]] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tuple(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def test_of_an_activation_only_its_input_is_kept() -> None:
    first, last, _ = activated_part(torch.float32, is_fp8=False)
    wide = first(values(100, 16).requires_grad_())
    with noted_shapes() as kept:
        output = project(wide, [last], GELU)[0]
    assert wide.untyped_storage().data_ptr() in kept
    assert [shape for shape in kept.values() if shape[0] == 100] == [(100, 16), (100, 4)]
    assert output.requires_grad


def modulated_norm(batch: int) -> ModulatedLayerNorm:
    """A norm of its own for every sample."""
    return ModulatedLayerNorm(1 + values(batch, 16, seed=30), values(batch, 16, seed=31))


def normed_outputs(
    layers: nn.ModuleDict, norm: ModulatedLayerNorm, x: Tensor, *, is_joint: bool
) -> list[Tensor]:
    """Projections of the normed x, and x itself, as the residual of a block is."""
    modules = [layers[name] for name in NAMES]
    projected = project(x, modules, norm) if is_joint else project(norm.value(x), modules)
    return [x * 2, *projected]


@pytest.fixture(params=["CPU", "GPU"])
def norm_path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Norms of narrow activations by the kernel for a CPU, or in chunks as on other devices."""
    if request.param == "GPU":
        monkeypatch.setattr(fused_ops, "kernel_rounds_once", lambda x: x.dtype == torch.float32)


@pytest.mark.usefixtures("norm_path")
@pytest.mark.parametrize("is_checkpointed", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize(
    ("dtype", "is_fp8"), [(torch.float32, False), (torch.bfloat16, False), (torch.bfloat16, True)]
)
def test_a_modulated_norm_computed_again_changes_no_bit(
    dtype: torch.dtype, is_fp8: bool, batch: int, is_checkpointed: bool
) -> None:
    results = []
    for is_joint in (True, False):
        layers, network = model(dtype, is_fp8=is_fp8)
        part = partial(normed_outputs, layers, modulated_norm(batch), is_joint=is_joint)
        x = values(batch, 5, 16, seed=9, dtype=dtype).requires_grad_()
        outputs = checkpoint(part, x, use_reentrant=False) if is_checkpointed else part(x)
        torch.autograd.backward(outputs, [values(*o.shape, seed=20, dtype=dtype) for o in outputs])
        with torch.no_grad():
            without_gradients = part(x)
        assert torch.equal(x, values(batch, 5, 16, seed=9, dtype=dtype))
        assert all(torch.equal(a, b) for a, b in zip(outputs, without_gradients, strict=True))
        results.append([*outputs, x.grad, *(p.grad for p in network.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("batch", [1, 2])
def test_of_a_modulated_norm_only_its_input_is_kept(batch: int) -> None:
    layers, _ = model(torch.float32)
    x = values(batch, 50, 16).requires_grad_()
    with noted_shapes() as kept:
        project(x, [layers[name] for name in NAMES], modulated_norm(batch))
    assert x.untyped_storage().data_ptr() in kept
    assert [shape for shape in kept.values() if shape[0] == 50 * batch] == [(50 * batch, 16), (50 * batch, 9)]


@pytest.mark.parametrize("trained", ["weight", "bias"])
def test_a_norm_that_is_trained_gets_its_gradients(trained: str) -> None:
    results = []
    for is_joint in (True, False):
        layers, network = model(torch.float32)
        norm = modulated_norm(2)
        getattr(norm, trained).requires_grad_()
        x = values(2, 5, 16, seed=9).requires_grad_()
        outputs = normed_outputs(layers, norm, x, is_joint=is_joint)
        sum(output.square().sum() for output in outputs).backward()  # type: ignore[union-attr]
        results.append([getattr(norm, trained).grad, x.grad, *(p.grad for p in network.parameters())])
    assert results[0][0].abs().min() > 0
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_layers_that_cannot_be_fused_get_the_value_of_the_norm() -> None:
    plain, norm = frozen(8, 0, torch.float32, is_fp8=False), modulated_norm(2)
    x = values(2, 5, 16)
    assert torch.equal(project(x, [plain], norm)[0], plain(norm.value(x)))
    assert torch.equal(x, values(2, 5, 16))


def test_layers_that_cannot_be_fused_get_the_value_of_the_activation() -> None:
    plain = frozen(8, 0, torch.float32, is_fp8=False)
    x = values(3, 16)
    expected = plain(gelu(x))
    assert torch.equal(project(x, [plain], GELU)[0], expected)
