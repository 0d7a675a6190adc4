"""What a LoRA file says of its run is what the run did, not what was typed."""

from __future__ import annotations

from pathlib import Path

import pytest

from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.training.training_runs import train

pytestmark = pytest.mark.fast


def metadata_of(dit: Path, dataset: Path, folder: Path, *words: object) -> dict[str, str]:
    train(dit, dataset, folder, "--max_train_steps", 1, *words)
    return dict(read_header(folder / "lora.safetensors").metadata)


def test_rank_and_alpha_are_those_of_the_tensors(dit: Path, dataset: Path, tmp_path: Path) -> None:
    first = metadata_of(dit, dataset, tmp_path / "first", "--network_dim", 6, "--network_alpha", 0)
    assert (first["ss_network_dim"], first["ss_network_alpha"]) == ("6", "6.0")
    weights = tmp_path / "first/lora.safetensors"
    words = ("--network_weights", weights, "--dim_from_weights", "--network_dim", 16, "--network_alpha", 16)
    second = metadata_of(dit, dataset, tmp_path / "second", *words)
    assert (second["ss_network_dim"], second["ss_network_alpha"]) == ("6", "6.0")


def test_layers_of_several_ranks_are_called_dynamic(dit: Path, dataset: Path, tmp_path: Path) -> None:
    train(dit, dataset, tmp_path / "first", "--max_train_steps", 1, "--network_dim", 4, "--network_alpha", 4)
    tensors, metadata = read_tensors(tmp_path / "first/lora.safetensors")
    layer = next(name for name in tensors if name.endswith("lora_A.weight")).removesuffix("lora_A.weight")
    tensors[f"{layer}lora_A.weight"] = tensors[f"{layer}lora_A.weight"][:2].contiguous()
    tensors[f"{layer}lora_B.weight"] = tensors[f"{layer}lora_B.weight"][:, :2].contiguous()
    write_tensors(tmp_path / "mixed.safetensors", tensors, metadata)
    words = ("--network_weights", tmp_path / "mixed.safetensors", "--dim_from_weights")
    assert metadata_of(dit, dataset, tmp_path / "second", *words)["ss_network_dim"] == "Dynamic"


_COSINE = ("--lr_scheduler", "cosine", "--lr_warmup_steps", 1)


@pytest.mark.parametrize(
    ("words", "rate", "schedule", "warmup"),
    [
        (_COSINE, "0.001", "cosine", "1"),
        ((*_COSINE, "--optimizer_type", "tests.kandinsky5.training.test_train_saved.ThirdsScheduleFree"),
         "0.001", "None", "0"),
        ((*_COSINE, "--optimizer_type", "AdaFactor"), "None", "adafactor", "0"),
        ((*_COSINE, "--lr_scheduler_type", "StepLR", "--lr_scheduler_args", "step_size=1"),
         "0.001", "StepLR", "0"),
        (("--lr_scheduler", "piecewise_constant", "--lr_scheduler_args", "step_rules='1:2,0.1'",
          "--lr_warmup_steps", 1), "0.001", "piecewise_constant", "0"),
    ],
)  # fmt: skip
def test_the_schedule_is_the_one_that_acted(
    words: tuple[object, ...], rate: str, schedule: str, warmup: str, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    metadata = metadata_of(dit, dataset, tmp_path, *words)
    keys = ("ss_learning_rate", "ss_lr_scheduler", "ss_lr_warmup_steps")
    assert tuple(metadata[key] for key in keys) == (rate, schedule, warmup)


def test_memory_options_are_those_of_the_run(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload", "--fp8_base")
    metadata = metadata_of(dit, dataset, tmp_path, *words)
    for key in ("gradient_checkpointing", "gradient_checkpointing_cpu_offload", "fp8_base"):
        assert metadata[f"ss_{key}"] == "True"


def test_the_model_spec_holds_what_the_author_says(dit: Path, dataset: Path, tmp_path: Path) -> None:
    given = {"author": "me", "description": "a cat", "license": "MIT", "tags": "cat, test"}
    words = [word for key, value in given.items() for word in (f"--metadata_{key}", value)]
    metadata = metadata_of(dit, dataset, tmp_path, *words, "--metadata_arch", "other", "--no_metadata")
    assert {key: metadata[f"modelspec.{key}"] for key in given} == given
    assert metadata["modelspec.architecture"] == "other/lora"
