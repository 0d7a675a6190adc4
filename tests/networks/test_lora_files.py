"""LoRA files: every layout gives one change of the weights, and what is written loads elsewhere."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from kandinsky5.model.dit import DiffusionTransformer3D
from modules.errors import ConfigError, ModelFileError
from modules.tensor_files import read_tensors, write_tensors
from networks.lora import LoRANetwork
from networks.lora_files import load_weights, read_lora
from networks.lora_kandinsky import create_network, linear_layer_sizes
from networks.lora_saving import save_lora
from tests.tiny import tiny_dit

TARGET = "visual_transformer_blocks.1.cross_attention.to_key"


@pytest.fixture(scope="module")
def dit() -> DiffusionTransformer3D:
    return tiny_dit()


@pytest.fixture(scope="module")
def sizes(dit: DiffusionTransformer3D) -> dict[str, tuple[int, int]]:
    return linear_layer_sizes(dit)


@pytest.fixture(scope="module")
def network() -> LoRANetwork:
    """Of rank 4 and alpha 2, with values in every factor."""
    network = create_network(
        tiny_dit(), network_dim=4, network_alpha=2.0, network_dropout=None, network_args={}, seed=0
    )
    generator = torch.Generator().manual_seed(3)
    for parameter in network.parameters():
        parameter.data = (torch.randn(parameter.shape, generator=generator) * 0.1).bfloat16().float()
    return network


def raw(network: LoRANetwork) -> dict[str, tuple[Tensor, Tensor]]:
    return {
        name: (layer.tensors["lora_down"], layer.tensors["lora_up"])
        for name, layer in ((name, adapter.factors()) for name, adapter in network.adapters.items())
    }


def write_layout(network: LoRANetwork, path: Path, layout: str) -> None:
    """The network's tensors under the names other programs use, made here by hand."""
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    for name, (down, up) in raw(network).items():
        if layout in {"kohya", "lycoris"}:
            prefix = {"kohya": "lora_unet_", "lycoris": "lycoris_"}[layout] + name.replace(".", "_")
            tensors |= {f"{prefix}.lora_down.weight": down, f"{prefix}.lora_up.weight": up}
            tensors[f"{prefix}.alpha"] = torch.tensor(2.0)
            continue
        prefix, suffix = {
            "diffusers": ("transformer.", ""),
            "comfy": ("diffusion_model.", ""),
            "peft": ("base_model.model.", ".default"),
            "bare": ("", ""),
        }[layout]
        tensors |= {
            f"{prefix}{name}.lora_A{suffix}.weight": down,
            f"{prefix}{name}.lora_B{suffix}.weight": up,
        }
        if layout == "comfy":
            tensors[f"{prefix}{name}.alpha"] = torch.tensor(2.0)
    if layout == "diffusers":
        settings = {"transformer.r": 4, "transformer.lora_alpha": 2}
        metadata["lora_adapter_metadata"] = json.dumps(settings)
    if layout in {"peft", "bare"}:
        config = {"r": 4, "lora_alpha": 2, "target_modules": ["to_query"]}
        (path.parent / "config_lora.json").write_text(json.dumps(config), encoding="utf-8")
        metadata["trigger"] = "zoom in"
    safetensors.torch.save_file(tensors, path, metadata)


@pytest.mark.parametrize("layout", ["kohya", "lycoris", "diffusers", "comfy", "peft", "bare"])
def test_every_layout_gives_the_same_change(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path, layout: str
) -> None:
    path = tmp_path / "lora.safetensors"
    write_layout(network, path, layout)
    lora = read_lora(path, sizes)
    assert set(lora.layers) == set(network.adapters)
    for name, factors in lora.layers.items():
        assert torch.equal(factors.delta(), network.adapters[name].factors().delta())
    assert lora.trigger == ("zoom in" if layout in {"peft", "bare"} else None)


