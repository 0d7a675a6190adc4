"""An option that changes nothing beside the others says so, once, and is silent where it acts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from kandinsky5.cli.train import parse_train
from kandinsky5.cli.without_effect import (
    COMPILE_RULES,
    NABLA_RULES,
    OPTIMIZER_RULES,
    TASK_RULES,
    TIMESTEP_RULES,
    TRAIN_RULES,
    WEIGHT_RULES,
)
from kandinsky5.configs.train import ShowTimestepsConfig, TrainConfig
from kandinsky5.training.checks import log_notes, machine_notes
from kandinsky5.training.results.saved_config import write_config
from kandinsky5_train_network import main
from tests.kandinsky5.training.training_runs import SMALLER, exit_code, train, write_word_while_loading

pytestmark = pytest.mark.fast

BASE = ("--task", "k5-tiny-t2v", "--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "name")
RULES = (
    *TIMESTEP_RULES,
    *OPTIMIZER_RULES,
    *TRAIN_RULES,
    *WEIGHT_RULES,
    *COMPILE_RULES,
    *NABLA_RULES,
    *TASK_RULES,
)


@dataclass(frozen=True)
class Example:
    """An option with a value, beside words that make it ineffective, and beside words that let it act."""

    option: str
    value: str
    without_effect: tuple[str, ...]
    """One set of words for every rule that names the option."""
    acts: str | None
    """None where nothing does."""

    @property
    def words(self) -> list[str]:
        return [f"--{self.option}", *self.value.split()]


_SCHEDULE_FREE = "--optimizer_type schedulefree.AdamWScheduleFree"
_ADAFACTOR = "--optimizer_type AdaFactor"
_FIXED = "--optimizer_type AdaFactor --optimizer_args relative_step=False"
_CUSTOM = "--lr_scheduler_type StepLR"
_I2V, _NABLA = "--task k5-tiny-i2v", "--task k5-tiny-nabla"
_NO_SCHEDULE = (_SCHEDULE_FREE, _ADAFACTOR)
_NO_NAMED = (*_NO_SCHEDULE, _CUSTOM)
_WSD = "--lr_scheduler warmup_stable_decay"
_PROMPTS = "--sample_prompts p.txt --sample_at_first"

EXAMPLES = [
    Example("discrete_flow_shift", "5", ("", "--timestep_sampling flux_shift"), "--timestep_sampling shift"),
    Example(
        "sigmoid_scale", "2", ("--timestep_sampling uniform", "", "--timestep_sampling logsnr"),
        "--timestep_sampling qwen_shift",
    ),
    Example("weighting_scheme", "logit_normal", ("--timestep_sampling shift",), ""),
    Example("weighting_scheme", "mode", ("--timestep_sampling logsnr",), "--timestep_sampling sigma"),
    Example(
        "logit_mean", "1", ("", "--timestep_sampling qinglong_qwen"), "--weighting_scheme logit_normal"
    ),
    Example("logit_std", "2", ("--timestep_sampling shift",), "--timestep_sampling qinglong_flux"),
    Example("mode_scale", "1", ("", "--weighting_scheme logit_normal"), "--weighting_scheme mode"),
    Example("preserve_distribution_shape", "", ("",), "--min_timestep 100"),
    Example("lr_scheduler", "cosine", _NO_NAMED, ""),
    Example("lr_scheduler_type", "StepLR", _NO_SCHEDULE, ""),
    Example("lr_scheduler_args", "x=1", _NO_SCHEDULE, _CUSTOM),
    Example(
        "lr_warmup_steps", "2",
        ("", f"{_SCHEDULE_FREE} --lr_scheduler cosine", f"{_ADAFACTOR} --lr_scheduler adafactor", _CUSTOM,
         "--lr_scheduler piecewise_constant"),
        "--lr_scheduler rex",
    ),
    Example("lr_decay_steps", "2", (*_NO_NAMED, "--lr_scheduler cosine"), _WSD),
    Example(
        "lr_scheduler_num_cycles", "3", (*_NO_NAMED, "--lr_scheduler linear", _WSD),
        f"{_WSD} --lr_decay_steps 10%",
    ),
    Example("lr_scheduler_power", "2", (*_NO_NAMED, "--lr_scheduler linear"), "--lr_scheduler polynomial"),
    Example("lr_scheduler_timescale", "9", (*_NO_NAMED, "--lr_scheduler rex"), "--lr_scheduler inverse_sqrt"),
    Example(
        "lr_scheduler_min_lr_ratio", "0.1", (*_NO_NAMED, "--lr_scheduler cosine", _WSD),
        "--lr_scheduler cosine_with_min_lr",
    ),
    Example("lr_scheduler_min_lr_ratio", "0.1", (_WSD,), f"{_WSD} --lr_warmup_steps 2"),
    Example("learning_rate", "5e-3", (_ADAFACTOR,), _FIXED),
    Example("network_args", "loraplus_lr_ratio=4", (_ADAFACTOR,), _FIXED),
    Example("network_args", "conv_dim=4", ("",), None),
    Example("network_args", "conv_alpha=4", ("",), None),
    Example("i2v_mode", "first_last", ("",), _I2V),
    Example("i2v_conditioning", "channels", ("",), _I2V),
    Example("visual_cond_prob", "0.5", ("",), _I2V),
    Example("nabla_method", "topk", ("",), _NABLA),
    Example("nabla_P", "0.5", ("",), "--force_nabla_attention"),
    *(
        Example(f"nabla_{name}", "5", ("", f"{_NABLA} --no_nabla_add_sta"), _NABLA)
        for name in ("wT", "wH", "wW")
    ),
    Example("nabla_add_sta", "", ("",), _NABLA),
    Example("force_nabla_attention", "", (_NABLA,), ""),
    Example("fp8_fast", "", ("", "--int8_base"), "--fp8_base"),
    Example("int8_fast", "", ("", "--fp8_base"), "--int8_base"),
    Example("no_int8_rotation", "", ("", "--int8_base", "--fp8_base --fp8_fast"), "--int8_base --int8_fast"),
    *(
        Example(name, value, ("",), "--compile")
        for name, value in (
            ("compile_backend", "eager"),
            ("compile_mode", "max-autotune-no-cudagraphs"),
            ("compile_dynamic", "auto"),
            ("compile_fullgraph", ""),
            ("compile_cache_size_limit", "9"),
        )
    ),
    *(
        Example(name, value, ("",), "--dynamo_backend inductor")
        for name, value in (
            ("dynamo_mode", "max-autotune-no-cudagraphs"),
            ("dynamo_fullgraph", ""),
            ("dynamo_dynamic", ""),
        )
    ),
    Example("gradient_checkpointing_cpu_offload", "", ("",), "--gradient_checkpointing"),
    Example("gradient_checkpointing_keep_attention", "2", ("",), "--gradient_checkpointing"),
    Example("mask_min_weight", "0.5", ("",), "--masked_loss"),
    Example("dim_from_weights", "", ("",), "--network_weights a.safetensors"),
    *(
        Example(name, "2", ("",), "--validation_split 0.1")
        for name in ("validate_every_n_steps", "validate_every_n_epochs")
    ),
    Example("resume_from_huggingface", "", ("",), "--resume me/it/state"),
    Example("mixed_precision", "bf16", ("--dit_dtype fp32",), ""),
    Example(
        "compile_mode", "max-autotune-no-cudagraphs", ("--compile --compile_backend eager",),
        "--compile --compile_backend inductor",
    ),
    Example(
        "dynamo_mode",
        "max-autotune-no-cudagraphs",
        ("--dynamo_backend eager",),
        "--dynamo_backend inductor",
    ),
    Example("lora_allow_partial", "", ("",), "--network_weights a.safetensors"),
    Example("lora_allow_partial", "", ("",), "--base_weights a.safetensors"),
    *(
        Example(name, value, ("",), acts)
        for name, value in (("use_pinned_memory_for_block_swap", ""), ("block_swap_ring_size", "4"))
        for acts in ("--blocks_to_swap 1 --gradient_checkpointing", "--vram_budget 20")
    ),
    Example("network_dim", "6", ("--dim_from_weights --network_weights a.safetensors",), ""),
    Example("network_alpha", "6", ("--dim_from_weights --network_weights a.safetensors",), ""),
    Example("max_train_steps", "50", ("--max_train_epochs 1",), ""),
    Example("allow_changed_data", "", ("",), "--resume auto"),
    Example("overwrite", "", ("--resume auto",), ""),
    *(
        example
        for unit in ("epochs", "steps")
        for every in (f"--save_every_n_{unit} 1",)
        for example in (
            Example(f"save_last_n_{unit}", "2", ("", "--save_state"), every),
            Example(f"save_last_n_{unit}_state", "2", (every, "--save_state"), f"{every} --save_state"),
        )
    ),
    Example("training_comment", "x", ("--no_metadata",), ""),
    Example("log_prefix", "x", ("", "--log_with wandb --logging_dir l"), "--logging_dir l"),
    Example("log_tracker_config", "trackers.toml", ("",), "--log_with wandb"),
    Example("wandb_run_name", "x", ("", "--logging_dir l"), "--log_with wandb"),
    Example("wandb_api_key", "x", ("",), "--log_with wandb"),
    Example("log_tracker_name", "x", ("",), "--log_with wandb"),
    Example("huggingface_token", "x", ("",), "--huggingface_repo_id me/it"),
    Example("huggingface_token", "x", ("",), "--resume_from_huggingface --resume me/it/state"),
    Example("huggingface_repo_type", "dataset", ("",), "--huggingface_repo_id me/it"),
    Example("huggingface_repo_visibility", "public", ("",), "--huggingface_repo_id me/it"),
    Example("huggingface_path_in_repo", "x", ("",), "--huggingface_repo_id me/it"),
    Example("save_state_to_huggingface", "", ("",), "--huggingface_repo_id me/it"),
    Example("async_upload", "", ("",), "--huggingface_repo_id me/it"),
    Example("sample_every_n_steps", "2", ("",), _PROMPTS),
    Example("sample_every_n_epochs", "2", ("",), _PROMPTS),
    Example("sample_at_first", "", ("",), "--sample_prompts p.txt"),
    Example("prompt_templates", "t.json", ("",), _PROMPTS),
    Example("vae", "x", ("",), _PROMPTS),
    Example("text_encoder_qwen", "x", ("",), _PROMPTS),
    Example("text_encoder_clip", "x", ("",), _PROMPTS),
    Example("vae_dtype", "fp32", ("",), _PROMPTS),
    Example("fp8_llm", "", ("",), _PROMPTS),
    Example("quantized_qwen", "", ("",), _PROMPTS),
    Example("offload_dit_during_sampling", "", ("",), _PROMPTS),
]  # fmt: skip


def parse(*words: object) -> TrainConfig:
    config = parse_train([*BASE, *map(str, words)])
    assert isinstance(config, TrainConfig)
    return config


def no_effect_lines(config: TrainConfig) -> list[str]:
    return [note for note in config.notes if "has no effect" in note]


@pytest.fixture
def trackers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The file that an example names."""
    monkeypatch.chdir(tmp_path)
    Path("trackers.toml").write_text('[wandb]\nentity = "me"\n', encoding="utf-8")


