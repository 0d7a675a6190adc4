"""Options that no other test needs: each changes what it says it changes."""

from __future__ import annotations

import datetime
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES, TrainConfig
from kandinsky5.model import compilation
from kandinsky5.model.nabla import make_plan, select_blocks
from kandinsky5.training import probe as memory_probe
from kandinsky5.training import setup as train_setup
from kandinsky5.training.loss.timesteps import loss_weight, sigma_at
from modules.lr_schedules import SCHEDULE_NAMES, multiplier
from modules.tensor_files import read_tensors, write_tensors
from tests.kandinsky5.training.training_runs import CLIPS, exit_code, train, write_dataset
from tests.tiny import tiny_dit

BASE = "--task k5-tiny-t2v --dataset_config d.toml --output_dir out --output_name name"


def parse(words: str) -> TrainConfig:
    config = parse_train([*BASE.split(), *words.split()])
    assert isinstance(config, TrainConfig)
    return config


def test_the_dtype_of_the_model_wins_over_mixed_precision() -> None:
    cpu = torch.device("cpu")
    model = parse("--dit_dtype bf16 --mixed_precision no").model
    assert train_setup.training_dtype(model, cpu) == torch.bfloat16
    assert train_setup.training_dtype(parse("--mixed_precision no").model, cpu) == torch.float32


