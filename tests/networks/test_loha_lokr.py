"""LoHa and LoKr: training, files and merging by their formulas."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from modules.errors import ConfigError, ModelFileError
from modules.tensor_files import write_tensors
from networks.loha import LohaFactors
from networks.lokr import LokrAdapter, LokrFactors, split_size
from networks.lora import LoRANetwork
from networks.lora_files import load_weights, read_lora
from networks.lora_kandinsky import create_network, linear_layer_sizes
from networks.lora_saving import save_lora
from networks.merging import add_deltas
from tests.tiny import tiny_dit

TARGET = "visual_transformer_blocks.0.feed_forward.in_layer"
KINDS = [("networks.loha", {}), ("networks.lokr", {}), ("networks.lokr", {"factor": 4})]


def build(network_module: str, network_args: dict[str, Any], dim: int = 4, alpha: float = 2.0) -> LoRANetwork:
    return create_network(
        tiny_dit(num_visual_blocks=1, num_text_blocks=1),
        network_dim=dim,
        network_alpha=alpha,
        network_dropout=None,
        network_args=network_args,
        seed=0,
        network_module=network_module,
    )


def wake(network: LoRANetwork) -> None:
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * 0.3


@pytest.mark.parametrize(
    ("size", "factor", "expected"),
    [(512, -1, (16, 32)), (512, 4, (4, 128)), (128, -1, (8, 16)), (7, -1, (1, 7)), (12, 5, (3, 4))],
)
def test_sizes_split_as_stated(size: int, factor: int, expected: tuple[int, int]) -> None:
    assert split_size(size, factor) == expected


@pytest.mark.parametrize(("module", "args"), KINDS)
def test_a_new_network_changes_no_bit_and_learns(module: str, args: dict[str, Any]) -> None:
    network = build(module, args)
    layer = network.host.get_submodule(TARGET)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    with network.disabled():
        expected = layer(x)
    output = layer(x)
    assert torch.equal(output, expected)
    output.sum().backward()
    grads = [p.grad for p in network.adapters[TARGET].parameters()]
    assert sum(g is not None and bool(g.abs().sum() > 0) for g in grads) == 1  # through the zero factor alone


@pytest.mark.parametrize(("module", "args"), KINDS)
def test_the_layer_computes_what_its_factors_say(module: str, args: dict[str, Any]) -> None:
    network = build(module, args)
    wake(network)
    network.set_multiplier(0.5)
    x = torch.randn(2, 5, 128, generator=torch.Generator().manual_seed(2))
    layer = network.host.get_submodule(TARGET)
    with network.disabled():
        base = layer(x)
    delta = network.adapters[TARGET].factors().delta()
    torch.testing.assert_close(layer(x), base + 0.5 * x @ delta.t(), rtol=1e-4, atol=1e-4)


def test_the_formulas() -> None:
    generator = torch.Generator().manual_seed(3)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    parts = {
        "hada_w1_a": draw(6, 2),
        "hada_w1_b": draw(2, 4),
        "hada_w2_a": draw(6, 2),
        "hada_w2_b": draw(2, 4),
    }
    loha = LohaFactors(parts, 0.5)
    expected = 0.5 * (parts["hada_w1_a"] @ parts["hada_w1_b"]) * (parts["hada_w2_a"] @ parts["hada_w2_b"])
    torch.testing.assert_close(loha.delta(), expected)
    w1, w2_a, w2_b = draw(2, 3), draw(4, 2), draw(2, 5)
    lokr = LokrFactors({"lokr_w1": w1, "lokr_w2_a": w2_a, "lokr_w2_b": w2_b}, 0.25)
    torch.testing.assert_close(lokr.delta(), 0.25 * torch.kron(w1, w2_a @ w2_b))
    assert (lokr.shape, lokr.rank) == ((8, 15), 2)


def test_a_rank_too_large_for_lokr_gives_a_whole_matrix_at_scale_one() -> None:
    adapter = LokrAdapter("layer", 128, 128, rank=8, alpha=2.0, seed=0)
    assert not adapter.factors().is_scaled
    assert adapter.scale == 1.0
    assert LokrAdapter("layer", 128, 128, rank=7, alpha=2.0, seed=0).factors().is_scaled


@pytest.mark.parametrize("dim", [4, 64])
@pytest.mark.parametrize(("module", "args"), KINDS)
def test_saved_files_are_read_merged_and_trained_on(
    tmp_path: Path, module: str, args: dict[str, Any], dim: int
) -> None:
    network = build(module, args, dim=dim)
    wake(network)
    save_lora(network, tmp_path / "x.safetensors", save_precision=torch.float32)
    lora = read_lora(tmp_path / "x.safetensors", linear_layer_sizes(network.host))
    expected = network.adapters[TARGET].factors().delta()
    torch.testing.assert_close(lora.layers[TARGET].delta(), expected)
    weight = torch.zeros(256, 128)
    merged = add_deltas(weight, TARGET, [lora.with_multiplier(2.0)])
    torch.testing.assert_close(merged, 2 * expected)
    assert not weight.any()  # the source is left alone
    again = build(module, args, dim=dim, alpha=8.0)
    load_weights(again, lora)
    torch.testing.assert_close(again.adapters[TARGET].factors().delta(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        (
            {"hada_w1_a": (8, 4), "hada_w1_b": (3, 6), "hada_w2_a": (8, 4), "hada_w2_b": (4, 6)},
            r"hada_w1_a \[8, 4\] does not fit hada_w1_b \[3, 6\]",
        ),
        (
            {"hada_w1_a": (8, 4), "hada_w1_b": (4, 6), "hada_w2_a": (8, 4), "hada_w2_b": (4, 3)},
            r"the two products are of sizes \[8, 6\] and \[8, 3\]",
        ),
        (
            {"lokr_w1": (2, 2), "lokr_w2_a": (4, 2), "lokr_w2_b": (3, 3)},
            r"lokr_w2_a \[4, 2\] does not fit lokr_w2_b \[3, 3\]",
        ),
    ],
)
def test_factors_that_cannot_be_multiplied_are_refused_by_name(
    tmp_path: Path, shapes: dict[str, tuple[int, int]], words: str
) -> None:
    path, layer = tmp_path / "x.safetensors", "visual_transformer_blocks.0.self_attention.to_query"
    name = f"lycoris_{layer.replace('.', '_')}"
    write_tensors(path, {f"{name}.{role}": torch.ones(shape) for role, shape in shapes.items()})
    with pytest.raises(ModelFileError, match=f"layer {layer}: {words}"):
        read_lora(path, [layer])


def test_settings_that_a_kind_does_not_have_are_errors() -> None:
    for args in ({"rank_dropout": 0.1}, {"loraplus_lr_ratio": 2}, {"factor": 4}):
        with pytest.raises(ConfigError, match=r"unknown for networks\.loha"):
            build("networks.loha", args)
    with pytest.raises(ConfigError, match="factor: must be a whole number"):
        build("networks.lokr", {"factor": 0})
    with pytest.raises(ConfigError, match="--network_dropout"):
        create_network(
            tiny_dit(),
            network_dim=4,
            network_alpha=1.0,
            network_dropout=0.1,
            network_args={},
            seed=0,
            network_module="networks.lokr",
        )
