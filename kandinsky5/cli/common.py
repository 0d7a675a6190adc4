"""What the four command lines share: the parser, error handling and option types."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from modules.command_line import Parser, float_between, user_errors

__all__ = [
    "DTYPE_CHOICES",
    "SAVES_HOST_MEMORY",
    "VRAM_BUDGET_RANGE",
    "Parser",
    "existing_file",
    "float_between",
    "int_between",
    "local_name",
    "non_negative_int",
    "positive_int",
    "resolution",
    "step_count",
    "user_errors",
]

VRAM_BUDGET_RANGE = (1.0, 1024.0)
"""GiB that a budget may have."""
SAVES_HOST_MEMORY = {
    "cache_latents": (
        "--batch_size 1 --num_workers 1: fewer clips at once",
        "shorter clips or a smaller resolution in the dataset file",
    ),
    "cache_text": (
        "--fp8_vlm: Qwen's weights take half of the memory",
        "--quantized_qwen: they take a quarter",
        "--batch_size 1: fewer captions at once",
    ),
    "train": (
        "--fp8_base: the DiT takes half of the memory",
        "a smaller --blocks_to_swap, or none: fewer weights in host memory",
        "no --gradient_checkpointing_cpu_offload: block inputs stay on the device",
        "no --disable_numpy_memmap: model files are mapped and not copied",
        "--max_data_loader_n_workers 0: no caches are read ahead",
        "--fp8_vlm or --quantized_qwen: for the prompts of samples",
    ),
    "generate": (
        "--fp8_vlm: Qwen's weights take half of the memory",
        "--quantized_qwen: they take a quarter",
        "--fp8_base: the DiT takes half of the memory",
        "a smaller --blocks_to_swap, or none: fewer weights in host memory",
        "no --offload_dit_during_sampling and no --disable_numpy_memmap",
        "fewer frames or a smaller size",
    ),
}
"""What helps against a lack of host memory in each of the scripts."""
DTYPE_CHOICES = ("float32", "fp32", "float", "float16", "fp16", "bfloat16", "bf16")


def positive_int(word: str) -> int:
    """An option type: a whole number of at least 1."""
    value = int(word)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {word}")
    return value


def non_negative_int(word: str) -> int:
    """An option type: a whole number of at least 0."""
    value = int(word)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must be at least 0, got {word}")
    return value


def int_between(low: int, high: int) -> Callable[[str], int]:
    """An option type: a whole number within [low, high]."""

    def number(word: str) -> int:
        value = int(word)
        if not low <= value <= high:
            raise argparse.ArgumentTypeError(f"must lie within {low} .. {high}, got {word}")
        return value

    return number


def step_count(word: str) -> int | float:
    """An option type: a number of steps, or a share of the run as `0.1` or `10%`."""
    if word.endswith("%"):
        value = float(word[:-1]) / 100
    elif "." in word or "e" in word.lower():
        value = float(word)
    else:
        return non_negative_int(word)
    if value == 0:
        return 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a share must lie between 0 and 1 (0% and 100%), got {word}")
    return value


def resolution(word: str) -> tuple[int, int]:
    """An option type: `width,height`, or one number for both."""
    parts = [positive_int(part.strip()) for part in word.split(",")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f'expected "width,height", got {word}')
    return parts[0], parts[-1]


def local_name(path: Path) -> str:
    """A path in words that nobody takes for a model id of the hub, which `weights/text_encoder` could be."""
    return str(path) if path.is_absolute() else f"./{path.as_posix()}"


def existing_file(path: Path, flag: str) -> str | None:
    """A problem line when `path` is not a file, for the list of problems of a `ConfigError`."""
    if path.is_file():
        return None
    return f"{flag} {path}: {'is a folder, not a file' if path.is_dir() else 'no such file'}"
