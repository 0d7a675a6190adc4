"""DoRA: training, files, merging and run-time use give what PEFT and LyCORIS's formula give."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

from modules.errors import ConfigError
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from networks.convert_lora import main as convert
from networks.dora import DoraAdapter, DoraFactors
from networks.factors import factors_from_roles
from networks.inspect_lora import report
from networks.lora import LoRANetwork, frozen_weight, inject
from networks.lora_effect import measure_effect, weight_norms
from networks.lora_files import load_weights, read_lora
from networks.lora_kandinsky import create_network, create_network_from_weights, linear_layer_sizes
from networks.lora_saving import save_lora
from networks.merging import add_deltas
from tests.lora_strengths import LAYERS, magnitudes, small_model
from tests.tiny import tiny_dit

CPU = torch.device("cpu")
RANK, ALPHA = 4, 6.0


def dora_network(dit: nn.Module, *, is_trained: bool = True, **settings: Any) -> LoRANetwork:
    network = create_network(
        dit,
        network_dim=RANK,
        network_alpha=ALPHA,
        network_dropout=settings.pop("network_dropout", None),
        network_args={"use_dora": True, **settings},
        seed=0,
    )
    if is_trained:
        change(network)
    return network


@torch.no_grad()
def change(network: LoRANetwork) -> None:
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator)
        if name.endswith("dora_scale"):
            parameter.mul_(1.0 + 0.2 * drawn)
        else:
            parameter.copy_(drawn * 0.2)


def inputs() -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(5)
    shapes = (1, 2, 8, 8, 33), (1, 5, 64), (1, 32)
    return *(torch.randn(shape, generator=generator) for shape in shapes), torch.tensor([500.0])


def test_the_first_step_changes_no_bit_and_every_factor_learns() -> None:
    plain = tiny_dit()
    expected = plain(*inputs())
    network = dora_network(tiny_dit(), is_trained=False)
    output = network(*inputs())
    assert torch.equal(output, expected)
    output.square().sum().backward()
    trained = {name for name, parameter in network.named_parameters() if parameter.grad.abs().sum() > 0}
    assert len([name for name in trained if name.endswith("dora_scale")]) == len(network.adapters)
    assert len([name for name in trained if name.endswith("lora_up")]) == len(network.adapters)


@pytest.mark.parametrize("use_rslora", [False, True])
def test_outputs_and_gradients_are_those_of_peft(use_rslora: bool) -> None:
    model = small_model()
    config = peft.LoraConfig(
        r=RANK,
        lora_alpha=int(ALPHA),
        target_modules=["to_query", "in_layer"],
        use_dora=True,
        use_rslora=use_rslora,
    )
    theirs = peft.get_peft_model(copy.deepcopy(model), config)  # type: ignore[arg-type]
    ours = inject(
        model,
        LAYERS,
        rank=RANK,
        alpha=ALPHA * (RANK**0.5 if use_rslora else 1.0),
        seed=0,
        make_adapter=DoraAdapter,
    )
    change(ours)
    named = dict(theirs.named_parameters())
    pairs = []
    for layer, adapter in ours.adapters.items():
        for own, other in (
            ("lora_down", "lora_A"),
            ("lora_up", "lora_B"),
            ("dora_scale", "lora_magnitude_vector"),
        ):
            parameter = named[f"base_model.model.{layer}.{other}.default.weight"]
            parameter.data = adapter.get_parameter(own).detach().reshape(parameter.shape).clone()
            pairs.append((adapter.get_parameter(own), parameter))
    x = torch.randn(3, 7, 16, generator=torch.Generator().manual_seed(1))
    for layer in LAYERS:
        mine, reference = model.get_submodule(layer)(x), theirs.get_submodule(f"base_model.model.{layer}")(x)
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)
        mine.square().sum().backward()
        reference.square().sum().backward()
    for own, other in pairs:
        torch.testing.assert_close(own.grad, other.grad.reshape(own.shape), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("lora_format", ["diffusers", "kohya"])
def test_a_saved_file_merges_to_what_was_trained(tmp_path: Path, lora_format: Any) -> None:
    dit = tiny_dit()
    weights = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    network = dora_network(dit)
    trained = network(*inputs())
    save_lora(network, tmp_path / "a.safetensors", lora_format=lora_format, save_precision=torch.float32)
    lora = read_lora(tmp_path / "a.safetensors", linear_layer_sizes(tiny_dit()))
    assert {type(layer) for layer in lora.layers.values()} == {DoraFactors}
    merged = tiny_dit()
    for name in lora.layers:
        weight = weights[f"{name}.weight"]
        merged.get_submodule(name).weight.data = add_deltas(weight, name, [lora])
    with network.disabled():
        base = network(*inputs())
    difference = (merged(*inputs()) - trained).norm() / (trained - base).norm()
    assert difference < 1e-4
    # Beside the weights, at another strength: linear in the strength, as a merge is.
    runtime = create_network_from_weights(tiny_dit(), lora, network_dropout=None, network_args={}, seed=1)
    runtime.train(False)
    torch.testing.assert_close(runtime(*inputs()), trained, rtol=1e-4, atol=1e-4)
    runtime.set_multiplier(0.5)
    for name in lora.layers:
        weight = weights[f"{name}.weight"]
        merged.get_submodule(name).weight.data = add_deltas(weight, name, [lora.with_multiplier(0.5)])
    assert (merged(*inputs()) - runtime(*inputs())).norm() < 1e-4 * (trained - base).norm()


def test_two_at_run_time_add_up_as_when_they_are_merged(tmp_path: Path) -> None:
    save_lora(dora_network(tiny_dit()), tmp_path / "a.safetensors", save_precision=torch.float32)
    lora = read_lora(tmp_path / "a.safetensors", linear_layer_sizes(tiny_dit()))
    dit, merged = tiny_dit(), tiny_dit()
    for _ in range(2):
        create_network_from_weights(dit, lora, network_dropout=None, network_args={}, seed=1).train(False)
    for name in lora.layers:
        layer = merged.get_submodule(name)
        layer.weight.data = add_deltas(layer.weight, name, [lora, lora])
    base = tiny_dit()(*inputs())
    both = merged(*inputs())
    assert (dit(*inputs()) - both).norm() < 1e-4 * (both - base).norm()


@pytest.mark.parametrize("layer_class", [Fp8Linear, Int8Linear, RotatedInt8Linear])
def test_norms_and_outputs_on_a_one_byte_base_are_those_of_its_widened_weights(layer_class: Any) -> None:
    model, wide = small_model(), small_model()
    for name in LAYERS:
        holder, _, last = name.rpartition(".")
        weight, scale = layer_class.quantise(model.get_submodule(name).weight)
        narrow = layer_class(weight, scale, None, compute_dtype=torch.float32)
        setattr(model.get_submodule(holder), last, narrow)
        wide.get_submodule(name).weight.data = frozen_weight(narrow)
    x = torch.randn(5, 16, generator=torch.Generator().manual_seed(1))
    outputs = []
    for host in (model, wide):
        change(inject(host, LAYERS, rank=RANK, alpha=ALPHA, seed=0, make_adapter=DoraAdapter))
        outputs.append([host.get_submodule(name)(x) for name in LAYERS])
    torch.testing.assert_close(*outputs, rtol=1e-4, atol=1e-4)


def test_dropout_is_drawn_again_alike_for_the_same_step() -> None:
    network = dora_network(tiny_dit(), network_dropout=0.5, rank_dropout=0.2, module_dropout=0.3)
    outputs = []
    for step in (1, 1, 2):
        network.set_step_seed(0, step)
        outputs.append(network(*inputs()))
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.equal(outputs[0], outputs[2])


def test_the_reported_effect_is_the_change_of_the_merged_weights() -> None:
    dit = tiny_dit()
    weights = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    network = dora_network(dit)
    assert weight_norms(network, CPU).keys() == network.adapters.keys()
    network(*inputs())  # measures the norms
    for name, adapter in network.adapters.items():
        expected = adapter.factors().change(weights[f"{name}.weight"]).norm()
        torch.testing.assert_close(adapter.change_norm().float(), expected, rtol=1e-4, atol=1e-5)
    fresh = dora_network(tiny_dit(), is_trained=False)
    fresh(*inputs())
    assert measure_effect(fresh, weight_norms(fresh, CPU)).does_nothing


def test_a_run_starts_from_a_dora_of_another_alpha(tmp_path: Path) -> None:
    source = dora_network(tiny_dit())
    save_lora(source, tmp_path / "a.safetensors", save_precision=torch.float32)
    sizes = linear_layer_sizes(tiny_dit())
    lora = read_lora(tmp_path / "a.safetensors", sizes)
    run = create_network(
        tiny_dit(),
        network_dim=RANK,
        network_alpha=1.0,
        network_dropout=None,
        network_args={"use_dora": True},
        seed=9,
    )
    load_weights(run, lora)
    assert (run(*inputs()) - source(*inputs())).norm() < 1e-5 * source(*inputs()).norm()
    plain = create_network(
        tiny_dit(), network_dim=RANK, network_alpha=1.0, network_dropout=None, network_args={}, seed=9
    )
    with pytest.raises(ConfigError, match="another network type"):
        load_weights(plain, lora)
    save_lora(plain, tmp_path / "plain.safetensors")
    with pytest.raises(ConfigError, match="is a LoRA, not a DoRA"):
        create_network_from_weights(
            tiny_dit(),
            read_lora(tmp_path / "plain.safetensors", sizes),
            network_dropout=None,
            network_args={"use_dora": True},
            seed=0,
        )


@pytest.mark.parametrize("target", ["default", "diffusers", "comfy", "official", "other"])
def test_a_conversion_keeps_the_change_and_its_magnitudes(tmp_path: Path, target: str) -> None:
    dit = tiny_dit()
    weights = {name: tensor.clone() for name, tensor in dit.state_dict().items()}
    network = dora_network(dit)
    save_lora(network, tmp_path / "a.safetensors", lora_format="kohya", save_precision=torch.float32)
    convert([
        "--input",
        str(tmp_path / "a.safetensors"),
        "--output",
        str(tmp_path / "b.safetensors"),
        "--target",
        target,
    ])
    lora = read_lora(tmp_path / "b.safetensors", linear_layer_sizes(tiny_dit()))
    for name, layer in lora.layers.items():
        weight = weights[f"{name}.weight"]
        expected = network.adapters[name].factors().change(weight)
        torch.testing.assert_close(layer.change(weight), expected, rtol=1e-4, atol=1e-5)
    assert "DoRA" in report(tmp_path / "b.safetensors")


def test_half_precision_is_for_the_factors_and_not_for_the_magnitudes(tmp_path: Path) -> None:
    save_lora(dora_network(tiny_dit()), tmp_path / "a.safetensors", save_precision=torch.bfloat16)
    for layer in read_lora(tmp_path / "a.safetensors", linear_layer_sizes(tiny_dit())).layers.values():
        assert layer.tensors["dora_scale"].dtype == torch.float32
        assert layer.tensors["lora_up"].dtype == torch.bfloat16


def test_magnitudes_of_a_loha_are_applied_as_in_lycoris() -> None:
    generator = torch.Generator().manual_seed(0)
    sizes = {"hada_w1_a": (24, 2), "hada_w1_b": (2, 16), "hada_w2_a": (24, 2), "hada_w2_b": (2, 16)}
    tensors = {role: torch.randn(size, generator=generator) for role, size in sizes.items()}
    weight = torch.randn(24, 16, generator=generator)
    loha = factors_from_roles(tensors, 0.5)
    for axis in (0, 1):
        dora = factors_from_roles({**tensors, "dora_scale": magnitudes(weight, axis)}, 0.5)
        assert dora is not None
        assert loha is not None
        turned = weight + loha.delta()
        expected = turned * magnitudes(weight, axis) / turned.norm(dim=axis, keepdim=True) - weight
        torch.testing.assert_close(dora.change(weight), expected)
