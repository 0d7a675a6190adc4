"""Model files that are wrong, damaged, changed or malicious: refused by name, and never run."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kandinsky5.model.checkpoints import check_dit_file, load_dit, save_merged_model
from kandinsky5.tasks import TINY_PARAMS
from kandinsky5.training.results.state import TrainingState, read_state, write_state
from kandinsky5.vae.video_vae import load_vae
from modules.errors import ModelFileError
from modules.fp8 import FP8_DTYPE
from modules.tensor_files import read_header, read_tensors, write_tensors
from modules.weight_files import open_weight_files
from networks.lora_files import read_lora
from tests.kandinsky5.generation.generation_kit import LAYER, Generate, latents_of, refused
from tests.kandinsky5.training.training_runs import exit_code, train

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
BASE = ("--prompt", "x", "--output", "x.mp4")


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (str(self.marker),)


@pytest.fixture
def payload(tmp_path: Path) -> Path:
    path = tmp_path / "evil.pt"
    torch.save({"state_dict": Payload(tmp_path / "marker")}, path)
    return path


@pytest.fixture
def own_models(models: dict[str, Path], tmp_path: Path) -> dict[str, Path]:
    """Copies that a test may damage; the script loads them."""
    for flag, path in models.items():
        target = tmp_path / "own" / path.name
        (shutil.copytree if path.is_dir() else _copy)(path, target)
        models[flag] = target
    return models


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(source, target)


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("flag", ["--dit", "--vae", "--lora_weight", "--latent_path"])
@pytest.mark.parametrize("name", ["evil.pt", "evil.safetensors"])
def test_no_path_option_runs_code_from_a_file(
    run: Generate, payload: Path, capsys: pytest.CaptureFixture[str], flag: str, name: str
) -> None:
    if name != payload.name:
        payload.rename(payload.with_name(name))
    words = ("--output", "x.mp4") if flag == "--latent_path" else BASE
    size = () if flag == "--latent_path" else ("--frames", "5")
    assert name in refused(run, 4, capsys, *words, flag, payload.with_name(name), size=size)
    assert not payload.with_name("marker").exists()


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("flag", ["--text_encoder_qwen", "--text_encoder_clip"])
def test_text_encoders_are_never_read_from_pickles(
    run: Generate, own_models: dict[str, Path], payload: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    folder = own_models[flag]
    for file in folder.glob("*.safetensors*"):
        file.unlink()
    shutil.copy(payload, folder / "pytorch_model.bin")
    assert "holds neither model.safetensors nor" in refused(run, 4, capsys, *BASE)
    assert not payload.with_name("marker").exists()


def test_a_training_state_is_read_without_running_code(tmp_path: Path) -> None:
    """Whole by its manifest, as a stranger's would be."""
    empty = {"int": 1, "float": 0.0, "str": "", "tuple": [], "Mapping": {}}
    values: dict[str, Any] = {
        field.name: next((value for kind, value in empty.items() if str(field.type).startswith(kind)), None)
        for field in fields(TrainingState)
    }
    for part in ("optimizer", "scheduler"):
        parts: dict[str, Any] = {"optimizer": {}, part: {"x": Payload(tmp_path / "marker")}}
        write_state(tmp_path / part, TrainingState(**values), {"w": torch.zeros(1)}, **parts)
        with pytest.raises(ModelFileError, match=rf"{part}\.pt: holds more than tensors"):
            read_state(tmp_path / part)
    assert not (tmp_path / "marker").exists()


@pytest.mark.usefixtures("no_models")
@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json"])
@pytest.mark.parametrize("flag", ["--text_encoder_qwen", "--text_encoder_clip"])
def test_text_encoders_that_bring_code_are_refused(
    run: Generate, own_models: dict[str, Path], capsys: pytest.CaptureFixture[str], flag: str, file: str
) -> None:
    folder = own_models[flag]
    (folder / "own.py").write_text("open('marker', 'w')", encoding="utf-8")
    content = json.loads((folder / file).read_text(encoding="utf-8"))
    content["auto_map"] = {"AutoModel": "own.Model", "AutoTokenizer": ["own.Tokenizer", None]}
    (folder / file).write_text(json.dumps(content), encoding="utf-8")
    assert "auto_map" in refused(run, 4, capsys, *BASE)
    assert not Path("marker").exists()