def test_weights_that_are_not_finite_are_loaded_when_told_not_to_look(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    """The run then ends at its first loss (6) and not while loading (4)."""
    tensors, metadata = read_tensors(dit)
    name = "visual_transformer_blocks.0.self_attention.to_query.weight"
    tensors[name][0, 0] = torch.nan
    broken = tmp_path / "broken.safetensors"
    write_tensors(broken, tensors, metadata)
    for words, code in (((), 4), (("--no_weight_check",), 6)):
        out = tmp_path / str(code)
        assert exit_code(broken, dataset, out, "--max_train_steps", 1, *words) == code


@pytest.mark.parametrize(("words", "wants"), [("", True), ("--no_probe", False)])
def test_the_probe_of_the_largest_batch_can_be_left_out(words: str, wants: bool) -> None:
    config = parse(words)
    assert memory_probe.is_due(config.run, torch.device("cuda")) == wants
    assert not memory_probe.is_due(config.run, torch.device("cpu"))


def test_settings_of_several_processes_reach_their_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []

    def accelerator(*, kwargs_handlers: list[Any], **_settings: Any) -> Any:
        handlers[:] = kwargs_handlers
        return SimpleNamespace(num_processes=1)

    monkeypatch.setattr(train_setup, "Accelerator", accelerator)
    train_setup.build_accelerator(parse("--ddp_timeout 5 --ddp_gradient_as_bucket_view --ddp_static_graph"))
    wrapper, group = handlers
    assert (wrapper.gradient_as_bucket_view, wrapper.static_graph) == (True, True)
    assert group.timeout == datetime.timedelta(minutes=5)
    train_setup.build_accelerator(parse(""))
    (wrapper,) = handlers
    assert (wrapper.gradient_as_bucket_view, wrapper.static_graph) == (False, False)


@pytest.fixture
def cuda_switches() -> Iterator[None]:
    """Puts back what a run sets for the whole process."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark
    yield
    torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark = before


@pytest.mark.usefixtures("cuda_switches")
@pytest.mark.parametrize("is_on", [True, False])
def test_arithmetic_of_cuda_is_switched_for_the_run(
    is_on: bool, dit: Path, dataset: Path, tmp_path: Path
) -> None:
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.benchmark = not is_on
    words = ("--cuda_allow_tf32", "--cuda_cudnn_benchmark") if is_on else ()
    train(dit, dataset, tmp_path, "--max_train_steps", 1, *words)
    assert (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.benchmark) == (is_on, is_on)


@pytest.mark.parametrize(
    ("words", "dynamic"),
    [
        ("--compile", True),
        ("--compile --compile_dynamic true", True),
        ("--compile --compile_dynamic false", False),
        ("--compile --compile_dynamic auto", None),
        ("--dynamo_backend eager --dynamo_dynamic", True),
    ],
)
def test_settings_of_the_compiler_reach_it(
    words: str, dynamic: bool | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = parse(words).model.compile
    assert config is not None
    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(torch, "compile", lambda forward, **settings: asked.append(settings) or forward)
    compilation.compile_blocks(tiny_dit(num_text_blocks=1, num_visual_blocks=1), config, torch.device("cpu"))
    assert [settings["dynamic"] for settings in asked] == [dynamic, dynamic]


def test_the_number_of_kept_graphs_is_set() -> None:
    config = parse("--compile --compile_cache_size_limit 77 --compile_backend eager").model.compile
    assert config is not None
    dit = tiny_dit(num_text_blocks=1, num_visual_blocks=1)
    with torch._dynamo.config.patch(recompile_limit=torch._dynamo.config.recompile_limit):
        compilation.compile_blocks(dit, config, torch.device("cpu"))
        assert torch._dynamo.config.recompile_limit == 77


def says_idle(option: str, config: TrainConfig) -> bool:
    return any(note.startswith(f"{option.split()[0]} has no effect") for note in config.notes)


_DECAY, _WARMUP = "--lr_decay_steps 20%", "--lr_warmup_steps 5"
_RULES = "--lr_scheduler_args step_rules='1:10,0.1'"


@pytest.mark.parametrize("schedule", SCHEDULE_NAMES)
@pytest.mark.parametrize("beside", ["", _DECAY, _WARMUP])
def test_a_detail_of_a_schedule_bends_its_curve_or_is_called_idle(schedule: str, beside: str) -> None:
    if schedule == "constant" and beside == _WARMUP:
        return  # refused
    rules = _RULES if schedule == "piecewise_constant" else ""

    def read(option: str) -> tuple[list[float], TrainConfig]:
        config = parse(f"--lr_scheduler {schedule} {rules} {beside} {option}")
        factor = multiplier(train_setup.schedule_settings(config.optimizer, 100))
        return [factor(step) for step in range(101)], config

    plain, _ = read("")
    details = ["--lr_scheduler_num_cycles 3", "--lr_scheduler_power 2", "--lr_scheduler_timescale 9"]
    details += ["--lr_scheduler_min_lr_ratio 0.1"] + [_DECAY] * (beside != _DECAY)
    details += [_WARMUP] * (beside != _WARMUP and schedule != "constant")
    for detail in details:
        curve, config = read(detail)
        assert (curve == plain) == says_idle(detail, config), detail


@pytest.mark.parametrize("mode", TIMESTEP_SAMPLINGS)
@pytest.mark.parametrize("scheme", WEIGHTING_SCHEMES)
def test_a_detail_of_a_distribution_moves_its_draws_or_is_called_idle(mode: str, scheme: str) -> None:
    def read(words: str) -> tuple[list[float], TrainConfig]:
        config = parse(f"--timestep_sampling {mode} {words}")
        places = [(u, branch) for u in (0.1, 0.3, 0.8) for branch in (0.1, 0.85, 0.97)]
        drawn = [sigma_at(config.timesteps, u, (64, 64), branch=branch) for u, branch in places]
        return drawn + loss_weight(config.timesteps, torch.tensor(drawn)).tolist(), config

    chosen = f"--weighting_scheme {scheme}"
    plain, config = read(chosen)
    if scheme != "none":
        assert (plain == read("")[0]) == says_idle(chosen, config)
    details = ("--discrete_flow_shift 5", "--sigmoid_scale 2", "--mode_scale 0.5")
    for detail in (*details, "--logit_mean 1", "--logit_std 2"):
        drawn, config = read(f"{chosen} {detail}")
        assert (drawn == plain) == says_idle(detail, config), detail


@pytest.mark.parametrize(
    ("words", "is_more"),
    [
        ("--nabla_P 0.99 --no_nabla_add_sta", True),
        ("--nabla_method topk --nabla_P 2 --no_nabla_add_sta", False),
        ("--nabla_method topk --nabla_P 99 --no_nabla_add_sta", True),
        ("--nabla_P 0.01 --nabla_add_sta --nabla_wT 1 --nabla_wH 1 --nabla_wW 5", True),
    ],
)
def test_details_of_sparse_attention_choose_other_blocks(words: str, is_more: bool) -> None:
    def chosen(given: str) -> int:
        params = parse(f"--force_nabla_attention {given}").model.nabla
        assert params is not None
        query, key = torch.randn(2, 1, 2 * 16 * 16, 1, 8, generator=torch.Generator().manual_seed(0))
        return int(select_blocks(query, key, make_plan((2, 16, 16), params, "cpu")).sum())

    little = "--nabla_P 0.5 --no_nabla_add_sta" if "topk" in words else "--nabla_P 0.01 --no_nabla_add_sta"
    assert (chosen(words) > chosen(little)) == is_more
    assert chosen(words) != chosen(little)


def test_epochs_and_their_states_are_kept_for_as_long_as_asked(dit: Path, tmp_path: Path) -> None:
    dataset = write_dataset(tmp_path / "data", CLIPS[:1])
    words = ("--max_train_epochs", 4, "--save_every_n_epochs", 1, "--save_state", "--save_last_n_epochs", 1)
    for folder, more, states in (("a", (), [3]), ("b", ("--save_last_n_epochs_state", 2), [2, 3])):
        train(dit, dataset, tmp_path / folder, *words, *more)
        names = {path.name for path in (tmp_path / folder).glob("lora-0*")}
        loras = {name for name in names if name.endswith(".safetensors")}
        assert loras == {"lora-000003.safetensors"}
        assert {name for name in names if name.endswith("-state")} == {f"lora-{e:06d}-state" for e in states}


def test_the_folder_of_curves_begins_as_asked(dit: Path, dataset: Path, tmp_path: Path) -> None:
    words = ("--max_train_steps", 1, "--logging_dir", tmp_path / "logs", "--log_prefix", "mine_")
    train(dit, dataset, tmp_path / "out", *words)
    (folder,) = (tmp_path / "logs").iterdir()
    assert folder.name.startswith("mine_2")
