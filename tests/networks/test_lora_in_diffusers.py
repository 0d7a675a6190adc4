"""Our LoRA files in diffusers' Kandinsky 5 pipeline and in PEFT: same weights, same output."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
from diffusers import Kandinsky5Transformer3DModel
from diffusers.loaders import KandinskyLoraLoaderMixin
from safetensors.torch import load_file

from kandinsky5.tasks import TINY_PARAMS
from networks.convert_lora import main as convert
from networks.lora_kandinsky import create_network
from networks.lora_saving import save_lora
from tests.tiny import tiny_dit


def reference_transformer(weights: dict[str, torch.Tensor]) -> Kandinsky5Transformer3DModel:
    params = TINY_PARAMS.as_kwargs()
    params.pop("instruct_type")
    model = Kandinsky5Transformer3DModel(**params)
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("alpha", [4.0, 1.0])
def test_diffusers_loads_the_default_layout_with_the_same_change(tmp_path: Path, alpha: float) -> None:
    dit = tiny_dit()
    weights = {key: value.clone() for key, value in dit.state_dict().items()}
    network = create_network(
        dit, network_dim=4, network_alpha=alpha, network_dropout=None, network_args={}, seed=0
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.2
    save_lora(network, tmp_path / "lora.safetensors", save_precision=torch.float32)

    reference = reference_transformer(weights)
    state, metadata = KandinskyLoraLoaderMixin.lora_state_dict(
        tmp_path, weight_name="lora.safetensors", return_lora_metadata=True
    )
    KandinskyLoraLoaderMixin.load_lora_into_transformer(
        state, transformer=reference, adapter_name="ours", metadata=metadata
    )
    named = dict(reference.named_modules())
    for name, adapter in network.adapters.items():
        layer = named[name]
        assert layer.scaling["ours"] == 1.0
        change = layer.get_delta_weight("ours")
        torch.testing.assert_close(change, adapter.factors().delta(), rtol=1e-5, atol=1e-6)

    x = torch.randn(1, 2, 8, 8, 33, generator=generator)
    text, pooled = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 32, generator=generator)
    timestep = torch.tensor([500.0])
    ours = network(x, text, pooled, timestep)
    with torch.no_grad():
        theirs = reference(
            hidden_states=x,
            encoder_hidden_states=text,
            pooled_projections=pooled,
            timestep=timestep,
            visual_rope_pos=[torch.arange(2), torch.arange(4), torch.arange(4)],
            text_rope_pos=torch.arange(5),
            return_dict=False,
        )[0]
    with network.disabled():
        assert (network(x, text, pooled, timestep) - ours).norm() > 0.05 * ours.norm()
    # diffusers rounds rotated queries and keys to bfloat16 even in float32.
    assert (ours - theirs.view_as(ours)).norm() < 2e-3 * ours.norm()


def test_diffusers_applies_a_dora_of_the_default_layout(tmp_path: Path) -> None:
    dit = tiny_dit()
    weights = {key: value.clone() for key, value in dit.state_dict().items()}
    settings = {"network_dim": 4, "network_alpha": 6.0, "network_args": {"use_dora": True}}
    network = create_network(dit, network_dropout=None, seed=0, **settings)
    generator = torch.Generator().manual_seed(3)
    for name, parameter in network.named_parameters():
        drawn = torch.randn(parameter.shape, generator=generator) * 0.2
        parameter.data = parameter * (1 + drawn) if name.endswith("dora_scale") else drawn
    save_lora(network, tmp_path / "lora.safetensors", save_precision=torch.float32)

    reference = reference_transformer(weights)
    state, metadata = KandinskyLoraLoaderMixin.lora_state_dict(
        tmp_path, weight_name="lora.safetensors", return_lora_metadata=True
    )
    KandinskyLoraLoaderMixin.load_lora_into_transformer(
        state, transformer=reference, adapter_name="ours", metadata=metadata
    )
    reference.fuse_lora()
    named = dict(reference.named_modules())
    for name, adapter in network.adapters.items():
        change = named[name].base_layer.weight.detach() - weights[f"{name}.weight"]
        expected = adapter.factors().change(weights[f"{name}.weight"])
        torch.testing.assert_close(change, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("target", "stripped", "expected"),
    [
        ("official", "base_model.model.", 52),
        ("diffusers", "base_model.model.", 0),
        ("diffusers", "transformer.", 52),
        ("comfy", "base_model.model.", 0),
    ],
)
def test_peft_itself_loads_the_official_layout_and_silently_nothing_of_others(
    tmp_path: Path, target: str, stripped: str, expected: int
) -> None:
    source, converted = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    sizes = {"num_text_blocks": 2, "num_visual_blocks": 4}
    network = create_network(
        tiny_dit(**sizes), network_dim=4, network_alpha=2.0, network_dropout=None, network_args={}, seed=0
    )
    for parameter in network.parameters():
        parameter.data += 0.1
    save_lora(network, source, save_precision=torch.float32)
    convert(["--input", str(source), "--output", str(converted), "--target", target])
    settings = json.loads((tmp_path / "b_config_lora.json").read_text(encoding="utf-8"))
    config = {name: settings[name] for name in ("r", "lora_alpha", "target_modules")}
    model = peft.inject_adapter_in_model(peft.LoraConfig(**config), tiny_dit(**sizes))
    # The steps of the official pipeline's load_adapter. Its versions differ in the prefix that they strip.
    tensors = {
        key.removeprefix(stripped).replace(".default", ""): t for key, t in load_file(converted).items()
    }
    peft.set_peft_model_state_dict(model, tensors)
    layers = {name: model.get_submodule(name) for name in network.adapters}
    equal = [
        name
        for name, layer in layers.items()
        if torch.allclose(
            layer.get_delta_weight("default"), network.adapters[name].factors().delta(), atol=1e-5
        )
    ]
    assert (len(network.adapters), len(equal)) == (52, expected)
