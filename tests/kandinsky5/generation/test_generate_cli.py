"""The command line of generation: what it accepts, refuses and answers at once."""

from __future__ import annotations

import logging
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from kandinsky5.cli.caching import parse_cache_text
from kandinsky5.cli.generate import check_model_paths, parse_generate, repeat_argv
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.prompts import parse_prompt_line
from modules.errors import ConfigError

pytestmark = pytest.mark.fast

BASE = ("--prompt", "a cat", "--output", "out.mp4")


def parse(*words: str) -> GenerateConfig:
    return parse_generate([*BASE, *words])


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        parse_generate(list(words))
    return str(caught.value)


def test_the_documented_command_line_is_understood() -> None:
    config = parse_generate(
        shlex.split("""--task k5-pro-t2v-5s-sd --dit d.safetensors --vae v.safetensors
        --text_encoder_qwen Qwen/Qwen2.5-VL-7B-Instruct --text_encoder_clip openai/clip-vit-large-patch14
        --offload_dit_during_sampling --fp8_base --dtype bfloat16
        --prompt cat --negative_prompt bad --frames 17 --steps 50 --guidance 5 --scheduler_scale 10 --seed 42
        --width 512 --height 512 --output output.mp4 --lora_weight l.safetensors --lora_multiplier 1.0""")
    )
    assert config.dit.fp8_base
    assert config.dit.dtype == "bfloat16"
    assert (config.spec.width, config.spec.height, config.spec.frames) == (512, 512, 17)
    assert (config.lora.lora_weight, config.lora.lora_multiplier) == ((Path("l.safetensors"),), (1.0,))
    assert config.models.text_encoder_qwen == "Qwen/Qwen2.5-VL-7B-Instruct"


def test_sibling_spellings_mean_the_same() -> None:
    theirs = parse_generate(
        shlex.split("""--prompt p --video_size 256 512 --video_length 21 --infer_steps 9
        --guidance_scale 2 --flow_shift 7 --save_path o.mp4 --image_path i.png --end_image_path e.png
        --fp8 --attn_mode torch""")
    )
    ours = parse_generate(
        shlex.split("""--prompt p --height 256 --width 512 --frames 21 --steps 9 --guidance 2
        --scheduler_scale 7 --output o.mp4 --image i.png --image_last e.png --fp8_base --sdpa""")
    )
    assert theirs == ours


def test_paths_default_to_the_tasks() -> None:
    config = parse("--task", "k5-lite-t2v-5s-sd")
    assert config.models.dit == Path("weights/model/kandinsky5lite_t2v_sft_5s.safetensors")
    assert config.models.text_encoder_clip == "./weights/text_encoder2"  # no id of the hub


def test_qwen_is_held_in_one_way_in_every_script(tmp_path: Path) -> None:
    assert parse().text.quantization is None
    assert parse("--fp8_vlm").text.quantization == "fp8"
    assert parse("--quantized_qwen").text.quantization == "nf4"
    assert "give only one of them" in refusal(*BASE, "--fp8_llm", "--quantized_qwen")
    (tmp_path / "d.toml").write_text("", encoding="utf-8")
    words = ["--dataset_config", str(tmp_path / "d.toml"), "--text_encoder_qwen", "a/b"]
    config = parse_cache_text([*words, "--text_encoder_clip", "a/c", "--fp8_llm"])
    assert config.quantization == "fp8"


def test_options_without_effect_say_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(logging.getLogger("k5"), "propagate", True)
    with caplog.at_level(logging.INFO):
        parse("--lycoris", "--split_attn", "--vae_chunk_size", "4", "--blocks_to_swap", "0")
    said = {record.getMessage() for record in caplog.records}
    assert [sum(option in line for line in said) for option in ("--lycoris", "--split_attn", "--blocks")] == [
        1,
        1,
        0,
    ]


def test_one_attention_at_a_time() -> None:
    assert "--sdpa and --xformers" in refusal(*BASE, "--sdpa", "--xformers")


def test_attention_words_and_flags_mean_the_same() -> None:
    assert parse().dit.attention == "sdpa"
    assert parse("--attn_mode", "flash").dit.attention == "flash_attn"
    assert parse("--attn_mode", "sageattn", "--sage_attn").dit.attention == "sage_attn"


def test_magcache_settings_come_in_pairs() -> None:
    assert "pairs" in refusal(*BASE, "--magcache", "--magcache_mag_ratios", "1", "1", "1")
    config = parse("--magcache", "--magcache_threshold", "0.2").dit.magcache
    assert config is not None
    assert (config.magcache_threshold, config.magcache_k) == (0.2, 2)


def test_exactly_one_source_of_prompts(tmp_path: Path) -> None:
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat\n", encoding="utf-8")
    assert "none was given" in refusal("--output", "o.mp4")
    assert "--prompt and --from_file" in refusal(*BASE, "--from_file", str(prompts))
    assert "no such file" in refusal("--output", "o", "--from_file", "missing.txt")
    assert "--output is required" in refusal("--prompt", "x")


def test_multipliers_never_outnumber_loras() -> None:
    assert "at most one for each" in refusal(*BASE, "--lora_weight", "a", "--lora_multiplier", "1", "0.5")


