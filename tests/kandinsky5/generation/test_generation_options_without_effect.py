"""An option of generation that changes nothing says so, once, and is silent where it acts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from kandinsky5.cli.generate import parse_generate
from kandinsky5.cli.without_effect import (
    COMPILE_RULES,
    GENERATE_RULES,
    NABLA_RULES,
    TASK_RULES,
    WEIGHT_RULES,
)

pytestmark = pytest.mark.fast

RULES = (*GENERATE_RULES, *WEIGHT_RULES, *COMPILE_RULES, *NABLA_RULES, *TASK_RULES)
PROMPT = "--prompt x --output out.mp4"
LATENT = "--latent_path l.safetensors --output out.mp4"
MERGED = "--save_merged_model m.safetensors --lora_weight a.safetensors"
DRAFT = "--prompt x --output out.safetensors --output_type latent"
FOLDER = "--prompt x --output out/"
NABLA = "--task k5-tiny-nabla"


@dataclass(frozen=True)
class Example:
    """An option with a value, beside words that make it ineffective, and beside words that let it act."""

    words: str
    without_effect: tuple[str, ...]
    acts: str


_BOTH = (LATENT, MERGED)
_BOTH_NABLA = tuple(f"{words} {NABLA}" for words in _BOTH)
EXAMPLES = [
    *(
        Example(words, _BOTH, PROMPT)
        for words in (
            "--seed 5",
            "--width 64",
            "--height 64",
            "--frames 5",
            "--steps 7",
            "--guidance 2",
            "--scheduler_scale 2",
            "--cpu_noise",
            "--dtype float32",
            "--fp8_base",
            "--int8_base",
            "--nf4_base",
            "--blocks_to_swap 1",
            "--disable_numpy_memmap",
            "--no_weight_check",
            "--magcache",
            "--sdpa",
            "--flash_attn",
            "--flash3",
            "--sage_attn",
            "--xformers",
            "--attn_mode flash",
            "--compile",
            "--text_encoder_qwen q",
            "--text_encoder_clip c",
            "--fp8_llm",
            "--quantized_qwen",
            "--prompt_templates t.txt",
        )
    ),
    *(
        Example(words, _BOTH_NABLA, f"{PROMPT} {NABLA}")
        for words in ("--nabla_method topk", "--nabla_P 0.5", "--no_nabla_add_sta")
    ),
    *(
        Example(
            f"--{name} 3", (*_BOTH_NABLA, PROMPT, f"{PROMPT} {NABLA} --no_nabla_add_sta"), f"{PROMPT} {NABLA}"
        )
        for name in ("nabla_wT", "nabla_wH", "nabla_wW")
    ),
    Example("--force_nabla_attention", (*_BOTH, f"{PROMPT} {NABLA}"), PROMPT),
    *(
        Example(words, tuple(f"{base} {needed}" for base in _BOTH), f"{PROMPT} {needed}")
        for words, needed in (
            ("--fp8_fast", "--fp8_base"),
            ("--int8_fast", "--int8_base"),
            ("--no_int8_rotation", "--int8_base --int8_fast"),
            ("--use_pinned_memory_for_block_swap", "--blocks_to_swap 1"),
            ("--magcache_threshold 1", "--magcache"),
            ("--magcache_k 3", "--magcache"),
            ("--magcache_retention_ratio 0.5", "--magcache"),
            ("--magcache_mag_ratios 1 1", "--magcache"),
            ("--compile_backend eager", "--compile"),
            ("--compile_mode max-autotune", "--compile"),
            ("--compile_dynamic false", "--compile"),
            ("--compile_fullgraph", "--compile"),
            ("--compile_cache_size_limit 3", "--compile"),
            ("--image i.png", "--task k5-tiny-i2v"),
            ("--image_last i.png", "--task k5-tiny-i2v --image i.png"),
        )
    ),
    Example("--fp8_fast", (PROMPT, f"{PROMPT} --int8_base"), f"{PROMPT} --fp8_base"),
    Example("--int8_fast", (PROMPT,), f"{PROMPT} --int8_base"),
    Example("--no_int8_rotation", (PROMPT, f"{PROMPT} --int8_base"), f"{PROMPT} --int8_base --int8_fast"),
    Example("--use_pinned_memory_for_block_swap", (PROMPT,), f"{PROMPT} --vram_budget 20"),
    *(
        Example(words, (PROMPT,), f"{PROMPT} --magcache")
        for words in (
            "--magcache_threshold 1",
            "--magcache_k 3",
            "--magcache_retention_ratio 0.5",
            "--magcache_mag_ratios 1 1",
        )
    ),
    *(
        Example(words, (PROMPT,), f"{PROMPT} --compile")
        for words in (
            "--compile_backend eager",
            "--compile_mode max-autotune",
            "--compile_dynamic false",
            "--compile_fullgraph",
            "--compile_cache_size_limit 3",
        )
    ),
    Example(
        "--compile_mode max-autotune", (f"{PROMPT} --compile --compile_backend eager",), f"{PROMPT} --compile"
    ),
    *(
        Example(words, (PROMPT,), f"{PROMPT} --force_nabla_attention")
        for words in ("--nabla_method topk", "--nabla_P 0.5", "--nabla_add_sta")
    ),
    Example("--vram_budget 20", (LATENT, MERGED, "--interactive --output out"), PROMPT),
    Example("--prompt y", (MERGED,), "--output out.mp4"),
    Example("--from_file p.txt", (MERGED,), "--output out"),
    Example("--interactive", (MERGED,), "--output out"),
    Example("--latent_path l.safetensors", (MERGED,), "--output out.mp4"),
    Example("--include_patterns a", (PROMPT,), f"{PROMPT} --lora_weight a"),
    Example("--exclude_patterns a", (PROMPT,), f"{PROMPT} --lora_weight a"),
    Example("--dit d.safetensors", (LATENT,), MERGED),
    Example("--lora_weight nonexist", (LATENT,), PROMPT),
    Example("--lora_multiplier 2", (f"{LATENT} --lora_weight a",), f"{PROMPT} --lora_weight a"),
    Example("--include_patterns a", (f"{LATENT} --lora_weight a",), MERGED),
    Example("--exclude_patterns a", (f"{LATENT} --lora_weight a",), MERGED),
    Example("--lora_mode runtime", (LATENT, PROMPT), f"{PROMPT} --lora_weight a"),
    Example("--lora_allow_partial", (LATENT, PROMPT), MERGED),
    Example("--no_lora_trigger", (LATENT, MERGED, PROMPT), f"{PROMPT} --lora_weight a"),
    Example("--vae v", (MERGED,), DRAFT),
    *(
        Example(words, (MERGED, DRAFT), f"{DRAFT} --task k5-tiny-i2v --image i.png")
        for words in ("--vae_dtype float32", "--vae_tiling", "--vae_spatial_tile_sample_min_size 128")
    ),
    *(
        Example(words, (MERGED, DRAFT, f"{FOLDER} --output_type images", "--prompt x --output a.png"), LATENT)
        for words in ("--fps 5", "--crf 3")
    ),
    Example("--trim_tail_frames 3", (MERGED, DRAFT), LATENT),
    Example("--output o.mp4", (MERGED,), "--prompt x"),
    Example("--output_type both", (MERGED,), PROMPT),
    Example("--no_metadata", (MERGED,), LATENT),
    Example(
        "--overwrite", (MERGED, FOLDER, "--prompt x --output there", "--from_file p.txt --output o"), LATENT
    ),
    Example("--offload_dit_during_sampling", (*_BOTH, PROMPT), "--interactive --output out"),
    Example("--text_encoder_cpu", (*_BOTH, f"{PROMPT} --device cpu"), f"{PROMPT} --device cuda"),
    Example(
        "--negative_prompt y", (*_BOTH, f"{PROMPT} --guidance 1"), "--from_file p.txt --output o --guidance 1"
    ),
]


@pytest.fixture
def notes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: pytest.LogCaptureFixture
) -> Callable[..., list[str]]:
    """Gives the notes that a command line is answered with."""
    monkeypatch.chdir(tmp_path)
    for name in ("l.safetensors", "p.txt", "t.txt"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "there").mkdir()

    def of(*words: str) -> list[str]:
        said.clear()
        parse_generate(["--task", "k5-tiny-t2v", *" ".join(words).split()])
        return sorted({line for line in said.messages if "has no effect" in line})

    return of


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda example: example.words)
def test_an_option_without_effect_is_logged_and_one_with_effect_is_not(
    example: Example, notes: Callable[..., list[str]]
) -> None:
    option = example.words.split()[0].replace("--no_nabla_add_sta", "--nabla_add_sta")
    for beside in example.without_effect:
        assert [line for line in notes(beside, example.words) if line.startswith(f"{option} has")], beside
    assert not [line for line in notes(example.acts, example.words) if line.startswith(f"{option} has")]


def test_every_rule_and_every_option_in_it_has_an_example(notes: Callable[..., list[str]]) -> None:
    lines = {
        line
        for example in EXAMPLES
        for beside in example.without_effect
        for line in notes(beside, example.words)
    }
    expected = {
        f"--{name} has no effect: {rule.why}"
        for rule in RULES
        for name in rule.options
        if not name.startswith("dynamo_")  # of training
    }
    assert sorted(expected - lines) == []
