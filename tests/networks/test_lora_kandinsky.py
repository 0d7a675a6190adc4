"""Which layers of Kandinsky 5 are trained, and the words of --network_args."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, DitParams
from modules.errors import ConfigError
from networks.lora_files import read_lora
from networks.lora_kandinsky import (
    create_network,
    create_network_from_weights,
    known_layer_names,
    linear_layer_sizes,
    target_module_names,
)
from networks.lora_saving import save_lora
from tests.tiny import tiny_dit


def meta_dit(params: DitParams) -> DiffusionTransformer3D:
    with torch.device("meta"):
        return DiffusionTransformer3D(**params.as_kwargs())


@pytest.fixture(scope="module")
def lite() -> DiffusionTransformer3D:
    return meta_dit(LITE_PARAMS)


@pytest.mark.parametrize(("params", "count"), [(PRO_PARAMS, 624), (LITE_PARAMS, 332)])
def test_the_published_sizes_have_the_stated_number_of_targets(params: DitParams, count: int) -> None:
    dit = meta_dit(params)
    names = target_module_names(dit)
    assert len(names) == count
    assert not any("modulation" in name or "embeddings" in name for name in names)
    sizes = linear_layer_sizes(dit)
    parameters = sum(32 * sum(sizes[name]) for name in names)
    if params is PRO_PARAMS:
        assert parameters == 213_909_504


@pytest.mark.parametrize("params", [PRO_PARAMS, LITE_PARAMS])
def test_the_names_for_files_without_a_model_cover_every_linear_layer(params: DitParams) -> None:
    assert set(linear_layer_sizes(meta_dit(params))) <= set(known_layer_names())


def test_excluding_feed_forward_leaves_the_attention_layers(lite: DiffusionTransformer3D) -> None:
    names = target_module_names(lite, exclude_patterns=[r".*feed_forward.*"])
    assert len(names) == 332 - 2 * 34
    assert not any("feed_forward" in name for name in names)


def test_include_alone_means_only_these(lite: DiffusionTransformer3D) -> None:
    names = target_module_names(lite, include_patterns=[r".*cross_attention\.to_key"])
    assert len(names) == 32
    assert all(name.endswith("cross_attention.to_key") for name in names)


def test_include_brings_back_what_exclude_left_out(lite: DiffusionTransformer3D) -> None:
    names = target_module_names(
        lite, exclude_patterns=[r".*feed_forward.*"], include_patterns=[r"text_.*feed_forward\.in_layer"]
    )
    assert len(names) == 332 - 2 * 34 + 2


def test_excluding_modulation_as_upstream_users_do_is_no_error(lite: DiffusionTransformer3D) -> None:
    assert len(target_module_names(lite, exclude_patterns=[".*modulation.*"])) == 332


@pytest.mark.parametrize(
    ("patterns", "words"),
    [
        ({"exclude_patterns": ["("]}, "is not a regular expression"),
        ({"exclude_patterns": ["to_query"]}, "matches no layer"),  # not the whole name
        ({"include_patterns": ["nothing.*", "["]}, "nothing"),
        ({"exclude_patterns": [".*"]}, "no layer to train"),
    ],
)
def test_patterns_that_cannot_be_meant_are_errors(
    lite: DiffusionTransformer3D, patterns: dict[str, list[str]], words: str
) -> None:
    with pytest.raises(ConfigError, match=words):
        target_module_names(lite, **patterns)


def build(dit: nn.Module, **network_args: Any) -> Any:
    return create_network(
        dit, network_dim=4, network_alpha=2.0, network_dropout=None, network_args=network_args, seed=0
    )


def test_network_args_reach_the_network() -> None:
    network = build(
        tiny_dit(), rank_dropout=0.1, module_dropout=0.2, loraplus_lr_ratio=3, conv_dim=4, verbose=False,
        exclude_patterns=[".*feed_forward.*"],
    )  # fmt: skip
    adapter = network.adapters["visual_transformer_blocks.0.self_attention.to_query"]
    assert (adapter.dropout.rank_dropout, adapter.dropout.module_dropout) == (0.1, 0.2)
    assert network.loraplus_lr_ratio == 3
    assert not any("feed_forward" in name for name in network.adapters)


def test_all_problems_of_network_args_are_told_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        build(tiny_dit(), rank_dropot=0.1, module_dropout=1.5, include_patterns="x", verbose="yes")
    text = str(caught.value)
    assert "did you mean rank_dropout" in text
    assert all(name in text for name in ("module_dropout", "include_patterns", "verbose"))


def test_dim_from_weights_takes_layers_ranks_and_values_from_the_file(tmp_path: Any) -> None:
    dit = tiny_dit()
    source = build(dit, exclude_patterns=[".*feed_forward.*"])
    for parameter in source.parameters():
        parameter.data += 0.1
    source.remove()
    save_lora(source, tmp_path / "a.safetensors", lora_format="kohya", save_precision=torch.float32)
    lora = read_lora(tmp_path / "a.safetensors", linear_layer_sizes(dit))
    network = create_network_from_weights(dit, lora, network_dropout=None, network_args={}, seed=1)
    assert list(network.adapters) == list(source.adapters)
    for name, adapter in network.adapters.items():
        assert (adapter.rank, adapter.alpha) == (4, 2.0)
        torch.testing.assert_close(adapter.factors().delta(), source.adapters[name].factors().delta())
