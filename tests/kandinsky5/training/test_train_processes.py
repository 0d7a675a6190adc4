"""Two processes train as one does, agree on every step, and keep one state without base weights."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from modules.tensor_files import read_header, read_tensors, write_tensors
from tests.kandinsky5.training.recording_trainer import WORD
from tests.kandinsky5.training.test_resume_matrix import write_two_datasets
from tests.kandinsky5.training.training_runs import metrics, train
from tests.tiny import tiny_dit

pytestmark = pytest.mark.slow

STEPS = 10
OPTIONS = (
    *("--override_dit", "{}", "--max_train_steps", STEPS, "--save_precision", "fp32"),
    *("--save_state_on_train_end", "--network_dropout", 0.1, "--num_timestep_buckets", 3),
)
SAVING_MEMORY = ("--fp8_base", "--blocks_to_swap", 2, "--gradient_checkpointing")


@pytest.fixture(scope="module")
def dit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("dit") / "tiny.safetensors"
    write_tensors(path, {key: value.detach() for key, value in tiny_dit().state_dict().items()})
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven batches of one or two clips, captions of 5 to 9 tokens: six a step leave five."""
    return write_two_datasets(tmp_path_factory.mktemp("data"))


def launch(dit: Path, dataset: Path, output: Path, root: Path, *extra: object, word: str = "") -> None:
    words = (
        *(sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2),
        *("--num_machines", 1, "--num_cpu_threads_per_process", 1, "--main_process_port", 0),
        *(root / "tests/kandinsky5/training/recording_trainer.py", "--task", "k5-tiny-t2v", "--dit", dit),
        *("--dataset_config", dataset, "--output_name", "lora", "--output_dir", output),
        *("--network_dim", 4, "--network_alpha", 4, "--seed", 3, "--learning_rate", 1e-3),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 5.0, "--max_data_loader_n_workers", 0),
        *("--gradient_accumulation_steps", 3, *OPTIONS, *extra),
    )
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", WORD: word}
    subprocess.run([str(word) for word in words], check=True, timeout=300, env=environment)


def rank_records(output: Path, rank: int) -> list[dict[str, Any]]:
    lines = (output / f"ranks/{rank}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.mark.parametrize("memory", [(), SAVING_MEMORY], ids=["plain", "fp8, swap, checkpointing"])
def test_two_processes_train_as_one(
    memory: tuple[object, ...],
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    root: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The last step of an epoch is short: one process repeats a batch there at weight zero."""
    one, two = tmp_path / "one", tmp_path / "two"
    train(dit, dataset, one, "--gradient_accumulation_steps", 6, *OPTIONS, *memory)
    launch(dit, dataset, two, root, *memory)
    losses = [[record["loss"] for record in metrics(folder, "step")] for folder in (one, two)]
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-5)
    items = [[record["items"] for record in metrics(folder, "step")] for folder in (one, two)]
    assert any(len(step) < len(items[0][0]) for step in items[0])
    loras = [read_tensors(folder / "lora.safetensors")[0] for folder in (one, two)]
    torch.testing.assert_close(loras[1], loras[0], rtol=0, atol=1e-4)

    first, second = rank_records(two, 0), rank_records(two, 1)
    assert len(first) == STEPS
    for mine, other in zip(first, second, strict=True):
        for field in ("step", "loss", "gradient norm", "learning rates", "LoRA", "optimizer"):
            assert mine[field] == other[field], f"step {mine['step']}: {field}"

    state = two / "lora-state"
    lora_size = (state / "lora.safetensors").stat().st_size
    size = sum(path.stat().st_size for path in state.iterdir())
    assert size <= 4 * lora_size
    names = set(read_header(state / "lora.safetensors").tensors)
    assert all("lora_" in name for name in names)
    difference = max(abs(a - b) for a, b in zip(*losses, strict=True))
    with capsys.disabled():
        print(
            f"\n{' '.join(map(str, memory)) or 'plain'}: {STEPS} steps of 2 processes x 3 batches against "
            f"1 x 6: largest difference of a loss {difference:.1e}; LoRA and optimizer equal on both in "
            f"{len(first)} of {STEPS} steps; state {size} bytes, "
            f"{size / lora_size:.2f} times the LoRA in float32"
        )


def test_two_processes_resume_as_if_they_had_not_stopped(
    dit: Path, dataset: Path, tmp_path: Path, root: Path
) -> None:
    launch(dit, dataset, tmp_path / "whole", root)
    output = tmp_path / "parts"
    launch(dit, dataset, output, root, word="stop")
    parts = [rank_records(output, rank) for rank in (0, 1)]
    assert [len(records) for records in parts] == [1, 1]
    launch(dit, dataset, output, root, "--resume", "auto")
    for rank in (0, 1):
        assert [*parts[rank], *rank_records(output, rank)] == rank_records(tmp_path / "whole", rank)