@pytest.mark.parametrize("lora_format", ["diffusers", "kohya"])
@pytest.mark.parametrize(("precision", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_what_is_saved_reads_back(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path, lora_format: Any,
    precision: torch.dtype, tolerance: float,
) -> None:  # fmt: skip
    path = tmp_path / "ours.safetensors"
    # Another run's settings lie in the same folder: a file that carries its scale does not read them.
    (tmp_path / "config_lora.json").write_text('{"r": 4, "lora_alpha": 400}', encoding="utf-8")
    save_lora(network, path, lora_format=lora_format, save_precision=precision, metadata={"ss_steps": "7"})
    lora = read_lora(path, sizes)
    for name, factors in lora.layers.items():
        expected = network.adapters[name].factors().delta()
        assert (factors.delta() - expected).norm() <= tolerance * expected.norm()
        assert all(tensor.dtype == precision for tensor in factors.tensors.values())
    assert lora.metadata["ss_steps"] == "7"


def test_the_default_layout_is_the_stated_one(network: LoRANetwork, tmp_path: Path) -> None:
    path = tmp_path / "ours.safetensors"
    save_lora(network, path)
    tensors, _ = read_tensors(path)
    assert len(tensors) == 2 * len(network.adapters)
    assert tensors[f"transformer.{TARGET}.lora_A.weight"].shape == (4, 128)
    assert tensors[f"transformer.{TARGET}.lora_B.weight"].shape == (128, 4)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    down, up = raw(network)[TARGET]
    assert torch.equal(tensors[f"transformer.{TARGET}.lora_A.weight"].float(), down)
    assert torch.equal(
        tensors[f"transformer.{TARGET}.lora_B.weight"].float(), up * 0.5
    )  # alpha / rank folded
    config = json.loads((tmp_path / "ours_config_lora.json").read_text(encoding="utf-8"))
    assert (config["r"], config["lora_alpha"], len(config["target_modules"])) == (4, 4, 10)
    assert "cross_attention.to_key" in config["target_modules"]


def test_the_kohya_layout_is_the_stated_one(network: LoRANetwork, tmp_path: Path) -> None:
    save_lora(network, tmp_path / "ours.safetensors", lora_format="kohya")
    tensors, _ = read_tensors(tmp_path / "ours.safetensors")
    prefix = "lora_unet_visual_transformer_blocks_1_cross_attention_to_key"
    assert tensors[f"{prefix}.lora_down.weight"].shape == (4, 128)
    assert tensors[f"{prefix}.lora_up.weight"].shape == (128, 4)
    assert tensors[f"{prefix}.alpha"] == 2.0
    assert not (tmp_path / "ours_config_lora.json").exists()


def test_the_hashes_are_those_of_a_file_with_kohya_metadata_only(
    network: LoRANetwork, tmp_path: Path
) -> None:
    save_lora(network, tmp_path / "a.safetensors", metadata={"ss_seed": "1", "modelspec.title": "t"})
    tensors, metadata = read_tensors(tmp_path / "a.safetensors")
    write_tensors(tmp_path / "b.safetensors", tensors, {"ss_seed": "1"})
    image = (tmp_path / "b.safetensors").read_bytes()
    data = image[8 + int.from_bytes(image[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(data).hexdigest()
    assert metadata["sshs_legacy_hash"] == hashlib.sha256(image[0x100000:0x110000]).hexdigest()[:8]


def test_layers_of_different_rank_keep_their_change_in_readers_with_one_rank(
    dit: DiffusionTransformer3D, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    from networks.lora import inject

    names = [TARGET, TARGET.replace("to_key", "to_value")]
    mixed = inject(tiny_dit(), names, rank={names[0]: 2, names[1]: 4}, alpha=3.0, seed=0)
    for parameter in mixed.parameters():
        parameter.data += 0.1
    save_lora(mixed, tmp_path / "m.safetensors", save_precision=torch.float32)
    lora = read_lora(tmp_path / "m.safetensors", sizes)
    assert {factors.rank for factors in lora.layers.values()} == {4}
    for name in names:
        torch.testing.assert_close(lora.layers[name].delta(), mixed.adapters[name].factors().delta())


def test_starting_from_a_file_rescales_to_the_alpha_of_the_run(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    save_lora(network, tmp_path / "a.safetensors", save_precision=torch.float32)
    lora = read_lora(tmp_path / "a.safetensors", sizes)
    run = create_network(
        tiny_dit(), network_dim=4, network_alpha=1.0, network_dropout=None, network_args={}, seed=9
    )
    load_weights(run, lora)
    for name, adapter in run.adapters.items():
        torch.testing.assert_close(adapter.factors().delta(), network.adapters[name].factors().delta())
    other_rank = create_network(
        tiny_dit(), network_dim=8, network_alpha=1.0, network_dropout=None, network_args={}, seed=9
    )
    with pytest.raises(ConfigError, match="rank 4 in the file, 8 in this run"):
        load_weights(other_rank, lora)


def edited(network: LoRANetwork, path: Path, change: Callable[[dict[str, Tensor]], None]) -> Path:
    save_lora(network, path)
    tensors, metadata = read_tensors(path)
    change(tensors)
    write_tensors(path, tensors, metadata)
    return path


def rename_all(tensors: dict[str, Tensor]) -> None:
    for key in list(tensors):
        tensors[key.replace("_transformer_blocks", "_blocks")] = tensors.pop(key)


def drop_one_half(tensors: dict[str, Tensor]) -> None:
    del tensors[f"transformer.{TARGET}.lora_B.weight"]


def widen(tensors: dict[str, Tensor]) -> None:
    for key in tensors:
        if "lora_A" in key and "to_" in key:
            tensors[key] = torch.zeros(4, 1792)


def poison(tensors: dict[str, Tensor]) -> None:
    tensors[f"transformer.{TARGET}.lora_A.weight"][0, 0] = torch.nan


def add_dora(tensors: dict[str, Tensor]) -> None:
    tensors[f"transformer.{TARGET}.lora_magnitude_vector"] = torch.ones(4)


def repeat_a_layer(tensors: dict[str, Tensor]) -> None:
    key = f"transformer.{TARGET}.lora_A.weight"
    tensors[key.replace("transformer.vis", "diffusion_model.vis")] = tensors[key]


def keep_no_adapter_key(tensors: dict[str, Tensor]) -> None:
    tensors.clear()
    tensors["blocks.0.weight"] = torch.ones(2)


def alpha_of(count: int) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[f"transformer.{TARGET}.alpha"] = torch.ones(count)

    return change


def take_all_ranks(tensors: dict[str, Tensor]) -> None:
    for half, dimension in (("A", 0), ("B", 1)):
        key = f"transformer.{TARGET}.lora_{half}.weight"
        tensors[key] = tensors[key].narrow(dimension, 0, 0)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (alpha_of(0), f"layer {TARGET}: alpha has 0 elements instead of one"),
        (alpha_of(2), f"layer {TARGET}: alpha has 2 elements instead of one"),
        (take_all_ranks, rf"layer {TARGET} are incomplete: found lora_down \[0, \d+\]"),
        (rename_all, r"0 of 104 keys match"),
        (drop_one_half, f"layer {TARGET} are incomplete"),
        (widen, r"another size: .* is \[128, 128\] in this model, \[128, 1792\] in the file"),
        (poison, "NaN"),
        (add_dora, f"layer {TARGET}: its magnitudes are"),
        (repeat_a_layer, "under two names"),
        (keep_no_adapter_key, "not a LoRA file"),
    ],
)
def test_files_that_do_not_fit_are_refused_with_the_reason(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path, change: Any, words: str
) -> None:
    path = edited(network, tmp_path / "x.safetensors", change)
    with pytest.raises(ModelFileError, match=words):
        read_lora(path, sizes)


def test_some_unmatched_keys_are_an_error_unless_allowed(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    def add_foreign(tensors: dict[str, Tensor]) -> None:
        tensors["transformer.visual_transformer_blocks.77.self_attention.to_key.lora_A.weight"] = torch.ones(
            4, 2
        )

    path = edited(network, tmp_path / "x.safetensors", add_foreign)
    with pytest.raises(ModelFileError, match=r"1 of 105 keys match no layer.*blocks\.77.*\n.*allow_partial"):
        read_lora(path, sizes)
    assert len(read_lora(path, sizes, allow_partial=True).layers) == len(network.adapters)


def test_key_patterns_choose_what_is_read(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    save_lora(network, tmp_path / "a.safetensors")

    def names(**patterns: list[str]) -> set[str]:
        return set(read_lora(tmp_path / "a.safetensors", sizes, **patterns).layers)

    assert all("to_key" in name for name in names(include_patterns=["to_key"]))
    assert not any("to_key" in name for name in names(exclude_patterns=["to_key"]))
    with pytest.raises(ConfigError, match="patterns"):
        names(include_patterns=["("])


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.marker),)


def test_a_pickle_is_read_only_when_it_holds_tensors_alone(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    save_lora(network, tmp_path / "a.safetensors")
    tensors, _ = read_tensors(tmp_path / "a.safetensors")
    torch.save(tensors, tmp_path / "good.pt")
    assert len(read_lora(tmp_path / "good.pt", sizes).layers) == len(network.adapters)
    marker = tmp_path / "marker"
    torch.save({"x": Payload(marker)}, tmp_path / "evil.pt")
    with pytest.raises(ModelFileError, match="refused"):
        read_lora(tmp_path / "evil.pt", sizes)
    (tmp_path / "evil.safetensors").write_bytes((tmp_path / "evil.pt").read_bytes())
    with pytest.raises(ModelFileError, match="safetensors"):
        read_lora(tmp_path / "evil.safetensors", sizes)
    assert not marker.exists()


@pytest.mark.parametrize("name", ["missing.safetensors", "missing.pt", "."])
def test_a_missing_file_or_a_folder_is_named(
    sizes: dict[str, tuple[int, int]], tmp_path: Path, name: str
) -> None:
    with pytest.raises(ModelFileError, match=r"no such file|is a folder"):
        read_lora(tmp_path / name, sizes)


@pytest.mark.parametrize(
    "text",
    [
        "[1]",
        "{",
        '{"lora_alpha": "8"}',
        '{"lora_alpha": NaN}',
        '{"lora_alpha": 1, "alpha_pattern": {"to_key": Infinity}}',
        '{"lora_alpha": 1' + "0" * 400 + "}",
        '{"use_dora": true}',
        "[" * 100_000,
    ],
)
def test_settings_beside_the_file_that_cannot_be_used_are_errors(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path, text: str
) -> None:
    write_layout(network, tmp_path / "lora.safetensors", "bare")
    (tmp_path / "config_lora.json").write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match="config_lora"):
        read_lora(tmp_path / "lora.safetensors", sizes)


def test_a_trigger_is_printable_and_short(
    network: LoRANetwork, sizes: dict[str, tuple[int, int]], tmp_path: Path
) -> None:
    save_lora(network, tmp_path / "a.safetensors", metadata={"trigger": "zoom\x1b[31m in\n" + "x" * 9999})
    trigger = read_lora(tmp_path / "a.safetensors", sizes).trigger
    assert trigger is not None
    assert trigger.startswith("zoom[31m in")
    assert len(trigger) <= 500


def test_underscored_names_are_looked_up_and_not_split(sizes: dict[str, tuple[int, int]]) -> None:
    from networks.lora_keys import LayerNames

    names = LayerNames(sizes)
    for written in ("lora_unet_" + TARGET.replace(".", "_"), "base_model.model.transformer." + TARGET):
        found = names.split(written)
        assert found is not None
        assert (found.layer, found.has_known_prefix) == (TARGET, True)
    assert names.split("lora_unet_visual_transformer_blocks_99_cross_attention_to_key") is None
