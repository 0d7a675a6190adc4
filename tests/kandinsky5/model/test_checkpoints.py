"""DiT checkpoints in every layout, wrong ones refused with the reason, LoRAs merged while streaming."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model import checkpoints
from kandinsky5.model.checkpoints import (
    build_meta_dit,
    check_dit_file,
    file_name_warning,
    load_dit,
    save_merged_model,
)
from kandinsky5.model.dit import DiffusionTransformer3D, is_float32_island
from kandinsky5.tasks import LITE_PARAMS, TINY_PARAMS
from kandinsky5.tiny_models import dit_tensors
from modules.errors import ConfigError, ModelFileError
from modules.fp8 import FP8_DTYPE, Fp8Linear, quantise_like
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.nf4 import Nf4Linear
from modules.quantised_linear import StoredLinear, dequantise
from modules.tensor_files import read_tensors, write_tensors
from networks.lora_files import LoadedLora, read_lora
from networks.lora_kandinsky import (
    create_network,
    create_network_from_weights,
    is_target_name,
    linear_layer_sizes,
)
from networks.lora_saving import save_lora

PARAMS = replace(TINY_PARAMS, num_text_blocks=1, num_visual_blocks=2)
CPU = torch.device("cpu")
TARGET = "visual_transformer_blocks.1.self_attention.to_query"
NORM = "visual_transformer_blocks.0.self_attention.query_norm.weight"


@pytest.fixture(scope="module")
def tensors() -> dict[str, Tensor]:
    """In the dtypes of the published files."""
    return dit_tensors(PARAMS)


def load(path: Path, **settings: Any) -> DiffusionTransformer3D:
    """With fields of `WeightsConfig`, `compute_dtype` and `loras`."""
    others: dict[str, Any] = {"compute_dtype": torch.float32}
    others |= {name: settings.pop(name) for name in ("compute_dtype", "loras") if name in settings}
    return load_dit(path, PARAMS, WeightsConfig(**settings), device=CPU, **others)


def run(dit: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(1, 2, 4, 4, 33, generator=generator)
    text, pooled = torch.randn(1, 5, 64, generator=generator), torch.randn(1, 32, generator=generator)
    with torch.no_grad():
        return dit(x, text, pooled, torch.tensor([500.0])).float()


def write_shards(folder: Path, tensors: dict[str, Tensor], stem: str, *, has_index: bool) -> list[Path]:
    names = list(tensors)
    paths, weight_map = [], {}
    for index in range(3):
        part = names[index::3]
        paths.append(folder / f"{stem}-{index + 1:05d}-of-00003.safetensors")
        write_tensors(paths[-1], {name: tensors[name] for name in part})
        weight_map |= dict.fromkeys(part, paths[-1].name)
    if has_index:
        index_path = folder / f"{stem}.safetensors.index.json"
        index_path.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return paths


def write_layout(folder: Path, tensors: dict[str, Tensor], layout: str) -> Path:
    """Write the tensors in one layout; returns what a user would type."""
    if layout == "file":
        write_tensors(folder / "dit.safetensors", tensors)
        return folder / "dit.safetensors"
    if layout == "prefix":
        write_tensors(
            folder / "dit.safetensors", {f"model.diffusion_model.{k}": v for k, v in tensors.items()}
        )
        return folder / "dit.safetensors"
    if layout == "other_prefix_and_marker":
        renamed = {f"module._orig_mod.{k}": v for k, v in tensors.items()}
        write_tensors(folder / "dit.SFT", {**renamed, "module._orig_mod.scaled_fp8": torch.zeros(0)})
        return folder / "dit.SFT"
    if layout == "first_shard":
        return write_shards(folder, tensors, "dit", has_index=False)[0]
    if layout == "index":
        write_shards(folder, tensors, "dit", has_index=True)
        return folder / "dit.safetensors.index.json"
    inner = folder / "transformer"
    if layout == "diffusers_single":
        write_tensors(inner / "diffusion_pytorch_model.safetensors", tensors)
        return folder
    inner.mkdir()
    write_shards(inner, tensors, "diffusion_pytorch_model", has_index=True)
    return folder if layout == "diffusers_parent" else inner


@pytest.mark.parametrize(
    ("layout", "use_mmap"),
    [
        ("file", True),
        ("file", False),
        ("prefix", True),
        ("other_prefix_and_marker", True),
        ("first_shard", True),
        ("index", True),
        ("diffusers_single", True),
        ("diffusers_parent", True),
        ("diffusers_folder", False),
    ],
)
def test_every_layout_loads_the_same_weights(
    tensors: dict[str, Tensor], tmp_path: Path, layout: str, use_mmap: bool
) -> None:
    dit = load(write_layout(tmp_path, tensors, layout), disable_numpy_memmap=not use_mmap)
    state = dit.state_dict()
    assert set(state) == set(tensors)
    assert all(torch.equal(state[key].float(), tensors[key].float()) for key in tensors)
    assert not any(parameter.requires_grad for parameter in dit.parameters())
    assert not any(tensor.is_meta for tensor in [*dit.parameters(), *dit.buffers()])


@pytest.mark.parametrize("file_dtype", [None, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("compute_dtype", [torch.float32, torch.bfloat16])
def test_islands_keep_the_dtype_of_the_file_and_the_rest_takes_the_compute_dtype(
    tmp_path: Path, file_dtype: torch.dtype | None, compute_dtype: torch.dtype
) -> None:
    tensors = dit_tensors(PARAMS, dtype=file_dtype)
    path = write_layout(tmp_path, tensors, "file")
    dit = load(path, compute_dtype=compute_dtype)
    for key, parameter in dit.named_parameters():
        assert parameter.dtype == (tensors[key].dtype if is_float32_island(key) else compute_dtype), key
        assert torch.equal(parameter, tensors[key].to(parameter.dtype))
    assert run(dit).isfinite().all()


def test_a_model_from_the_meta_device_computes_what_a_plainly_built_one_does(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    plain = DiffusionTransformer3D(**PARAMS.as_kwargs())
    plain.load_state_dict({key: tensor.float() for key, tensor in tensors.items()})
    assert torch.equal(run(load(write_layout(tmp_path, tensors, "file"))), run(plain))


def test_the_header_check_reads_no_weights_and_describes_the_file(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    info = check_dit_file(write_layout(tmp_path, tensors, "first_shard"), PARAMS)
    assert len(info.files) == 3
    assert not info.is_fp8
    assert "3 file(s)" in info.describe()
    assert "bfloat16" in info.describe()


def drop(tensors: dict[str, Tensor]) -> None:
    del tensors[NORM]


def add(tensors: dict[str, Tensor]) -> None:
    tensors["visual_transformer_blocks.9.extra.weight"] = torch.zeros(2)


def reshape(tensors: dict[str, Tensor]) -> None:
    tensors["visual_embeddings.in_layer.weight"] = torch.zeros(128, 64)


def integers(tensors: dict[str, Tensor]) -> None:
    tensors[NORM] = torch.zeros(64, dtype=torch.int8)


def replaced_by(*names: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors.clear()
        tensors.update({name: torch.zeros(2, 2) for name in names})

    return change


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (drop, rf"1 tensor is missing: {NORM}"),
        (add, r"1 tensor does not belong to the model: visual_transformer_blocks\.9\.extra\.weight"),
        (reshape, r"visual_embeddings\.in_layer\.weight \[128, 64\] instead of \[128, 132\]"),
        (integers, r"dtype that cannot be used: .* int8"),
        (replaced_by("encoder.down_blocks.0.weight"), r"looks like a VAE.*--vae.*key encoder"),
        (replaced_by("double_blocks.0.img_attn.qkv.weight"), "looks like a Flux"),
        (replaced_by("blocks.0.self_attn.q.weight"), "looks like a Wan"),
        (replaced_by("model.layers.0.mlp.up_proj.weight"), "looks like a Qwen"),
        (replaced_by("text_model.embeddings.position_ids"), "looks like a CLIP"),
        (replaced_by(f"transformer.{TARGET}.lora_A.weight"), "looks like a LoRA.*--lora_weight"),
        (replaced_by("something"), "its first keys: something"),
    ],
)
def test_files_that_are_not_this_model_are_refused_with_names(
    tensors: dict[str, Tensor], tmp_path: Path, change: Callable[[dict[str, Tensor]], None], words: str
) -> None:
    changed = dict(tensors)
    change(changed)
    path = write_layout(tmp_path, changed, "file")
    for attempt in (lambda: check_dit_file(path, PARAMS), lambda: load(path)):
        with pytest.raises(ModelFileError, match=words):
            attempt()


def test_another_size_is_told_from_a_damaged_file(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_layout(tmp_path, tensors, "file")
    with pytest.raises(ModelFileError) as caught:
        check_dit_file(path, LITE_PARAMS)
    text = str(caught.value)
    assert "another model size" in text
    assert "tensors are missing" in text
    assert text.count("visual_transformer_blocks") < 12  # the first names only


def test_missing_paths_and_shards_are_named(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match="no such file or folder"):
        check_dit_file(tmp_path / "none.safetensors", PARAMS)
    with pytest.raises(ModelFileError, match=r"without \.safetensors files"):
        check_dit_file(tmp_path, PARAMS)
    (tmp_path / "dit.pt").write_bytes(b"x")
    with pytest.raises(ModelFileError, match=r"not a \.safetensors file"):
        check_dit_file(tmp_path / "dit.pt", PARAMS)
    shards = write_shards(tmp_path, tensors, "dit", has_index=True)
    shards[1].unlink()
    for path in (shards[0], tmp_path, tmp_path / "dit.safetensors.index.json"):
        with pytest.raises(ModelFileError, match=r"1 of 3 shards are missing: dit-00002-of-00003"):
            check_dit_file(path, PARAMS)


def test_a_folder_with_two_models_asks_for_one(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    for name in ("a.safetensors", "b.safetensors"):
        write_tensors(tmp_path / name, tensors)
    with pytest.raises(ModelFileError, match=r"several models.*a\.safetensors, b\.safetensors"):
        check_dit_file(tmp_path, PARAMS)


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"weight_map": {"a": "../x.safetensors"}}', '{"weight_map": {}}']
)
def test_an_index_that_cannot_be_used_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "dit.safetensors.index.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ModelFileError, match=r"index\.json"):
        check_dit_file(path, PARAMS)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_found_by_name(
    tensors: dict[str, Tensor], tmp_path: Path, value: float
) -> None:
    damaged = {**tensors, f"{TARGET}.weight": tensors[f"{TARGET}.weight"].clone()}
    damaged[f"{TARGET}.weight"][3, 5] = value
    path = write_layout(tmp_path, damaged, "file")
    with pytest.raises(ModelFileError, match=rf"1 tensor contains NaN or infinite values: {TARGET}\.weight"):
        load(path)
    load(path, no_weight_check=True)


@pytest.mark.parametrize(
    ("name", "is_i2v", "is_warned"),
    [
        ("kandinsky5pro_t2v_sft_5s.safetensors", True, True),
        ("kandinsky5pro_I2V_sft_5s.safetensors", False, True),
        ("kandinsky5pro_t2v_sft_5s.safetensors", False, False),
        ("mine.safetensors", True, False),
    ],
)
def test_a_name_that_contradicts_the_task_gives_a_warning(name: str, is_i2v: bool, is_warned: bool) -> None:
    assert (file_name_warning(Path(name), is_i2v=is_i2v) is not None) == is_warned


@pytest.mark.parametrize(
    ("how", "kind", "limit"),
    [
        (("fp8_base",), Fp8Linear, 0.1),
        (("int8_base",), Int8Linear, 0.03),
        (("int8_base", "int8_fast"), RotatedInt8Linear, 0.05),
        (("int8_base", "int8_fast", "no_int8_rotation"), Int8Linear, 0.05),
        (("nf4_base",), Nf4Linear, 0.3),
    ],
    ids=["fp8", "int8", "rotated", "not rotated", "nf4"],
)
def test_eight_bits_hold_the_block_layers_and_nothing_else(
    tensors: dict[str, Tensor],
    tmp_path: Path,
    how: tuple[str, ...],
    kind: type[StoredLinear],
    limit: float,
) -> None:
    path = write_layout(tmp_path, tensors, "file")
    exact, small = load(path), load(path, **dict.fromkeys(how, True))
    for name, module in small.named_modules():
        assert (type(module) is kind) == is_target_name(name), name
    for key, parameter in small.named_parameters():
        if not isinstance(small.get_submodule(key.rpartition(".")[0]), kind) or key.endswith(".bias"):
            assert torch.equal(parameter, exact.state_dict()[key])
    difference = (run(small) - run(exact)).norm() / run(exact).norm()
    assert 0 < difference < limit


def as_fp8(tensors: dict[str, Tensor], scale: str, suffix: str) -> dict[str, Tensor]:
    """The block layers in float8, with scales in one of the layouts in use."""
    result: dict[str, Tensor] = {"scaled_fp8": torch.zeros(2, dtype=FP8_DTYPE)} if scale != "none" else {}
    for key, tensor in tensors.items():
        layer, _, name = key.rpartition(".")
        if name != "weight" or not is_target_name(layer):
            result[key] = tensor
            continue
        shapes = {"none": None, "tensor": (), "one": (1,), "row": (tensor.shape[0], 1),
                  "block": (tensor.shape[0], tensor.shape[1] // 64, 1)}  # fmt: skip
        weight8, factors = quantise_like(tensor.float(), FP8_DTYPE, shapes[scale])
        result[key] = weight8
        if factors is not None:
            result[f"{layer}.{suffix}"] = factors
    return result


@pytest.mark.parametrize(
    ("scale", "suffix"),
    [
        ("none", ""),
        ("tensor", "scale_weight"),
        ("one", "weight_scale"),
        ("row", "scale_weight"),
        ("block", "scale_weight"),
    ],
)
def test_float8_checkpoints_load_with_and_without_staying_float8(
    tensors: dict[str, Tensor], tmp_path: Path, scale: str, suffix: str
) -> None:
    quantised = as_fp8(tensors, scale, suffix)
    path = write_layout(tmp_path, quantised, "prefix")
    assert check_dit_file(path, PARAMS).is_fp8
    wide, small = load(path), load(path, fp8_base=True)
    factors = quantised.get(f"{TARGET}.{suffix}", torch.ones(()))
    expected = dequantise(quantised[f"{TARGET}.weight"], factors, torch.float32)
    assert torch.equal(wide.get_submodule(TARGET).weight, expected)
    kept = small.get_submodule(TARGET)
    assert isinstance(kept, Fp8Linear)
    assert torch.equal(kept.weight.view(torch.uint8), quantised[f"{TARGET}.weight"].view(torch.uint8))
    torch.testing.assert_close(run(small), run(wide), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("held", [{}, {"fp8_base": True}, {"int8_base": True}], ids=["wide", "fp8", "int8"])
def test_a_checkpoint_cast_to_float8_as_a_whole_loads_with_its_norms_and_biases(
    tensors: dict[str, Tensor], tmp_path: Path, held: dict[str, bool]
) -> None:
    cast = {key: tensor.to(FP8_DTYPE) for key, tensor in tensors.items()}
    path = write_layout(tmp_path, cast, "file")
    dit = load(path, **held)
    for key, parameter in dit.named_parameters():
        if parameter.ndim == 1 and not key.endswith("scale_weight"):
            assert torch.equal(parameter, cast[key].float()), key
    exact = {key: tensor.float() for key, tensor in cast.items()}
    (tmp_path / "exact").mkdir()
    expected = run(load(write_layout(tmp_path / "exact", exact, "file")))
    assert (run(dit) - expected).norm() < 0.03 * expected.norm()


def row_scaled(tensors: dict[str, Tensor], scale: Tensor) -> dict[str, Tensor]:
    return {**as_fp8(tensors, "row", "scale_weight"), f"{TARGET}.scale_weight": scale}


@pytest.mark.parametrize("scale", [torch.ones(3), torch.ones(128, 3), torch.ones(128, dtype=torch.uint8)])
def test_float8_scales_that_do_not_fit_their_weight_are_found_in_the_header(
    tensors: dict[str, Tensor], tmp_path: Path, scale: Tensor
) -> None:
    path = write_layout(tmp_path, row_scaled(tensors, scale), "prefix")
    with pytest.raises(ModelFileError, match=rf"scale does not fit.*{TARGET}\.scale_weight.*\[128, 128\]"):
        check_dit_file(path, PARAMS)


def test_a_float8_scale_of_a_vector_is_found_in_the_header(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    layer = NORM.removesuffix(".weight")
    changed = {**tensors, NORM: tensors[NORM].to(FP8_DTYPE), f"{layer}.scale_weight": torch.ones(())}
    with pytest.raises(ModelFileError, match="scale does not fit"):
        check_dit_file(write_layout(tmp_path, changed, "file"), PARAMS)


@pytest.mark.parametrize("held", [{}, {"fp8_base": True}], ids=["wide", "fp8"])
def test_float8_scales_that_are_not_finite_are_found_by_name(
    tensors: dict[str, Tensor], tmp_path: Path, held: dict[str, bool]
) -> None:
    scale = torch.ones(128).index_fill_(0, torch.tensor([5]), torch.nan)
    path = write_layout(tmp_path, row_scaled(tensors, scale), "prefix")
    with pytest.raises(ModelFileError, match=rf"NaN or infinite values: .*{TARGET}\.scale_weight"):
        load(path, **held)
    load(path, no_weight_check=True, **held)


@pytest.mark.parametrize("scale", ["none", "row", "block"])
def test_float8_checkpoints_become_int8_with_a_warning(
    tensors: dict[str, Tensor], tmp_path: Path, scale: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    messages: list[str] = []
    monkeypatch.setattr(checkpoints.log, "warning", lambda text, *given: messages.append(text % given))
    path = write_layout(tmp_path, as_fp8(tensors, scale, "scale_weight"), "prefix")
    wide = load(path).get_submodule(TARGET)
    assert not messages
    small = load(path, int8_base=True).get_submodule(TARGET)
    assert isinstance(small, Int8Linear)
    weight8, factors = Int8Linear.quantise(wide.weight)  # type: ignore[arg-type]
    assert torch.equal(small.weight, weight8)
    assert torch.equal(small.scale_weight.float(), factors)
    (message,) = messages
    assert "--int8_base rounds its weights a second time; --fp8_base takes them as they are" in message


def make_lora(folder: Path, seed: int, strength: float = 0.05) -> LoadedLora:
    dit = DiffusionTransformer3D(**PARAMS.as_kwargs())
    sizes = linear_layer_sizes(dit)
    network = create_network(
        dit, network_dim=4, network_alpha=4.0, network_dropout=None, network_args={}, seed=seed
    )
    generator = torch.Generator().manual_seed(seed)
    for parameter in network.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator) * strength
    path = folder / f"lora{seed}.safetensors"
    save_lora(network, path, save_precision=torch.float32)
    return read_lora(path, sizes)


def test_merging_while_loading_equals_applying_at_run_time(
    tensors: dict[str, Tensor], tmp_path: Path
) -> None:
    path = write_layout(tmp_path, tensors, "file")
    first, second = make_lora(tmp_path, 1), make_lora(tmp_path, 2).with_multiplier(-0.7)
    base = load(path)
    before = run(base)
    for lora in (first, second):
        network = create_network_from_weights(base, lora, network_dropout=None, network_args={}, seed=0)
        network.set_multiplier(lora.multiplier)
    beside = run(base)
    merged = run(load(path, loras=(first, second)))
    change = (beside - before).norm()
    assert change > 0.02 * before.norm()
    assert (merged - beside).norm() < 1e-4 * change


def test_a_multiplier_of_zero_is_bit_equal_to_no_lora(tensors: dict[str, Tensor], tmp_path: Path) -> None:
    path = write_layout(tmp_path, tensors, "file")
    lora = make_lora(tmp_path, 1).with_multiplier(0.0)
    for held in ({}, {"fp8_base": True}, {"int8_base": True}):
        assert torch.equal(run(load(path, loras=(lora,), **held)), run(load(path, **held)))


@pytest.mark.parametrize("how", [("fp8_base",), ("int8_base",), ("int8_base", "int8_fast"), ("nf4_base",)])
def test_in_few_bits_a_lora_keeps_its_effect(
    tensors: dict[str, Tensor], tmp_path: Path, how: tuple[str, ...]
) -> None:
    """Merged before quantisation: what the weights gain equals what was asked for, within the rounding."""
    path = write_layout(tmp_path, tensors, "file")
    lora = make_lora(tmp_path, 1, strength=0.2)
    held = dict.fromkeys(how, True)
    plain, merged = load(path, **held), load(path, loras=(lora,), **held)

    def weight(dit: DiffusionTransformer3D) -> Tensor:
        layer = dit.get_submodule(TARGET)
        assert isinstance(layer, StoredLinear)
        return layer.widened()

    asked = lora.layers[TARGET].delta()
    gained = weight(merged) - weight(plain)
    limit = 0.1 if "nf4_base" in how else 0.02
    assert abs(float((gained * asked).sum() / asked.square().sum()) - 1) < limit


@pytest.mark.parametrize("layout", ["file", "prefix", "first_shard"])
def test_the_merged_model_has_the_keys_and_dtypes_of_its_source(
    tensors: dict[str, Tensor], tmp_path: Path, layout: str
) -> None:
    path = write_layout(tmp_path, tensors, layout)
    lora = make_lora(tmp_path, 1).with_multiplier(0.5)
    output = tmp_path / "merged.safetensors"
    save_merged_model(path, PARAMS, (lora,), output, device=CPU)
    written, metadata = read_tensors(output)
    prefix = "model.diffusion_model." if layout == "prefix" else ""
    assert {name: t.dtype for name, t in written.items()} == {prefix + k: t.dtype for k, t in tensors.items()}
    assert json.loads(metadata["ss_merged_loras"]) == [{"name": "lora1.safetensors", "multiplier": 0.5}]
    expected = (tensors[f"{TARGET}.weight"].float() + 0.5 * lora.layers[TARGET].delta()).bfloat16()
    assert torch.equal(written[f"{prefix}{TARGET}.weight"], expected)
    assert torch.equal(written[prefix + NORM], tensors[NORM])
    with pytest.raises(ConfigError, match="exists already"):
        save_merged_model(path, PARAMS, (lora,), output, device=CPU)


@pytest.mark.parametrize("scale", ["none", "tensor", "row", "block"])
def test_a_float8_model_is_merged_in_its_own_layout(
    tensors: dict[str, Tensor], tmp_path: Path, scale: str
) -> None:
    quantised = as_fp8(tensors, scale, "scale_weight")
    path = write_layout(tmp_path, quantised, "file")
    lora = make_lora(tmp_path, 1, strength=0.2)
    output = tmp_path / "merged.safetensors"
    save_merged_model(path, PARAMS, (lora,), output, device=CPU)
    written, _ = read_tensors(output)
    assert {k: (t.dtype, t.shape) for k, t in written.items()} == {
        k: (t.dtype, t.shape) for k, t in quantised.items()
    }
    gained = load(output).get_submodule(TARGET).weight - load(path).get_submodule(TARGET).weight
    asked = lora.layers[TARGET].delta()
    assert abs(float((gained * asked).sum() / asked.square().sum()) - 1) < 0.02


def test_the_published_sizes_are_built_without_memory() -> None:
    dit = build_meta_dit(LITE_PARAMS, torch.bfloat16)
    assert all(parameter.is_meta for parameter in dit.parameters())
    assert sum(parameter.numel() for parameter in dit.parameters()) == 2_007_702_848
    assert not any(buffer.is_meta for buffer in dit.buffers())


@pytest.mark.parametrize("how", [{}, {"fp8_base": True}, {"int8_base": True}], ids=["bf16", "fp8", "int8"])
def test_a_loaded_model_has_let_go_of_its_file(
    tensors: dict[str, Tensor], tmp_path: Path, how: dict[str, bool]
) -> None:
    """Weights are read where they lie in the mapped file; none may stay there."""
    path = write_layout(tmp_path, tensors, "file")
    dit = load(path, **how)
    before = {key: value.clone() for key, value in dit.state_dict().items()}
    with path.open("r+b") as stream:  # in place: a mapping would show it
        stream.write(b"\xff" * path.stat().st_size)
    for key, value in dit.state_dict().items():
        assert torch.equal(value.view(torch.uint8), before[key].view(torch.uint8)), key
    maps = Path("/proc/self/maps")
    assert not maps.exists() or str(path) not in maps.read_text(encoding="utf-8")
