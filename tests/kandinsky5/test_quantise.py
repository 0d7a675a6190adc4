"""Checkpoints in one byte per weight: written by `kandinsky5.quantise`, ComfyUI's, and refused ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model import checkpoints
from kandinsky5.model.checkpoints import check_dit_file, load_dit
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.quantise import main
from modules.errors import ModelFileError
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.quantised_linear import QuantisedLinear, dequantise
from modules.rotation import rotation_block
from modules.tensor_files import read_tensors, write_tensors
from networks.lora_kandinsky import is_target_name
from networks.merge_lora import merge_files
from tests.kandinsky5.model.test_checkpoints import make_lora
from tests.tiny import tiny_dit

CPU = torch.device("cpu")
DIT = tiny_dit()
PARAMS = DIT.dit_params
LAYER = "visual_transformer_blocks.1.self_attention.to_query"
FAST = {"int8_base": True, "int8_fast": True}


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    return {key: value.detach().bfloat16() for key, value in DIT.state_dict().items()}


@pytest.fixture(scope="module")
def plain(tensors: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "plain.safetensors"
    write_tensors(path, tensors, {"a": "b"})
    return path


@pytest.fixture(scope="module")
def int8_file(plain: Path) -> Path:
    output = plain.with_name("int8.safetensors")
    main([str(plain), str(output), "--int8"])
    return output


def load(path: Path, **held: bool) -> DiffusionTransformer3D:
    return load_dit(path, PARAMS, WeightsConfig(**held), device=CPU, compute_dtype=torch.bfloat16)


def assert_equal(one: DiffusionTransformer3D, other: DiffusionTransformer3D) -> None:
    first, second = one.state_dict(), other.state_dict()
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype, key
        assert torch.equal(tensor, second[key]), key
    for (name, left), right in zip(one.named_modules(), other.modules(), strict=True):
        if isinstance(left, QuantisedLinear):
            assert isinstance(right, QuantisedLinear)
            assert (type(left), left.rotation, left.use_fast) == (
                type(right),
                right.rotation,
                right.use_fast,
            ), name


@pytest.mark.parametrize(("kind", "held"), [("--int8", FAST), ("--fp8", {"fp8_base": True})])
def test_a_written_file_is_what_quantising_while_loading_makes_to_the_bit(
    plain: Path, tmp_path: Path, kind: str, held: dict[str, bool]
) -> None:
    output = tmp_path / "small.safetensors"
    main([str(plain), str(output), kind])
    assert output.stat().st_size < 0.75 * plain.stat().st_size
    assert_equal(load(output, **held), load(plain, **held))
    assert read_tensors(output)[1] == {"a": "b"}


def test_the_file_has_comfyuis_layout(int8_file: Path, tensors: dict[str, Tensor]) -> None:
    written, _ = read_tensors(int8_file)
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if name != "weight" or not is_target_name(layer):
            assert torch.equal(written[key], tensor)
            continue
        block = rotation_block(tensor.shape[1])
        assert written[key].dtype == torch.int8
        assert written[f"{layer}.weight_scale"].shape == (tensor.shape[0], 1)
        assert written[f"{layer}.weight_scale"].dtype == torch.float32
        assert json.loads(written[f"{layer}.comfy_quant"].numpy().tobytes()) == {
            "format": "int8_tensorwise", "convrot": True, "convrot_groupsize": block,
        }  # fmt: skip


@pytest.mark.parametrize("held", [{"int8_base": True}, FAST], ids=["base", "fast"])
@pytest.mark.parametrize(
    ("block", "kind"), [(None, Int8Linear), (4, RotatedInt8Linear), (64, RotatedInt8Linear)]
)
@pytest.mark.parametrize("shape", ["tensor", "row"])
def test_comfyuis_files_are_taken_as_they_are(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    block: int | None,
    kind: type,
    shape: str,
    held: dict[str, bool],
) -> None:
    """Whatever the options say of a rotation: the file's own counts."""
    weight8 = torch.randint(-127, 128, (128, 128), dtype=torch.int8)
    scale = torch.rand(128, 1) / 50 if shape == "row" else torch.tensor(0.01)
    described = {"format": "int8_tensorwise"}
    if block is not None:
        described |= {"convrot": True, "convrot_groupsize": block}
    text = torch.frombuffer(bytearray(json.dumps(described).encode()), dtype=torch.uint8)
    path = tmp_path / "comfy.safetensors"
    shared = {f"{LAYER}.weight": weight8, f"{LAYER}.weight_scale": scale, f"{LAYER}.comfy_quant": text}
    prefix = "model.diffusion_model."
    write_tensors(path, {prefix + key: value for key, value in {**tensors, **shared}.items()})
    layer = load(path, **held).get_submodule(LAYER)
    assert type(layer) is kind
    assert torch.equal(layer.weight, weight8)
    assert torch.equal(layer.scale_weight.float(), scale.reshape(-1).expand(128))
    wide = load(path).get_submodule(LAYER).weight
    assert torch.equal(wide, dequantise(weight8, scale, torch.bfloat16, block or 1))
    x = torch.randn(40, 128).bfloat16()
    exact = x.float() @ dequantise(weight8, scale, torch.float32, block or 1).t() + layer.bias.float()
    assert (layer(x).float() - exact).norm() / exact.norm() < 2e-2


