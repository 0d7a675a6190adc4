"""Helpers that several command lines share."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from modules.errors import ConfigError, ModelFileError
from modules.path_kinds import file_problem, missing_problem

SAVES_HOST_MEMORY = {
    "cache_latents": (
        "--batch_size 1 --num_workers 1: fewer clips at once",
        "shorter clips or a smaller resolution in the dataset file",
    ),
    "cache_text": (
        "--fp8_vlm: Qwen's weights take half the memory",
        "--quantized_qwen: Qwen's weights take a quarter of the memory",
        "--batch_size 1: fewer captions at once",
    ),
    "train": (
        "--fp8_base: the DiT takes half the memory",
        "a smaller --blocks_to_swap, or none: fewer weights in host memory",
        "no --gradient_checkpointing_cpu_offload: block inputs stay on the device",
        "no --disable_numpy_memmap: model files are mapped and not copied",
        "--max_data_loader_n_workers 0: no caches are read ahead",
        "--fp8_vlm or --quantized_qwen: less memory while sample prompts are encoded",
    ),
    "generate": (
        "--fp8_vlm: Qwen's weights take half the memory",
        "--quantized_qwen: Qwen's weights take a quarter of the memory",
        "--fp8_base: the DiT takes half the memory",
        "a smaller --blocks_to_swap, or none: fewer weights in host memory",
        "no --offload_dit_during_sampling and no --disable_numpy_memmap",
        "fewer frames or a smaller size",
    ),
}
"""Options that reduce host memory, per script."""


def local_name(path: Path) -> str:
    """A path as text that cannot be mistaken for a hub model id, as `weights/text_encoder` could be."""
    return str(path) if path.is_absolute() else f"./{path.as_posix()}"


def missing_file(flag: str, path: Path | None) -> list[str]:
    """Return a problem line if an option names something that is not a file."""
    problem = None if path is None else missing_problem(path, "file") or file_problem(path)
    return [] if problem is None else [f"{flag} {path}: {problem}"]


def missing_path(flag: str, path: Path | None) -> list[str]:
    """Return a problem line if an option names neither a file nor a folder."""
    problem = None if path is None else missing_problem(path)
    return [] if problem is None else [f"{flag} {path}: {problem}"]


def check_paths(files: Iterable[tuple[str, Path | None]], models: Iterable[tuple[str, Path | None]]) -> None:
    """Check that the paths of options lead somewhere, before the import of torch, which takes seconds.

    Args:
        files: flags and paths of settings.
        models: of weights: files or folders.
    Raises:
        ConfigError, ModelFileError: lists all paths that lead nowhere; the second if all are of models.
    """
    problems = [line for flag, path in files for line in missing_file(flag, path)]
    missing = [line for flag, path in models for line in missing_path(flag, path)]
    raise_all([*problems, *missing] if problems else [])
    if missing:
        raise ModelFileError(missing)


def raise_all(problems: Iterable[str]) -> None:
    """Raise a `ConfigError` that lists each problem once, if there are any."""
    found = list(dict.fromkeys(problems))
    if found:
        raise ConfigError(found)