@pytest.mark.usefixtures("trackers")
@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: f"{example.option} {example.value}")
def test_an_option_without_effect_gets_one_line_and_one_that_acts_none(example: Example) -> None:
    for beside in example.without_effect:
        before = no_effect_lines(parse(*beside.split()))
        with_it = no_effect_lines(parse(*beside.split(), *example.words))
        (line,) = [line for line in with_it if line not in before]
        assert line.startswith(f"--{example.option} ")
    acts = [] if example.acts is None else [*example.words, *example.acts.split()]
    lines = no_effect_lines(parse(*acts))
    assert not [line for line in lines if line.startswith(f"--{example.option} ")]


@pytest.mark.usefixtures("trackers")
def test_every_rule_and_every_option_in_it_has_an_example() -> None:
    """So a rule that never holds is found, and an option that is misspelt in one."""
    lines = {
        line
        for example in EXAMPLES
        for beside in example.without_effect
        for line in no_effect_lines(parse(*beside.split(), *example.words))
    }
    expected = {(name, rule.why) for rule in RULES for name in rule.options}
    assert not [pair for pair in expected if f"--{pair[0]} has no effect: {pair[1]}" not in lines]


def test_defaults_are_never_logged_as_without_effect(tmp_path: Path) -> None:
    first = parse("--timestep_sampling", "uniform")
    write_config(tmp_path / "c.toml", first, {"mixed_precision": "no", "seed": 1})
    again = parse("--config_file", tmp_path / "c.toml")
    assert not no_effect_lines(first)
    assert not no_effect_lines(again)