def test_a_lora_is_merged_into_rotated_weights_with_a_warning(
    int8_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(checkpoints.log, "warning", lambda text, *given: messages.append(text % given))
    lora = make_lora(tmp_path, 1, strength=0.2)
    weights = WeightsConfig(**FAST)
    merged = load_dit(int8_file, PARAMS, weights, device=CPU, compute_dtype=torch.bfloat16, loras=(lora,))
    assert messages == ["int8.safetensors is int8 already: merging a LoRA rounds its weights a second time"]
    merge_files(int8_file, [tmp_path / "lora1.safetensors"], [1.0], tmp_path / "merged.safetensors", CPU)
    written, before = load(tmp_path / "merged.safetensors", **FAST), load(int8_file, **FAST)

    def weight(dit: DiffusionTransformer3D) -> Tensor:
        layer = dit.get_submodule(LAYER)
        assert isinstance(layer, QuantisedLinear)
        return dequantise(layer.weight, layer.scale_weight, torch.float32, layer.rotation)

    asked = lora.layers[LAYER].delta()
    for dit in (merged, written):
        gained = weight(dit) - weight(before)
        assert abs(float((gained * asked).sum() / asked.square().sum()) - 1) < 0.02


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("model.gguf", b"GGUF\x03\x00", "a GGUF file"),
        ("model.GGUF", b"", "a GGUF file"),
        ("renamed.safetensors", b"GGUF\x03\x00\x00\x00", "a GGUF file"),
        ("model.ckpt", b"x", "a pickle, which can run programs"),
        ("model.onnx", b"x", "not a .safetensors file"),
    ],
)
def test_other_files_are_named_with_what_to_download(
    tmp_path: Path, name: str, content: bytes, words: str
) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ModelFileError) as caught:
        check_dit_file(tmp_path / name, PARAMS)
    (message,) = caught.value.problems
    assert words in message
    assert "Download the model" in message
    assert ("run programs" in message) is name.endswith(".ckpt")


def test_a_folder_of_gguf_files_is_named(tmp_path: Path) -> None:
    (tmp_path / "model-q4.gguf").write_bytes(b"GGUF")
    with pytest.raises(ModelFileError, match=r"model-q4\.gguf is a GGUF file.*Download the model"):
        check_dit_file(tmp_path, PARAMS)


@pytest.mark.parametrize("code", ["F4", "F8_E8M0"])
def test_dtypes_of_packed_formats_are_named(tmp_path: Path, code: str) -> None:
    header = json.dumps({"a.weight": {"dtype": code, "shape": [2], "data_offsets": [0, 1]}}).encode()
    path = tmp_path / "a.safetensors"
    path.write_bytes(len(header).to_bytes(8, "little") + header + b"\0")
    with pytest.raises(ModelFileError, match=r"a\.weight is .*MXFP4.* not read here"):
        check_dit_file(path, PARAMS)


def test_a_kandinsky_6_model_is_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "six.safetensors"
    write_tensors(
        path, {**tensors, "audio_text_transformer_blocks.0.self_attention.to_key.bias": torch.ones(1)}
    )
    with pytest.raises(ModelFileError, match="this is a Kandinsky 6 model"):
        check_dit_file(path, PARAMS)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("--int8", "--fp8"), 2, "not allowed with argument"),
        ((), 2, "one of the arguments --int8 --fp8 is required"),
    ],
)
def test_the_command_asks_for_one_form(
    plain: Path, words: tuple[str, ...], code: int, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main([str(plain), "out.safetensors", *words])
    assert stop.value.code == code
    assert message in capsys.readouterr().err


def test_nothing_is_overwritten_rounded_twice_or_written_from_damaged_weights(
    plain: Path,
    int8_file: Path,
    tensors: dict[str, Tensor],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad = tmp_path / "bad.safetensors"
    weight = tensors[f"{LAYER}.weight"].clone()
    weight[3, 5] = torch.nan
    write_tensors(bad, {**tensors, f"{LAYER}.weight": weight})
    for source, output, code, message in (
        (plain, int8_file, 2, "exists already"),
        (int8_file, tmp_path / "a.safetensors", 4, "one byte already"),
        (bad, tmp_path / "b.safetensors", 4, f"{LAYER}.weight holds NaN or infinite values"),
    ):
        for kind in ("--int8", "--fp8"):
            with pytest.raises(SystemExit) as stop:
                main([str(source), str(output), kind])
            assert stop.value.code == code
            assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.safetensors"]