def test_outputs_of_another_kind_are_refused() -> None:
    assert ".txt" in refusal("--prompt", "x", "--output", "o.txt")
    assert "--output_type latent" in refusal("--prompt", "x", "--output", "o.safetensors")


def test_an_output_name_without_room_for_what_is_added_is_refused_at_once() -> None:
    assert "at most 232" in refusal("--prompt", "x", "--output", "n" * 233 + ".mp4")


def test_an_output_name_may_be_as_long_as_there_is_room() -> None:
    parse_generate(["--prompt", "x", "--output", "n" * 232 + ".mp4"])
    parse_generate(["--prompt", "x", "--output", "n" * 255 + "/"])


def test_merging_needs_no_vae(tmp_path: Path) -> None:
    for name in ("d.safetensors", "l.safetensors"):
        (tmp_path / name).write_bytes(b"")
    words = ["--dit", str(tmp_path / "d.safetensors"), "--lora_weight", str(tmp_path / "l.safetensors")]
    check_model_paths(parse_generate([*words, "--save_merged_model", "m.safetensors"]))


def test_nabla_options_override_the_task() -> None:
    assert parse().dit.nabla is None
    config = parse("--task", "k5-pro-t2v-10s-sd", "--nabla_P", "0.7", "--no_nabla_add_sta")
    assert config.dit.nabla is not None
    assert (config.dit.nabla.P, config.dit.nabla.wT, config.dit.nabla.add_sta) == (0.7, 11, False)
    assert parse("--nabla_P", "0.7") == parse()
    assert "at most 1" in refusal(*BASE, "--force_nabla_attention", "--nabla_P", "7")
    forced = parse("--force_nabla_attention", "--nabla_wH", "5").dit.nabla
    assert forced is not None
    assert forced.wH == 5


def test_patterns_must_compile() -> None:
    assert "regular expression" in refusal(*BASE, "--lora_weight", "a", "--include_patterns", "(")


def test_a_tile_size_switches_tiling_on() -> None:
    assert parse("--vae_spatial_tile_sample_min_size", "128").vae.tile_px == 128
    assert parse("--vae_tiling").vae.tile_px is not None


@pytest.mark.parametrize(
    "words", [("--promt", "x"), ("--seed", "-1"), ("--crf", "60"), ("--steps", "0"), ("--fps", "3000000000")]
)
def test_wrong_options_end_with_code_2(words: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        parse_generate([*BASE, *words])
    assert caught.value.code == 2
    assert words[0] in capsys.readouterr().err


def test_missing_models_are_told_before_torch_is_imported(root: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(root / "kandinsky5_generate_video.py"), *BASE]
    result = subprocess.run(
        [*command, "--dit", str(tmp_path / "none")],
        capture_output=True,
        text=True,
        check=False,
        encoding="utf-8",
        cwd=tmp_path,
    )
    assert result.returncode == 4
    assert f"--dit {tmp_path / 'none'}: no such file" in result.stderr
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}


def test_help_is_quick_and_names_hidden_spellings(root: Path) -> None:
    command = [sys.executable, "-X", "importtime", str(root / "kandinsky5_generate_video.py"), "--help"]
    result = subprocess.run(command, capture_output=True, text=True, check=True, encoding="utf-8")
    assert "torch" not in {line.split("|")[-1].strip() for line in result.stderr.splitlines()}
    assert "--video_size" in result.stdout


@pytest.mark.parametrize(
    ("option", "setting", "value"),
    [
        ("--guidance", "--g", "1000"),
        ("--guidance", "--l", "-1"),
        ("--seed", "--d", "-1"),
        ("--seed", "--d", "9223372036854775808"),
        ("--steps", "--s", "0"),
        ("--steps", "--s", "1001"),
        ("--scheduler_scale", "--fs", "0"),
        ("--scheduler_scale", "--fs", "5000"),
        ("--frames", "--f", "0"),
        ("--frames", "--f", "510"),
        ("--width", "--w", "0"),
        ("--height", "--h", "2049"),
        ("--lora_multiplier", "--m", "2000"),
        ("--image", "--i", ""),
    ],
)
def test_a_range_is_the_same_on_the_command_line_and_in_a_prompt(
    option: str, setting: str, value: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        parse("--lora_weight", "a", f"{option}={value}")
    (error, *_) = capsys.readouterr().err.splitlines()
    (problem,) = parse_prompt_line(f"a cat {setting} {value}", "line 1").problems
    assert problem == f"line 1: {setting}: {error.partition(': ')[2].partition(': ')[2]}"


@pytest.mark.parametrize(
    "words",
    [
        "--fp8_base --blocks_to_swap 3 --no_nabla_add_sta --force_nabla_attention --nabla_P 0.5",
        "--lora_weight a.safetensors b.safetensors --lora_multiplier -0.5 1.5 --include_patterns x y",
        "--compile --compile_backend eager --attn_mode flash --vae_tiling --fps 12 --output_type both",
        "--magcache --magcache_mag_ratios 1 0.5 --device cpu --cpu_noise --quantized_qwen",
        "--compile_args eager default auto False --compile --video_size 64 128",
    ],
)
def test_the_options_of_a_run_give_it_again(words: str) -> None:
    config = parse(*words.split(), "--negative_prompt", "")
    assert parse_generate(repeat_argv(config.options)) == config
