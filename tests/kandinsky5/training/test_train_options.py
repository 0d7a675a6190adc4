"""The training command line: what is refused, what wins, and that it never waits for torch."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky5.cli.train import IGNORED, build_parser, parse_train
from kandinsky5.configs.attention import NablaOptions
from kandinsky5.configs.compilation import CompileConfig, DynamoOptions
from kandinsky5.configs.text_encoders import QwenOptions
from kandinsky5.configs.train import ShowTimestepsConfig, TrainConfig
from kandinsky5_train_network import main
from modules.attention_backends import ATTENTION_BACKENDS
from modules.errors import ConfigError
from modules.options import options_of

pytestmark = pytest.mark.fast

BASE = ["--task", "k5-tiny-t2v", "--dataset_config", "d.toml", "--output_dir", "out", "--output_name", "name"]

# The training command of the user guide, with its placeholders.
GUIDE = """--mixed_precision bf16 --dataset_config path/to/dataset.toml --task k5-pro-t2v-5s-sd
--dit path/to/kandinsky5pro_t2v_pretrain_5s.safetensors --text_encoder_qwen Qwen/Qwen2.5-VL-7B-Instruct
--text_encoder_clip openai/clip-vit-large-patch14 --vae path/to/vae/diffusion_pytorch_model.safetensors
--fp8_base --sdpa --gradient_checkpointing --max_data_loader_n_workers 1 --persistent_data_loader_workers
--learning_rate 1e-4 --optimizer_type AdamW8Bit --optimizer_args weight_decay=0.001 betas=(0.9,0.95)
--max_grad_norm 1.0 --lr_scheduler constant_with_warmup --lr_warmup_steps 100
--network_module networks.lora_kandinsky --network_dim 32 --network_alpha 32 --timestep_sampling shift
--discrete_flow_shift 5.0 --output_dir path/to/output --output_name k5_lora --save_every_n_epochs 1
--max_train_epochs 50 --scheduler_scale 10.0"""


def parse(*words: str) -> TrainConfig:
    config = parse_train([*BASE, *words])
    assert isinstance(config, TrainConfig)
    return config


def problems_of(*words: str) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        parse_train(list(words))
    return caught.value.problems


def test_the_guides_command_is_taken_as_it_stands() -> None:
    config = parse_train(GUIDE.split())
    assert isinstance(config, TrainConfig)
    assert config.optimizer.optimizer_args == {"weight_decay": 0.001, "betas": (0.9, 0.95)}
    assert config.run.max_train_epochs == 50
    assert config.model.fp8_base
    assert config.timesteps.discrete_flow_shift == 5.0


def test_help_knows_every_option_and_needs_no_torch(root: Path) -> None:
    code = (
        "import sys; from kandinsky5_train_network import main\n"
        "try: main(['--help'])\nexcept SystemExit: assert 'torch' not in sys.modules"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=root, check=True, capture_output=True, text=True
    )
    for word in GUIDE.split():
        assert not word.startswith("--") or word in result.stdout


def test_everything_wrong_is_said_at_once() -> None:
    problems = problems_of(
        "--task", "k5-pro", "--flash_attn", "--sdpa", "--optimizer_args", "x", "--log_with", "all"
    )
    text = "\n".join(problems)
    expected = (
        "--dataset_config is required",
        "--output_name is required",
        "only one attention",
        "unknown task",
    )
    for part in (*expected, "name=value", "--log_with all requires --logging_dir"):
        assert part in text


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--mixed_precision", "fp16"], "fp16"),
        (["--lr_scheduler", "reduce_lr_on_plateau"], "use --lr_scheduler cosine"),
        (["--blocks_to_swap", "2"], "--gradient_checkpointing"),
        (["--base_weights_multiplier", "0.5"], "1 values for 0 files"),
        (["--network_module", "networks.other"], "networks.lora_kandinsky"),
        (["--override_dit", '{"depth": 3}'], "model_dim"),
        (["--override_dit", "{"], "not valid JSON"),
        (["--override_dit", "[]"], "a JSON object, got []"),
        (["--override_dit", '{"ff_dim": 0}'], "ff_dim must be a whole number above 0, got 0"),
        (["--override_dit", '{"axes_dims": [16, 24]}'], "axes_dims must be three whole numbers above 0"),
        (["--override_dit", '{"axes_dims": [15, 25, 24]}'], "must be even"),
        (["--override_dit", '{"model_dim": 100}'], "must divide model_dim 100"),
        (["--log_with", "all"], "--log_with all requires --logging_dir"),
        (["--network_module", "lycoris.kohya"], "use one of networks.lora_kandinsky"),
        (["--sage_attn"], "cannot train"),
        (["--min_timestep", "800", "--max_timestep", "200"], "below"),
        (["--output_name", "a/b"], "give the folder with --output_dir"),
        (["--nabla_P", "3", "--force_nabla_attention"], "at most 1"),
        (["--max_train_steps", "0"], "give a number of steps"),
        (["--fp8_base", "--int8_base"], "give only one of them"),
        (["--resume_from_huggingface", "--resume", "auto"], "--resume USER/REPO/PATH"),
        (["--optimizer_args", "eps=1e999"], "eps is no finite"),
        (["--optimizer_args", "betas=(0.9,1e999)"], "betas is no finite"),
        (["--network_args", "loraplus_lr_ratio=1e999"], "loraplus_lr_ratio is no finite"),
    ],
)
def test_what_cannot_work_is_refused_with_the_way_out(words: list[str], message: str) -> None:
    assert message in "\n".join(problems_of(*BASE, *words))


@pytest.mark.parametrize(
    "words",
    [
        ["--max_train_steps", "-1"],
        ["--mode_scale", "-3"],
        ["--num_timestep_buckets", "1"],
        ["--ema_decay", "1"],
        ["--seed", "9223372036854775808"],
        ["--learning_rate", "nan"],
        ["--max_train_step", "5"],
        ["--lr_warmup_steps", "150%"],
    ],
)
def test_wrong_words_and_abbreviations_end_with_code_2(words: list[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_train([*BASE, *words])
    assert caught.value.code == 2


@pytest.mark.parametrize("word", ["nan", "inf", "-inf", "1e999"])
def test_no_option_takes_a_number_that_is_not_finite(word: str) -> None:
    taken = []
    for action in build_parser()._actions:
        if action.type in (None, Path) or isinstance(action.type, str):
            continue
        try:
            value = action.type(word)
        except (ValueError, argparse.ArgumentTypeError):
            continue
        taken += [action.dest] if isinstance(value, float) else []
    assert not taken


def test_a_mistyped_option_gets_the_nearest_one(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        parse_train([*BASE, "--netwrok_dim", "4"])
    assert stop.value.code == 2
    assert capsys.readouterr().err.splitlines() == [
        "error: unrecognized arguments: --netwrok_dim 4; did you mean --network_dim?",
        "kandinsky5_train_network.py --help lists the options",
        "exit code 2",
    ]


def test_options_without_effect_are_said_in_the_log() -> None:
    notes = "\n".join(parse("--split_attn", "--vae", "x", "--nabla_wT", "3").notes)
    for part in ("--split_attn has no effect", "--vae has no effect: only used", "--nabla_wT has no effect"):
        assert part in notes


def test_untouched_defaults_get_one_hint_and_chosen_ones_none() -> None:
    assert any("--discrete_flow_shift 5.0" in note for note in parse().notes)
    assert not parse("--network_dim", "8").notes


def test_shares_of_the_run_are_told_from_step_counts() -> None:
    scheduler = ("--lr_scheduler", "cosine", "--lr_warmup_steps")
    assert [parse(*scheduler, word).optimizer.lr_warmup_steps for word in ("10%", "0.25", "7")] == [
        0.1,
        0.25,
        7,
    ]


def test_nabla_options_override_the_tasks() -> None:
    config = parse_train([*BASE, "--task", "k5-tiny-nabla", "--nabla_P", "0.5", "--no_nabla_add_sta"])
    assert isinstance(config, TrainConfig)
    assert config.model.nabla is not None
    assert (config.model.nabla.P, config.model.nabla.add_sta, config.model.nabla.wT) == (0.5, False, 3)


def test_a_configuration_file_gives_options_and_the_command_line_wins(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'task = "k5-tiny-t2v"\ndataset_config = "d.toml"\n[any]\noutput_dir = "o"\noutput_name = "n"\n'
        "network_dim = 8\nlearning_rate = 1e-4\ngradient_checkpointing = true\n"
        'optimizer_args = ["eps=1e-6"]\n',
        encoding="utf-8",
    )
    # The extension may be left out.
    config = parse_train(["--config_file", str(file.with_suffix("")), "--network_dim", "16"])
    assert isinstance(config, TrainConfig)
    assert (config.network.network_dim, config.optimizer.learning_rate) == (16, 1e-4)
    assert config.model.gradient_checkpointing
    assert config.optimizer.optimizer_args == {"eps": 1e-6}


def test_a_configuration_file_is_checked_like_the_command_line(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text(
        'netwrok_dim = 8\nsdpa = 1\nseed = true\ntask = ["a"]\nvae = "\\u0000"\nbase_weights = ["\\u0000"]\n',
        encoding="utf-8",
    )
    text = "\n".join(problems_of("--config_file", str(file)))
    for part in (
        "did you mean network_dim",
        "sdpa is a switch",
        "seed needs a value",
        "task takes one value",
        "vae: contains a NUL character",
        "base_weights: contains a NUL character",
    ):
        assert part in text
    assert "no such file" in problems_of("--config_file", str(tmp_path / "other"))[0]


@pytest.mark.parametrize(
    ("text", "add_sta"),
    [
        ("nabla_add_sta = false", False),
        ("no_nabla_add_sta = false", True),
        ("nabla_add_sta = false\nno_nabla_add_sta = true", False),
        ("nabla_add_sta = true", True),
    ],
)
def test_false_for_one_of_a_pair_of_switches_is_its_opposite(
    text: str, add_sta: bool, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    words = ("--task", "k5-tiny-nabla", "--config_file", str(tmp_path / "run.toml"))
    nabla = parse(*words).model.nabla
    assert nabla is not None
    assert nabla.add_sta == add_sta
    turned = parse(*words, "--no_nabla_add_sta" if add_sta else "--nabla_add_sta").model.nabla
    assert turned is not None
    assert turned.add_sta != add_sta, "the command line wins"


@pytest.mark.parametrize(
    ("text", "places"),
    [
        ("[a]\nseed = 1\n[b.c]\nseed = 2", ("seed under [a]", "seed under [b.c]")),
        ("seed = 1\n[a]\nseed = 1", ("seed and seed under [a]",)),
        ("nabla_add_sta = true\nno_nabla_add_sta = true", ("nabla_add_sta and no_nabla_add_sta",)),
    ],
)
def test_an_option_in_two_places_of_a_file_is_refused_with_both(
    text: str, places: tuple[str, ...], tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    (problem,) = problems_of(*BASE, "--config_file", str(tmp_path / "run.toml"))
    for place in places:
        assert place in problem


@pytest.mark.parametrize(("text", "is_shown"), [("true", True), ("false", False)])
def test_a_traceback_can_be_asked_for_in_the_file(
    text: str, is_shown: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.toml").write_text(f"[any]\ntraceback = {text}\n", encoding="utf-8")
    with pytest.raises(SystemExit) as stop:
        main(["--config_file", str(tmp_path / "run")])
    assert stop.value.code == 2
    assert ("Traceback" in capsys.readouterr().err) == is_shown


def test_secrets_stay_out_of_the_recorded_options() -> None:
    assert not {"wandb_api_key", "huggingface_token"} & set(parse().options)


def test_showing_timesteps_needs_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    config = parse_train(["--show_timesteps", "console"])
    assert isinstance(config, ShowTimestepsConfig)


def test_fp8_scaled_is_another_name_of_fp8_base(tmp_path: Path) -> None:
    assert parse("--fp8_scaled").model == parse("--fp8_base").model
    assert parse("--fp8_scaled").model.fp8_base
    (tmp_path / "run.toml").write_text("fp8_base = true\nfp8_scaled = false\n", encoding="utf-8")
    assert parse("--config_file", str(tmp_path / "run.toml")).model.fp8_base


@pytest.mark.parametrize("value", ['""', "[]"])
def test_an_empty_value_in_a_configuration_file_is_not_given(value: str, tmp_path: Path) -> None:
    """For every option but the lists, whose empty list is a value that equals the default."""
    actions = [action for action in build_parser()._actions if action.dest not in ("help", "config_file")]
    names = [action.dest for action in actions if value == '""' or action.nargs == "*"]
    given = {*(word.removeprefix("--") for word in BASE[::2])}
    text = "".join(f"{name} = {value}\n" for name in dict.fromkeys(names) if name not in given)
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    assert parse("--config_file", str(tmp_path / "run.toml")) == parse()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("network_dim = 32.0", "--network_dim 32"),
        ("seed = 7.0\nsave_every_n_epochs = 2.0", "--seed 7 --save_every_n_epochs 2"),
        ("lr_scheduler = 'cosine'\nlr_warmup_steps = 100.0", "--lr_scheduler cosine --lr_warmup_steps 100"),
        ("lr_scheduler = 'cosine'\nlr_warmup_steps = 0.25", "--lr_scheduler cosine --lr_warmup_steps 0.25"),
        ("learning_rate = 1.0", "--learning_rate 1"),
        ("metadata_title = 2.0", "--metadata_title 2.0"),
        ("scale_weight_norms = 0.0\nnum_timestep_buckets = 0.0", ""),
    ],
)
def test_an_integral_float_in_a_configuration_file_is_a_whole_number(
    text: str, words: str, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(text, encoding="utf-8")
    from_file, typed = parse("--config_file", str(tmp_path / "run.toml")), parse(*words.split())
    assert dataclasses.replace(from_file, notes=()) == dataclasses.replace(typed, notes=())


@pytest.mark.parametrize("option", ["num_timestep_buckets", "scale_weight_norms"])
def test_zero_is_off_where_upstream_reads_it_so(option: str) -> None:
    assert parse(f"--{option}", "0") == parse()


def test_no_steps_beside_epochs_leave_the_length_to_the_epochs() -> None:
    run = parse("--max_train_steps", "0", "--max_train_epochs", "3").run
    assert (run.max_train_steps, run.max_train_epochs) == (None, 3)


def test_every_option_is_declared_once_and_read_into_the_config() -> None:
    """A flag whose value no part of the config holds would change nothing, without a word."""
    plain = parse()
    parts = [getattr(plain, field.name) for field in dataclasses.fields(plain) if field.name != "options"]
    held = {
        field.name for part in parts if dataclasses.is_dataclass(part) for field in dataclasses.fields(part)
    }
    made_into = {
        *ATTENTION_BACKENDS,
        *options_of(NablaOptions),
        *options_of(CompileConfig),
        *options_of(DynamoOptions),
        *options_of(QwenOptions),
        *("override_dit", "log_tracker_config", "show_timesteps", "config_file", "traceback", "help"),
    }
    options = {action.dest for action in build_parser()._actions}
    ignored = {name for name, declared in IGNORED.items() if declared.is_ignored}
    assert options == held & options | made_into | ignored


def test_templates_that_a_message_names_can_be_given_for_samples() -> None:
    words = ("--prompt_templates", "t.json", "--sample_prompts", "p.txt", "--sample_at_first")
    assert parse(*words).samples.prompt_templates == Path("t.json")


def test_settings_of_both_families_of_compile_options_act_together() -> None:
    mode = "max-autotune-no-cudagraphs"
    for words in (
        ("--compile", "--dynamo_mode", mode),
        ("--dynamo_backend", "inductor", "--compile_mode", mode),
    ):
        assert parse(*words).model.compile == CompileConfig(compile_mode=mode)
    both = ("--dynamo_backend", "eager", "--compile_backend", "aot_eager")
    assert "only one of them" in "\n".join(problems_of(*BASE, *both))
