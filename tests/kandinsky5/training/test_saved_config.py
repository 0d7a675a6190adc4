"""The configuration beside a LoRA: it gives the run again, and tells nothing private."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TrainConfig
from kandinsky5.training.results.saved_config import shareable_options, write_config
from kandinsky5_train_network import main
from tests.kandinsky5.training.training_runs import lora_bytes, train

pytestmark = pytest.mark.fast

BASE = ("--task", "k5-tiny-t2v", "--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "name")


def written(output: Path) -> Path:
    return output / "lora_config.toml"


def parse(*words: object) -> TrainConfig:
    config = parse_train([str(word) for word in words])
    assert isinstance(config, TrainConfig)
    return config


def test_a_run_from_the_saved_configuration_ends_in_the_same_bytes(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """Only the places are given again."""
    train(
        *(dit, dataset, tmp_path / "first", "--max_train_steps", 3, "--network_dropout", 0.2),
        *("--optimizer_args", "betas=(0.9,0.95)", "--lr_scheduler", "cosine", "--lr_warmup_steps", "40%"),
        *("--network_args", "exclude_patterns=['.*feed_forward.*']", "--metadata_reso", "64,32"),
    )
    saved = written(tmp_path / "first")
    places = ("--dit", dit, "--dataset_config", dataset, "--output_dir", tmp_path / "again")
    main([str(word) for word in ("--config_file", saved, *places)])
    assert lora_bytes(tmp_path / "again/lora.safetensors") == lora_bytes(tmp_path / "first/lora.safetensors")
    first, again = (
        tomllib.loads(f.read_text(encoding="utf-8")) for f in (saved, written(tmp_path / "again"))
    )
    assert again == first


def test_a_seed_that_was_drawn_stands_in_the_file(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--task", "k5-tiny-t2v", "--dit", dit, "--dataset_config", dataset, "--output_dir", tmp_path)
    words = (*words, "--output_name", "a", "--max_train_steps", 1, "--max_data_loader_n_workers", 0)
    main([*map(str, words), "--override_dit", '{"num_text_blocks": 1, "num_visual_blocks": 1}'])
    values = tomllib.loads((tmp_path / "a_config.toml").read_text(encoding="utf-8"))
    assert isinstance(values["seed"], int)
    assert values["mixed_precision"] == "no"


def test_every_kind_of_value_comes_back(tmp_path: Path) -> None:
    words = (
        *(*BASE, "--training_comment", '「猫」 "a/b" \\ \x7f 🐈 = # [x]', "--learning_rate", "1e-5"),
        *("--no_nabla_add_sta", "--gradient_checkpointing", "--optimizer_args", "betas=(0.9,0.95)"),
        *("--text_encoder_qwen", "Qwen/Qwen2.5-VL-7B-Instruct", "--lr_scheduler", "cosine"),
        *("--lr_warmup_steps", "0.1", "--metadata_reso", "64,32", "--sample_every_n_steps", 3),
        *("--sample_prompts", "p.txt", "--force_nabla_attention"),
    )
    first = parse(*words)
    write_config(tmp_path / "c.toml", first, {})
    places = ("--dataset_config", "d.toml", "--output_dir", "out", "--sample_prompts", "p.txt")
    again = parse("--config_file", tmp_path / "c.toml", *places)
    assert again == first


def test_places_are_comments_with_their_own_name_and_keys_are_nowhere(tmp_path: Path) -> None:
    config = parse(
        *(*BASE, "--dit", "/home/me/model.safetensors", "--vae", "C:\\Users\\me\\vae"),
        *("--text_encoder_qwen", "/home/me/qwen/", "--base_weights", "/home/me/a.safetensors"),
        *("--resume", "auto", "--overwrite", "--config_file", write_keys(tmp_path)),
        *("--huggingface_token", "hf_canary", "--huggingface_repo_id", "me/it"),
    )
    write_config(tmp_path / "c.toml", config, {})
    text = (tmp_path / "c.toml").read_text(encoding="utf-8")
    assert config.tracking.wandb_api_key == "canary"
    assert "canary" not in str(shareable_options(config))
    for line in ('# dit = "model.safetensors"', '# vae = "vae"', '# text_encoder_qwen = "qwen"'):
        assert line in text.splitlines()
    assert '# base_weights = ["a.safetensors"]' in text
    for word in ("canary", "/me", "\\me", "resume = ", "overwrite", "config_file ="):
        assert word not in text


def write_keys(folder: Path) -> Path:
    """A configuration file with something that must not be copied."""
    path = folder / "keys.toml"
    path.write_text('wandb_api_key = "canary" # canary\nlog_with = "wandb"\n', encoding="utf-8")
    return path