def test_an_option_of_a_configuration_file_without_effect_is_logged(tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("discrete_flow_shift = 5.0\n", encoding="utf-8")
    (line,) = no_effect_lines(parse("--config_file", tmp_path / "c.toml"))
    assert line == "--discrete_flow_shift has no effect: it applies to --timestep_sampling shift"


def test_the_plot_of_timesteps_tells_what_does_not_shape_it() -> None:
    config = parse_train(["--show_timesteps", "console", "--discrete_flow_shift", "5"])
    assert isinstance(config, ShowTimestepsConfig)
    assert [note.partition(" ")[0] for note in config.notes] == ["--discrete_flow_shift"]


def test_a_fall_without_a_length_is_pointed_out() -> None:
    words = ("--lr_scheduler", "warmup_stable_decay")
    assert any("never decays without --lr_decay_steps" in note for note in parse(*words).notes)
    assert not any("never decays" in note for note in parse(*words, "--lr_decay_steps", "5").notes)


_OF_CUDA = ("cuda_allow_tf32", "cuda_cudnn_benchmark", "no_probe", "use_pinned_memory_for_block_swap")


def test_options_of_other_machines_are_said_where_they_do_nothing() -> None:
    words = ["--ddp_timeout", "5", "--ddp_static_graph", "--ddp_gradient_as_bucket_view"]
    words += [f"--{name}" for name in _OF_CUDA] + ["--blocks_to_swap", "1", "--gradient_checkpointing"]
    config = parse(*words)
    cpu, cuda = torch.device("cpu"), torch.device("cuda", 0)
    names = [note.partition(" ")[0] for note in machine_notes(config, 1, cpu)]
    ddp = ["--ddp_timeout", "--ddp_gradient_as_bucket_view", "--ddp_static_graph"]
    assert names == [*ddp, *(f"--{name}" for name in _OF_CUDA)]
    assert [note.partition(" ")[0] for note in machine_notes(config, 1, cuda)] == ddp
    assert not list(machine_notes(config, 2, cuda))
    assert not list(machine_notes(parse(), 1, cpu))


def test_a_run_logs_the_lines_and_answers_a_wish_for_samples(
    dit: Path,
    dataset: Path,
    tmp_path: Path,
    said: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    write_word_while_loading(tmp_path / "out", "sample", monkeypatch)
    words = (
        "--max_train_steps",
        1,
        "--ddp_timeout",
        5,
        "--sigmoid_scale",
        2,
        "--timestep_sampling",
        "logsnr",
    )
    train(dit, dataset, tmp_path / "out", *words)
    for part in ("--ddp_timeout has", "--sigmoid_scale has", "lora.control: sample has"):
        assert f"{part} no effect" in said.text
    said.clear()
    places = ("--dit", dit, "--dataset_config", dataset, "--output_dir", tmp_path / "dry", *SMALLER)
    main([str(word) for word in (*BASE, *places, *words, "--dry_run")])
    assert "--sigmoid_scale has no effect" in said.text


def test_a_schedule_nobody_knows_is_refused_beside_an_optimizer_that_needs_none(
    dit: Path, dataset: Path, tmp_path: Path
) -> None:
    words = ("--optimizer_type", "AdaFactor", "--lr_scheduler", "foo")
    assert exit_code(dit, dataset, tmp_path, *words) == 2


@pytest.mark.parametrize(
    ("task", "file", "words"),
    [
        ("k5-lite-t2v-5s-nocfg-sd", None, ("guidance is built", "5s-sd or --task k5-lite-t2v-5s-pretrain")),
        ("k5-lite-t2v-5s-distil-sd", None, ("sampling in 16 steps are", "--task k5-lite-t2v-5s-sd or")),
        ("k5-lite-t2v-10s-distil-sd", "my_copy.safetensors", ("my_copy", "--task k5-lite-t2v-10s-sd or")),
        ("k5-lite-t2v-5s-sd", "kandinsky5lite_t2v_distilled16steps_5s.safetensors", ("16 steps",)),
        ("k5-lite-t2v-10s-nocfg-sd", None, ()),  # whose preset names the SFT file
        ("k5-lite-t2v-10s-nocfg-sd", "kandinsky5lite_t2v_nocfg_10s.safetensors", ("guidance is built",)),
        ("k5-lite-t2v-5s-distil-sd", "kandinsky5lite_t2v_pretrain_5s.safetensors", ()),
        ("k5-pro-t2v-5s-sd", None, ()),
        ("k5-lite-t2v-5s-pretrain-sd", None, ()),
        ("k5-small-t2v", None, ()),
    ],
)  # fmt: skip
def test_training_on_a_distilled_checkpoint_begins_with_a_warning(
    task: str, file: str | None, words: tuple[str, ...], said: pytest.LogCaptureFixture
) -> None:
    config = parse("--task", task, *(() if file is None else ("--dit", file)))
    log_notes(config, 1, torch.device("cpu"))
    warnings = [record.getMessage() for record in said.records if record.levelname == "WARNING"]
    assert len(warnings) == bool(words)
    assert all(word in warnings[0] for word in words)
