"""Training LoHa and LoKr: what is written, resumed, started from and refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from kandinsky5.cli.train import parse_train
from modules.errors import ConfigError
from modules.tensor_files import read_header
from networks.lora_files import read_lora
from networks.lora_kandinsky import known_layer_names
from tests.kandinsky5.training.training_runs import lora_bytes, metrics, train


@pytest.mark.parametrize(("module", "key"), [("loha", "hada_w1_a"), ("lokr", "lokr_w1")])
def test_loha_and_lokr_train_save_and_resume_to_the_same_bytes(
    module: str, key: str, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--network_module", f"musubi_tuner.networks.{module}", "--save_state")
    if module == "lokr":
        words = (*words, "--network_args", "factor=4")
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
    first = train(dit, dataset, tmp_path / "more", *words, *start)[0]
    assert first["loss"] != metrics(tmp_path / "whole", "step")[0]["loss"]


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
    with pytest.raises(ConfigError, match="not available with --network_module"):
        parse_train([*base, "--network_module", "networks.loha", *words])


def test_a_lora_state_is_not_continued_as_lokr(
    dit: Path, dataset: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    train(dit, dataset, tmp_path, "--max_train_steps", 1, "--save_state")
    more = ("--max_train_steps", 2, "--resume", "auto")
    with pytest.raises(SystemExit) as caught:
        train(dit, dataset, tmp_path, *more, "--network_module", "networks.lokr")
    assert caught.value.code == 2
    assert "Give the options of the first run" in capsys.readouterr().err
