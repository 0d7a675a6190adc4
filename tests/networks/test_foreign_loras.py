"""LoRA files of other programs: the readable ones are read, others are named, damage is no traceback."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
import safetensors.torch
import torch
from torch import Tensor

from modules.errors import ModelFileError
from networks import convert_lora
from networks.lora_files import read_lora
from networks.lora_keys import LayerNames, foreign_kind, layout_of, parse_key
from tests.lora_strengths import LAYERS, small_factors, small_model

Names = Callable[[str, str], str]
"""(layer, "down" or "up") -> key."""
HALVES = {"down": "A", "up": "B"}


def plain(prefix: str, ending: str = ".lora_{half}.weight") -> Names:
    return lambda layer, half: prefix + layer + ending.format(half=HALVES[half], word=half)


def joined(prefix: str, layer: str) -> str:
    return prefix + layer.replace(".", "_")


READABLE: dict[str, Names] = {
    **{
        f"prefix {prefix}": plain(prefix)
        for prefix in (
            *("diffusion_model.", "transformer.", "module.", "_orig_mod.", "model.", "dit."),
            *("model.diffusion_model.", "module._orig_mod.", "base_model.model.transformer."),
            *("base_model.model.module.", "pipe.dit.", "my_net.0."),
        )
    },
    "compiled blocks": lambda layer, half: plain("transformer.")(
        layer.replace("blocks.1.", "blocks.1._orig_mod."), half
    ),
    "compiled blocks of kohya": lambda layer, half: (
        joined("lora_unet__orig_mod_", layer.replace("blocks.1.", "blocks.1._orig_mod."))
        + f".lora_{half}.weight"
    ),
    "another prefix of kohya": lambda layer, half: joined("lora_dit_", layer) + f".lora_{half}.weight",
    "lora.down": plain("transformer.", ".lora.{word}.weight"),
    "lora_linear_layer.down": plain("", ".lora_linear_layer.{word}.weight"),
    "to_query_lora.down": plain("transformer.", "_lora.{word}.weight"),
    "bare lora_A": plain("diffusion_model.", ".lora_{half}"),
    "bare lora_A.default": plain("base_model.model.", ".lora_{half}.default"),
    "an adapter's name": plain("", ".lora_{half}.my_style.weight"),
    "lower case": lambda layer, half: f"{layer}.lora_{HALVES[half].lower()}.weight",
    "upper case": lambda layer, half: f"{layer}.LORA_{half.upper()}.WEIGHT",
    "all dots": lambda layer, half: (
        f"diffusion_model.{layer.replace('_', '.')}.lora_{HALVES[half]}.weight"
    ),
    "all dots, adapter named": lambda layer, half: (
        f"{layer.replace('_', '.')}.lora_{HALVES[half]}.default.weight"
    ),
}  # fmt: skip


def tensors_of(names: Names) -> dict[str, Tensor]:
    return {
        names(layer, half): factor
        for layer, pair in small_factors(small_model()).items()
        for half, factor in zip(HALVES, pair, strict=True)
    }


def check(path: Path, expected_scale: float = 1.0) -> None:
    lora = read_lora(path, {layer: (size, 16) for layer, size in zip(LAYERS, (24, 40), strict=True)})
    for layer, (down, up) in small_factors(small_model()).items():
        torch.testing.assert_close(lora.layers[layer].delta(), expected_scale * up @ down)


@pytest.mark.parametrize("name", READABLE)
def test_every_spelling_of_names_is_read(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(tensors_of(READABLE[name]), tmp_path / "a.safetensors")
    check(tmp_path / "a.safetensors")


def add_ones(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: tensor[..., None, None] for key, tensor in tensors.items()}


def add_marker(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {**tensors, "scaled_fp8": torch.empty(0), "diffusion_model.scaled_fp8": torch.zeros(2)}


@pytest.mark.parametrize("change", [add_ones, add_marker])
@pytest.mark.parametrize("suffix", [".safetensors", ".sft", ".SAFETENSORS", ".pt", ".PTH"])
def test_shapes_of_convolutions_a_marker_and_other_endings_of_the_file_are_read(
    tmp_path: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], suffix: str
) -> None:
    tensors = change(tensors_of(plain("diffusion_model.")))
    path = tmp_path / f"a{suffix}"
    if suffix.lower().startswith(".pt"):
        torch.save(tensors, path)
    else:
        safetensors.torch.save_file(tensors, path)
    check(path)


def test_what_musubi_has_converted_is_not_scaled_again_by_the_header_it_keeps(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = tensors_of(READABLE["all dots"])
    header = {"ss_network_alpha": "2.0", "ss_network_dim": "4"}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors", header)
    with caplog.at_level("INFO"):
        check(tmp_path / "a.safetensors")
    assert "converted by musubi-tuner: the scale is inside its factors" in caplog.text


@pytest.mark.parametrize("name", ["adapter_model", "pytorch_lora_weights", "lora", "anything"])
def test_a_folder_stands_for_the_file_in_it(tmp_path: Path, name: str) -> None:
    safetensors.torch.save_file(tensors_of(plain("")), tmp_path / f"{name}.safetensors")
    check(tmp_path)
    if name != "anything":
        safetensors.torch.save_file({"x": torch.ones(1)}, tmp_path / "optimizer.safetensors")
        check(tmp_path)


def test_a_prefix_that_not_all_layers_have_is_not_one(tmp_path: Path) -> None:
    tensors = tensors_of(lambda layer, half: plain("ema." if layer == LAYERS[0] else "old.")(layer, half))
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match="0 of 4 keys match"):
        read_lora(tmp_path / "a.safetensors", LAYERS)


def test_every_layout_has_its_name() -> None:
    names = LayerNames(LAYERS)
    layouts = {name: layout_of(list(tensors_of(spelling)), names) for name, spelling in READABLE.items()}
    assert layouts["prefix transformer."] == "diffusers"
    assert layouts["prefix model.diffusion_model."] == "comfy"
    assert layouts["all dots"] == layouts["lora.down"] == layouts["prefix module."] == "other"


UNREADABLE = {
    "lora_B.bias": "biases of the factors",
    "lora_up.default.bias": "biases of the factors",
    "diff_b": "changes of biases",
    "diff": "whole changes of weights",
    "oft_blocks": "OFT factors",
    "oft_R.weight": "OFT factors",
    "boft_R": "BOFT factors",
    "a1.weight": "GLoRA factors",
    "ia3_l": "IA3 factors",
    "lora_E": "AdaLoRA factors",
    "hada_t1": "factors of convolutions",
    "lora_mid.weight": "factors of convolutions",
    "modules_to_save.weight": "whole modules",
    "bias": "biases of the model",
}


@pytest.mark.parametrize("role", UNREADABLE)
def test_what_cannot_be_applied_is_named_as_what_it_is(tmp_path: Path, role: str) -> None:
    key = f"transformer.{LAYERS[0]}.{role}"
    tensors = {**tensors_of(plain("transformer.")), key: torch.ones(24)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=f"holds {UNREADABLE[role]}.*{role}.*not act as") as raised:
        read_lora(tmp_path / "a.safetensors", LAYERS)
    assert "allow_partial" not in str(raised.value)
    safetensors.torch.save_file({key: torch.ones(24)}, tmp_path / "alone.safetensors")
    with pytest.raises(ModelFileError, match=f"holds {UNREADABLE[role]}.* alone .*{role}"):
        read_lora(tmp_path / "alone.safetensors", LAYERS)


@pytest.mark.parametrize("key", ["lora_te1_text_model_x.lora_down.weight", "text_encoder.x.lora_A.weight"])
def test_a_lora_of_the_text_encoder_may_be_left_out(
    tmp_path: Path, key: str, caplog: pytest.LogCaptureFixture
) -> None:
    tensors = {**tensors_of(plain("transformer.")), key: torch.ones(4, 4)}
    safetensors.torch.save_file(tensors, tmp_path / "a.safetensors")
    with pytest.raises(ModelFileError, match=r"holds a LoRA of a text encoder[^\n]*\n.*--lora_allow_partial"):
        read_lora(tmp_path / "a.safetensors", LAYERS)
    assert set(read_lora(tmp_path / "a.safetensors", LAYERS, allow_partial=True).layers) == set(LAYERS)
    assert "left out" in caplog.text
    words = ["--input", str(tmp_path / "a.safetensors"), "--output", str(tmp_path / "b.safetensors")]
    convert_lora.main([*words, "--target", "comfy", "--lora_allow_partial"])  # what the message offers
    check(tmp_path / "b.safetensors")


@pytest.mark.parametrize("ending", ["", ".weight", ".default", ".default.weight", ".my_style.weight"])
def test_a_magnitude_vector_is_that_of_a_dora_whatever_its_ending(ending: str) -> None:
    assert parse_key(f"x.y.lora_magnitude_vector{ending}") == ("x.y", "dora_scale")
    assert foreign_kind(f"x.y.lora_magnitude_vector{ending}") is None


def mutations(image: bytes, count: int, seed: int) -> list[bytes]:
    """The file cut, with bytes changed, left out, repeated or set to zero."""
    drawn = random.Random(seed)
    mutated = []
    for _ in range(count):
        start, length = drawn.randrange(len(image)), drawn.choice([1, 2, 8, 64])
        what = drawn.randrange(5)
        if what == 0:
            mutated.append(image[:start])
        elif what == 1:
            noise = bytes(drawn.randrange(256) for _ in range(length))
            mutated.append(image[:start] + noise + image[start + length :])
        elif what == 2:
            mutated.append(image[:start] + image[start + length :])
        elif what == 3:
            mutated.append(image[:start] + image[start : start + length] * 2 + image[start + length :])
        else:
            mutated.append(image[:start] + bytes(length) + image[start + length :])
    return mutated


def images() -> dict[str, bytes]:
    tensors = {key: tensor for key, tensor in tensors_of(plain("")).items() if "to_query" in key}
    zipped, old = io.BytesIO(), io.BytesIO()
    torch.save(tensors, zipped)
    torch.save(tensors, old, _use_new_zipfile_serialization=False)
    whole = safetensors.torch.save(tensors, {"lora_alpha": "3", "lora_adapter_metadata": '{"r": 4}'})
    return {"zip.pt": zipped.getvalue(), "old.pt": old.getvalue(), "a.safetensors": whole}


@pytest.mark.parametrize("name", ["zip.pt", "old.pt", "a.safetensors"])
def test_damage_is_never_a_traceback(tmp_path: Path, name: str) -> None:
    image = images()[name]
    path = tmp_path / name
    dense = mutations(image[: min(len(image), 600)], 200, seed=1)  # where the structure is
    outcomes = set()
    for mutated in [*(piece + image[600:] for piece in dense), *mutations(image, 200, seed=2)]:
        path.write_bytes(mutated)
        try:
            read_lora(path, LAYERS)
            outcomes.add("read")
        except ModelFileError:
            outcomes.add("refused")
    assert outcomes == {"read", "refused"}
