"""Layers that share an input go through one product, and checkpointing leaves the last one out."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from modules.fp8 import Fp8Linear, quantise_rows
from networks import fused_lora as fused
from networks.fused_lora import LowRankLayer, fused_lora
from networks.lora import LoRANetwork, inject, project

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
