"""--dry_run, --vram_budget, the probe before the first step, and what is said when memory runs out."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kandinsky5.training.trainer as training
from dataset.cache.cached_dataset import CachedBatch, CachedDataset
from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import ModelConfig, TrainConfig
from kandinsky5.memory import report
from kandinsky5.memory.activations import BatchShape
from kandinsky5.memory.advice import helping_options
from kandinsky5.memory.bases import suitable_base
from kandinsky5.memory.budget import Choice, added_options, choose, with_reserve
from kandinsky5.memory.plan import MemoryPlan, MemoryUsage, TrainingPlanner
from kandinsky5.model import assembly
from kandinsky5.model.offload import max_blocks_to_swap
from kandinsky5.tasks import PRO_PARAMS
from kandinsky5.training import memory as train_memory
from kandinsky5.training import probe as memory_probe
from kandinsky5.training.loss.objective import NoiseDraw, Objective
from modules.byte_sizes import GIB
from modules.errors import ConfigError
from networks.lora import LoRANetwork
from tests.kandinsky5.training.training_runs import lora_bytes, train, write_dataset, write_dit
from tests.sparse_models import write_sparse_dit

FLOAT8 = suitable_base(None)
SHORT = BatchShape(clips=1, latent_frames=5, latent_height=64, latent_width=64, text_tokens=256)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("memory options")
    return write_dit(folder), write_dataset(folder)


@pytest.fixture(scope="module")
def pro(tmp_path_factory: pytest.TempPathFactory) -> TrainingPlanner:
    """The planner of a run on Pro with rank 32, whose file is a header and no data."""
    dit = write_sparse_dit(tmp_path_factory.mktemp("pro") / "pro.safetensors", PRO_PARAMS)
    words = ["--task", "k5-pro-t2v-5s-sd", "--dit", str(dit), "--dataset_config", "x", "--output_dir", "x"]
    config = parse_train([*words, "--output_name", "x", "--network_dim", "32", "--mixed_precision", "bf16"])
    assert isinstance(config, TrainConfig)
    return TrainingPlanner(config, torch.device("cuda"), torch.bfloat16)


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[pytest.LogCaptureFixture]:
    logger = logging.getLogger("k5")
    caplog.set_level(logging.INFO, logger="k5")
    logger.addHandler(caplog.handler)
    yield caplog
    logger.removeHandler(caplog.handler)


def test_a_dry_run_prints_the_plan_and_writes_nothing(
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(training, "Trainer", None)  # nothing is loaded or built
    before = sorted(path for path in files[1].parent.rglob("*"))
    with pytest.raises(FileNotFoundError):  # the helper looks for metrics
        train(*files, tmp_path / "out", "--dry_run")
    printed = capsys.readouterr().out
    assert re.search(r"32x32x5 +1 +8 ", printed)
    assert re.search(r"64x16x9 +1 +12 ", printed)
    assert re.search(r"predicted peak: [1-9]\d*\.\d\d MiB on the device, 0\.50 GiB with reserve", printed)
    assert "memory in MiB" in printed
    assert not (tmp_path / "out").exists()
    assert sorted(path for path in files[1].parent.rglob("*")) == before


def test_a_dry_run_refuses_what_the_run_would_refuse(
    files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "lora.safetensors").write_bytes(b"")
    (tmp_path / "file").write_bytes(b"")
    for words, output, code, message in (
        (("--gradient_checkpointing", "--blocks_to_swap", 9), tmp_path / "a", 2, "at most 0"),
        ((), tmp_path, 2, "lora.safetensors has no metadata"),
        ((), tmp_path / "file" / "out", 5, "is a file; name a folder"),
        (("--network_weights", tmp_path / "none"), tmp_path / "b", 4, "no such file or folder"),
        (("--vram_budget", 2000), tmp_path / "c", 2, "must lie within 1 .. 1024"),
    ):
        with pytest.raises(SystemExit) as stop:
            train(*files, output, "--dry_run", *words)
        assert stop.value.code == code, words
        assert message in capsys.readouterr().err


def test_a_budget_that_already_fits_adds_nothing(
    files: tuple[Path, Path], tmp_path: Path, said: pytest.LogCaptureFixture
) -> None:
    plain, budgeted = tmp_path / "plain", tmp_path / "budget"
    # The plan is for a card, where a fused step and one on all tensors at once exclude each other.
    words = ("--optimizer_type", "AdamW", "--optimizer_args", "fused=True")
    train(*files, plain, "--max_train_steps", 1, *words)
    train(*files, budgeted, "--max_train_steps", 1, "--vram_budget", 24, *words)
    assert "--vram_budget 24: nothing to add" in said.text
    assert lora_bytes(plain / "lora.safetensors") == lora_bytes(budgeted / "lora.safetensors")


def test_a_resumed_run_compares_what_its_budget_chose(
    files: tuple[Path, Path],
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def chosen(planner: TrainingPlanner, batch: BatchShape, budget: int, _: tuple[str, ...]) -> Choice:
        given = planner.config.model
        model = replace(given, fp8_base=budget < 16 * GIB)
        return Choice(model, planner.plan(model, batch), added_options(given, model))

    monkeypatch.setattr(train_memory, "choose", chosen)
    words = ("--save_state", "--resume", "auto", "--max_train_steps")
    train(*files, tmp_path, *words, 1, "--vram_budget", 12)
    train(*files, tmp_path, *words, 2, "--vram_budget", 8)
    assert "--vram_budget 8: --fp8_base (largest" in said.text
    assert "changes from" not in said.text  # neither the budget nor what it chose is another run's
    train(*files, tmp_path, *words, 3, "--vram_budget", 16)
    assert "--fp8_base changes from True to False" in said.text
    assert "--vram_budget changes" not in said.text


@pytest.mark.parametrize(
    ("budget", "wanted"),
    [
        (1000, ()),
        (48, ("--gradient_checkpointing",)),
        pytest.param(24, ("--fp8_base", "--gradient_checkpointing"), marks=pytest.mark.slow),
        pytest.param(
            16, ("--fp8_base", "--gradient_checkpointing", "--blocks_to_swap"), marks=pytest.mark.slow
        ),
    ],
)
def test_the_budget_adds_the_cheapest_options_that_fit(
    pro: TrainingPlanner, budget: int, wanted: tuple[str, ...]
) -> None:
    choice = choose(pro, SHORT, budget * GIB, FLOAT8)
    assert with_reserve(choice.plan.peak) <= budget * GIB
    words = " ".join(choice.added).split()
    assert [word for word in words if word.startswith("--")][: len(wanted)] == list(wanted)
    if budget >= 48:
        assert len(words) == len(wanted)
    if "--blocks_to_swap" in words:  # one block less does not fit
        fewer = replace(choice.options, blocks_to_swap=choice.options.blocks_to_swap - 1)
        assert with_reserve(pro.plan(fewer, SHORT).peak) > budget * GIB


def test_the_budget_keeps_what_was_given(pro: TrainingPlanner) -> None:

    given = replace(pro.config.model, gradient_checkpointing=True, blocks_to_swap=40)
    planner = TrainingPlanner(replace(pro.config, model=given), pro.device, pro.dtype)
    choice = choose(planner, SHORT, 24 * GIB, FLOAT8)
    assert choice.options.blocks_to_swap == 40
    assert not any("blocks_to_swap" in words for words in choice.added)


def test_of_two_ways_to_fit_the_budget_takes_the_one_that_moves_less(pro: TrainingPlanner) -> None:
    """Whatever host memory each takes: it is rounded, and an optimizer may lie there too."""

    class Planned(TrainingPlanner):
        def plan(self, options: ModelConfig, job: BatchShape) -> MemoryPlan:
            swaps, offloads = options.blocks_to_swap, options.gradient_checkpointing_cpu_offload
            usage = MemoryUsage(
                device={"all": GIB if swaps or offloads else 99 * GIB},
                pinned={"blocks": 8 * GIB if swaps else 0, "activations": 6 * GIB if offloads else 0},
                moved={"blocks": 4 * GIB if swaps else 0, "activations": 5 * GIB if offloads else 0},
            )
            return MemoryPlan(shape=job, usage=usage, flops=0, video_tokens=1)

    choice = choose(Planned(pro.config, pro.device, pro.dtype), SHORT, 24 * GIB, FLOAT8)
    assert choice.added == ("--fp8_base", "--gradient_checkpointing", "--blocks_to_swap 1")


@pytest.mark.slow
def test_a_budget_nothing_fits_into_is_refused_with_the_smallest_peak(pro: TrainingPlanner) -> None:
    with pytest.raises(ConfigError) as caught:
        choose(pro, SHORT, 4 * GIB, FLOAT8)
    message = str(caught.value)
    most = max_blocks_to_swap(PRO_PARAMS)
    assert f"--blocks_to_swap {most}" in message
    assert "--gradient_checkpointing_cpu_offload" in message
    assert re.search(r"the least it needs is \d+\.\d GiB", message)
    assert "fewer frames" in message


def test_a_run_with_the_probe_ends_in_the_same_bytes(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    options = ("--max_train_steps", 3, "--network_dropout", 0.3, "--gradient_checkpointing", "--save_state")
    train(*files, tmp_path / "plain", *options)
    plain = memory_probe.probe
    states: list[torch.Tensor] = []

    def watched(
        planner: TrainingPlanner, objective: Objective, network: LoRANetwork, data: CachedDataset, step: int
    ) -> str:
        before = [parameter.detach().clone() for parameter in network.parameters()]
        generator = torch.get_rng_state()
        result = plain(planner, objective, network, data, step)
        assert torch.equal(torch.get_rng_state(), generator)
        assert all(parameter.grad is None for parameter in network.parameters())
        assert all(map(torch.equal, before, network.parameters()))
        states.extend(before)
        return result

    monkeypatch.setattr(memory_probe, "probe", watched)
    monkeypatch.setattr(memory_probe, "is_due", lambda *_: True)
    train(*files, tmp_path / "probed", *options)
    assert states
    assert "probe of 1 x 64x16x9" in said.text
    names = [path.name for path in tmp_path.joinpath("plain").glob("*.safetensors")]
    assert names
    for name in names:
        assert lora_bytes(tmp_path / "plain" / name) == lora_bytes(tmp_path / "probed" / name)


def test_a_plan_that_needs_more_host_memory_than_there_is_is_a_warning_before_the_model_loads(
    files: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> None:
    """On a pretended GPU, as the planner needs none."""
    warn = train_memory.warn_of_host_memory
    seen: list[str] = []

    def as_on_a_gpu(planner: TrainingPlanner, data: CachedDataset, _: torch.device) -> None:
        planner = TrainingPlanner(planner.config, torch.device("cuda"), torch.bfloat16)
        warn(planner, data, planner.device)
        seen.append(said.text)

    monkeypatch.setattr(train_memory, "warn_of_host_memory", as_on_a_gpu)
    monkeypatch.setattr(assembly, "OFFLOADED_BYTES", 64)
    offload = ("--gradient_checkpointing", "--gradient_checkpointing_cpu_offload")
    monkeypatch.setattr(report, "available_memory", lambda: 1000)
    train(*files, tmp_path / "small", *offload, "--max_train_steps", 1)
    assert "Host memory: " in seen[0]
    assert "are planned (activations " in seen[0]
    assert "0.00 MiB of " in seen[0]
    assert "or no --gradient_checkpointing_cpu_offload" in seen[0]
    said.clear()
    monkeypatch.setattr(report, "available_memory", lambda: 2**40)
    train(*files, tmp_path / "large", *offload, "--max_train_steps", 1)
    monkeypatch.setattr(report, "available_memory", lambda: 1000)
    train(*files, tmp_path / "without", "--max_train_steps", 1)
    assert "Host memory: " not in said.text


def test_running_out_of_memory_tells_sizes_and_what_helps_most(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    draw = Objective.draw

    def run_out(self: Objective, batch: CachedBatch, step: int) -> NoiseDraw:
        if step == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return draw(self, batch, step)

    monkeypatch.setattr(Objective, "draw", run_out)
    options = ("--max_train_steps", 4, "--save_every_n_steps", 1, "--save_state")
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path, *options)
    assert stop.value.code == 5
    message = capsys.readouterr().err
    assert "out of device memory in step 3: CUDA out of memory. Tried to allocate 2.00 GiB." in message
    assert re.search(r"1 clip\(s\) of \d frames, \d+ x \d+ pixels, \d+ video tokens", message)
    assert "--gradient_checkpointing: " in message
    assert "--resume auto" in message
    assert json.loads((tmp_path / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[0])
    assert list(tmp_path.glob("*state*"))


def test_a_probe_that_runs_out_of_memory_ends_the_run_before_the_first_step(
    files: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def run_out(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(Objective, "training_losses", run_out)
    monkeypatch.setattr(memory_probe, "is_due", lambda *_: True)
    with pytest.raises(SystemExit) as stop:
        train(*files, tmp_path, "--max_train_steps", 1)
    assert stop.value.code == 5
    message = capsys.readouterr().err
    assert "in the probe before the first step" in message
    assert "of 9 frames, 64 x 16 pixels" in message


@pytest.mark.slow
def test_the_three_options_that_help_most_are_not_yet_in_use(pro: TrainingPlanner) -> None:
    plain = helping_options(pro, SHORT)
    assert len(plain) == 3
    assert plain[0][0].startswith("--gradient_checkpointing --blocks_to_swap")
    assert [saved for _, saved in plain] == sorted((saved for _, saved in plain), reverse=True)

    given = replace(pro.config.model, gradient_checkpointing=True, fp8_base=True, blocks_to_swap=60)
    used = TrainingPlanner(replace(pro.config, model=given), pro.device, pro.dtype)
    words = [words for words, _ in helping_options(used, replace(SHORT, clips=2))]
    assert words[0] in ("batch_size = 1 in the dataset file", "--gradient_checkpointing_cpu_offload")
    assert not any("fp8" in word or "swap 60" in word for word in words)