@pytest.mark.usefixtures("no_models")
def test_a_text_encoder_of_another_width_is_refused_before_anything_loads(
    run: Generate, own_models: dict[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = own_models["--text_encoder_clip"]
    small = CLIPTextConfig.from_pretrained(clip, hidden_size=16, intermediate_size=16)
    CLIPTextModel(small).save_pretrained(clip)
    message = refused(run, 4, capsys, *BASE)
    assert "--text_encoder_clip: the model is 16 wide, the task's DiT takes 32" in message


def _spoil(file: Path, name: str, value: float) -> None:
    tensors, metadata = read_tensors(file)
    tensors[name].view(-1)[0] = value
    write_tensors(file, tensors, metadata)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_vae_weights_that_are_not_finite_are_found_by_name(own_models: dict[str, Path], value: float) -> None:
    folder = own_models["--vae"]
    _spoil(folder / "diffusion_pytorch_model.safetensors", "post_quant_conv.bias", value)
    with pytest.raises(
        ModelFileError, match=r"1 tensor contains NaN or infinite values: post_quant_conv\.bias"
    ):
        load_vae(folder, dtype=torch.float32, device=CPU)


@pytest.mark.parametrize("quantisation", [(), ("--fp8_llm",)])
def test_text_encoder_weights_that_are_not_finite_are_found_by_name(
    script: Generate,
    own_models: dict[str, Path],
    capsys: pytest.CaptureFixture[str],
    quantisation: tuple[str, ...],
) -> None:
    folder = own_models["--text_encoder_qwen"]
    name = "layers.0.mlp.up_proj.weight"
    for file in folder.glob("*.safetensors"):
        for stored in read_header(file).tensors:
            if stored.endswith(name):
                _spoil(file, stored, torch.nan)
    message = refused(script, 4, capsys, *BASE, *quantisation)
    assert f"1 tensor contains NaN or infinite values: {name}" in message


@pytest.mark.parametrize(
    "damage",
    [
        lambda raw: raw[:0],
        lambda raw: raw[:10],
        lambda raw: raw[:200],
        lambda raw: raw[:-1],
        lambda raw: (2**63 - 1).to_bytes(8, "little") + raw[8:],
    ],
    ids=["empty", "10 bytes", "in the header", "in the data", "giant header"],
)
def test_a_damaged_dit_is_refused_with_its_sizes(
    models: dict[str, Path], tmp_path: Path, damage: Callable[[bytes], bytes]
) -> None:
    path = tmp_path / "cut.safetensors"
    path.write_bytes(damage(models["--dit"].read_bytes()))
    with pytest.raises(ModelFileError, match=rf"cut\.safetensors.*{path.stat().st_size}"):
        check_dit_file(path, TINY_PARAMS)


def test_a_model_that_shrinks_while_it_is_read_is_an_error(models: dict[str, Path], tmp_path: Path) -> None:
    """With plain reads; the system ends a process whose mapped file shrinks."""
    path = tmp_path / "dit.safetensors"
    shutil.copy(models["--dit"], path)
    with open_weight_files((path,), use_mmap=False) as weights:
        last = max(weights.tensors, key=lambda name: weights.tensors[name].end)
        with path.open("r+b") as stream:
            stream.truncate(weights.tensors[last].start)
        with pytest.raises(ModelFileError, match="ended early while reading tensor"):
            weights.read(last)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_checkpoints_of_any_floating_dtype_load(
    models: dict[str, Path], tmp_path: Path, dtype: torch.dtype
) -> None:
    tensors = {name: tensor.to(dtype) for name, tensor in read_tensors(models["--dit"])[0].items()}
    write_tensors(tmp_path / "dit.safetensors", tensors)
    dit = load_dit(tmp_path / "dit.safetensors", TINY_PARAMS, device=CPU, compute_dtype=torch.float32)
    torch.testing.assert_close(dit.get_submodule(LAYER).weight, tensors[f"{LAYER}.weight"].float())


@pytest.mark.parametrize("held", [(), ("--fp8_base",)], ids=["wide", "fp8"])
def test_training_and_generation_take_a_checkpoint_that_was_cast_to_float8_as_a_whole(
    run: Generate, models: dict[str, Path], dit: Path, dataset: Path, tmp_path: Path, held: tuple[str, ...]
) -> None:
    for path, flag in ((dit, "train"), (models["--dit"], "make")):
        cast = {name: tensor.to(FP8_DTYPE) for name, tensor in read_tensors(path)[0].items()}
        write_tensors(tmp_path / f"{flag}.safetensors", cast)
    records = train(tmp_path / "train.safetensors", dataset, tmp_path / "out", "--max_train_steps", 1, *held)
    assert any(math.isfinite(record.get("loss", math.nan)) for record in records)
    small = ("--dit", tmp_path / "make.safetensors", "--steps", 1, *held)
    run(*BASE, *small, "--dry_run")
    run("--prompt", "x", *small, "--output", "x.safetensors", "--output_type", "latent")
    assert latents_of(tmp_path / "x.safetensors").isfinite().all()


@pytest.mark.usefixtures("no_models")
def test_float8_scales_that_do_not_fit_are_refused_before_anything_loads(
    run: Generate,
    models: dict[str, Path],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for path in (dit, models["--dit"]):
        tensors = read_tensors(path)[0]
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"].to(FP8_DTYPE)
        write_tensors(tmp_path / path.parent.name / "odd.safetensors",
                      {**tensors, f"{LAYER}.scale_weight": torch.ones(3)})  # fmt: skip
    odd = tmp_path / models["--dit"].parent.name / "odd.safetensors"
    assert f"scale does not fit its weight: {LAYER}" in refused(run, 4, capsys, *BASE, "--dit", odd)
    odd = tmp_path / dit.parent.name / "odd.safetensors"
    assert exit_code(odd, dataset, tmp_path / "out", "--max_train_steps", 1) == 4


def test_merging_and_taking_away_again_is_the_base_within_bfloat16_rounding(
    models: dict[str, Path], tmp_path: Path, lora: Path
) -> None:
    base = read_tensors(models["--dit"])[0][f"{LAYER}.weight"]
    adapter = read_lora(lora, {LAYER: (base.shape[0], base.shape[1])})
    merged, back = tmp_path / "merged.safetensors", tmp_path / "back.safetensors"
    save_merged_model(models["--dit"], TINY_PARAMS, (adapter,), merged, device=CPU)
    save_merged_model(merged, TINY_PARAMS, (adapter.with_multiplier(-1.0),), back, device=CPU)
    found, widest = (read_tensors(path)[0][f"{LAYER}.weight"].float() for path in (back, merged))
    # Half a unit in the last place of the merged weight, of 8 significant bits, plus that of the result.
    limit = (widest.abs() + base.float().abs()) * 2**-8
    assert (found - base.float()).abs().le(limit).all()
    both = load_dit(
        models["--dit"], TINY_PARAMS, device=CPU, compute_dtype=torch.float32,
        loras=(adapter, adapter.with_multiplier(-1.0)),
    )  # fmt: skip
    torch.testing.assert_close(both.get_submodule(LAYER).weight, base.float(), rtol=0, atol=1e-6)


def _other_architecture(_tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {
        f"transformer.blocks.{i}.attn.lora_{half}.weight": torch.zeros(4, 4) for i in (0, 1) for half in "AB"
    }


def _ranks_that_differ(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value if "lora_A" in name else torch.zeros(128, 8) for name, value in tensors.items()}


def _another_width(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: torch.zeros(4, 1792) if "lora_A" in name else value for name, value in tensors.items()}


def _one_layer_more(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return tensors | {name.replace("blocks.0.", "blocks.77."): value for name, value in tensors.items()}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (_other_architecture, ("0 of 4 keys match", "transformer.blocks.0")),
        (_ranks_that_differ, ("rank",)),
        (_another_width, ("[128, 1792] in the file",)),
        (_one_layer_more, ("2 of 4 keys match no layer", "blocks.77", "--lora_allow_partial")),
    ],
)
@pytest.mark.usefixtures("no_models")
def test_a_lora_that_does_not_fit_says_how(
    run: Generate,
    lora: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    words: tuple[str, ...],
) -> None:
    write_tensors(lora, change(read_tensors(lora)[0]))
    message = refused(run, 4, capsys, *BASE, "--lora_weight", lora)
    assert all(word in message for word in words), message


def test_a_lora_of_which_a_part_fits_is_used_when_allowed(run: Generate, tmp_path: Path, lora: Path) -> None:
    words = ("--prompt", "x", "--steps", 1, "--output_type", "latent", "--lora_weight", lora)
    run(*words, "--output", "whole.safetensors")
    write_tensors(lora, _one_layer_more(read_tensors(lora)[0]))
    run(*words, "--lora_allow_partial", "--output", "part.safetensors")
    assert torch.equal(*(latents_of(tmp_path / f"{name}.safetensors") for name in ("whole", "part")))
