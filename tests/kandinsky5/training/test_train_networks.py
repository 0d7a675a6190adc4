"""Kinds of adapter in training: files, resume, starting weights, base weights and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from kandinsky5.cli.train import parse_train
from kandinsky5.tasks import TINY_PARAMS
from modules.errors import ConfigError
from modules.tensor_files import read_header, write_tensors
from networks.lora_files import read_lora
from networks.lora_kandinsky import known_layer_names
from tests.kandinsky5.training.training_runs import lora_bytes, metrics, train


@pytest.mark.parametrize(
    ("module", "key"), [("loha", "hada_w1_a"), ("lokr", "lokr_w1"), ("lora_kandinsky", "dora_scale")]
)
def test_loha_lokr_and_dora_train_save_and_resume_to_the_same_bytes(
    module: str, key: str, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--network_module", f"musubi_tuner.networks.{module}", "--save_state")
    if module == "lokr":
        words = (*words, "--network_args", "factor=4")
    if key == "dora_scale":
        words = (*words, "--network_args", "use_dora=True", "--int8_base")
    train(dit, dataset, tmp_path / "whole", *words, "--max_train_steps", 4)
    train(dit, dataset, tmp_path / "parts", *words, "--max_train_steps", 2)
    train(dit, dataset, tmp_path / "parts", *words, "--max_train_steps", 4, "--resume", "auto")
    whole, parts = (tmp_path / name / "lora.safetensors" for name in ("whole", "parts"))
    assert lora_bytes(whole) == lora_bytes(parts)
    header = read_header(whole)
    assert header.metadata["ss_network_module"] == f"networks.{module}"
    lora = read_lora(whole, known_layer_names())
    factors = next(iter(lora.layers.values()))
    assert key in factors.tensors
    assert all(bool(layer.delta().any()) for layer in lora.layers.values())
    start = ("--network_weights", whole, "--max_train_steps", 1)
    train(dit, dataset, tmp_path / "more", *words, *start)
    assert metrics(tmp_path / "more", "step")[0]["loss"] != metrics(tmp_path / "whole", "step")[0]["loss"]


@pytest.mark.parametrize(
    "words",
    [
        ("--network_dropout", "0.1"),
        ("--scale_weight_norms", "1"),
        ("--dim_from_weights", "--network_weights", "x.safetensors"),
    ],
)
def test_what_only_a_plain_lora_has_is_refused(words: tuple[str, ...]) -> None:
    base = ("--task", "k5-tiny-t2v", "--dataset_config", "d.toml", "--output_dir", "o", "--output_name", "n")
    with pytest.raises(ConfigError, match="not supported by --network_module"):
        parse_train([*base, "--network_module", "networks.loha", *words])
    as_dora = [*base, *words, "--network_args", "use_dora=True"]
    if "--scale_weight_norms" in words:
        with pytest.raises(ConfigError, match=r"not supported by --network_module .* with use_dora"):
            parse_train(as_dora)
    else:
        parse_train(as_dora)


def test_a_lora_state_is_not_continued_as_lokr(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    more = ("--max_train_steps", 2, "--resume", "auto")
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, *more, "--network_module", "networks.lokr")
    assert caught.value.code == 2
    assert "Give the options of the first run" in capsys.readouterr().err


def test_base_weights_take_layers_outside_the_blocks_as_generation_does(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    width, time_dim = TINY_PARAMS.model_dim, TINY_PARAMS.time_dim
    file = tmp_path / "modulation.safetensors"
    write_tensors(
        file,
        {
            "transformer.out_layer.modulation.out_layer.lora_A.weight": torch.ones(1, time_dim),
            "transformer.out_layer.modulation.out_layer.lora_B.weight": torch.full((2 * width, 1), 0.01),
        },
    )
    train(dit, dataset, tmp_path / "with", "--max_train_steps", 1, "--base_weights", file)
    train(dit, dataset, tmp_path / "without", "--max_train_steps", 1)
    changed, plain = (metrics(tmp_path / name, "step")[0]["loss"] for name in ("with", "without"))
    assert changed != plain
