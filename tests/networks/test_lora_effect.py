"""How large a network's changes are beside the weights, and the moving average of a network."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from modules.fp8 import Fp8Linear, quantise_rows
from networks.loha import LohaAdapter
from networks.lora import LoRAAdapter, LoRANetwork, inject
from networks.lora_effect import measure_effect, weight_norms
from networks.weight_average import WeightAverage, decay_at

CPU = torch.device("cpu")


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = nn.ModuleList([nn.ModuleDict({"a": nn.Linear(12, 8), "b": nn.Linear(8, 12)}) for _ in range(2)])
    return nn.ModuleDict({"blocks": blocks})


def network(host: nn.Module, adapter: type = LoRAAdapter) -> LoRANetwork:
    names = [f"blocks.{index}.{name}" for index in range(2) for name in "ab"]
    return inject(host, names, rank=3, alpha=6.0, seed=0, make_adapter=adapter)


@pytest.mark.parametrize("adapter", [LoRAAdapter, LohaAdapter])
def test_the_effect_is_the_norm_of_the_change_over_that_of_the_weight(adapter: type) -> None:
    host = model()
    weight = host.get_parameter("blocks.1.a.weight").detach().clone()
    trained = network(host, adapter)
    norms = weight_norms(trained, CPU)
    assert measure_effect(trained, norms).does_nothing
    change = trained.adapters["blocks.1.a"]
    with torch.no_grad():
        list(change.factors().tensors.values())[-1].normal_()
    effect = measure_effect(trained, norms)
    assert effect.unchanged == ("blocks.0.a", "blocks.0.b", "blocks.1.b")
    assert not effect.does_nothing
    delta = change.factors().delta()
    block = (norms["blocks.1.a"] ** 2 + norms["blocks.1.b"] ** 2) ** 0.5
    assert effect.blocks["blocks.0"] == 0.0
    assert effect.blocks["blocks.1"] == pytest.approx(float(delta.norm()) / block, rel=1e-5)
    assert norms["blocks.1.a"] == pytest.approx(float(weight.norm()), rel=1e-5)
    assert "3 of 4 layers are unchanged" in effect.describe()


def test_a_change_too_small_to_square_in_float32_is_not_zero() -> None:
    trained = network(model())
    norms = weight_norms(trained, CPU)
    with torch.no_grad():
        for adapter in trained.adapters.values():
            list(adapter.factors().tensors.values())[-1].fill_(1e-30)
    effect = measure_effect(trained, norms)
    assert not effect.unchanged
    assert effect.change > 0


def test_norms_of_float8_weights_are_those_of_the_weights_they_stand_for() -> None:
    host = model()
    exact = host.get_submodule("blocks.0.a")
    assert isinstance(exact, nn.Linear)
    before = float(exact.weight.detach().norm())
    quantised = Fp8Linear(*quantise_rows(exact.weight.detach()), None, compute_dtype=torch.bfloat16)
    host.get_submodule("blocks.0").register_module("a", quantised)
    assert weight_norms(network(host), CPU)["blocks.0.a"] == pytest.approx(before, rel=2e-2)


def test_the_average_follows_its_formula_and_leaves_the_weights_alone() -> None:
    trained = network(model())
    average = WeightAverage(trained, 0.6)
    expected = {name: p.detach().clone() for name, p in trained.named_parameters()}
    for step in range(1, 12):
        with torch.no_grad():
            for parameter in trained.parameters():
                parameter.add_(step)
        average.update(step)
        rate = min(0.6, (1 + step) / (10 + step))
        for name, parameter in trained.named_parameters():
            expected[name] = rate * expected[name] + (1 - rate) * parameter.detach()
    assert [decay_at(step, 0.6) < 0.6 for step in (1, 12, 13)] == [True, True, False]
    now = {name: p.detach().clone() for name, p in trained.named_parameters()}
    with average.in_place():
        for name, parameter in trained.named_parameters():
            torch.testing.assert_close(parameter.detach(), expected[name])
    assert all(torch.equal(p.detach(), now[name]) for name, p in trained.named_parameters())
