"""Average the LoRAs of one training run after the fact: `python -m networks.post_hoc_ema`.

Source: Karras et al. 2024, "Analyzing and Improving the Training Dynamics of Diffusion Models", section 3.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from modules.command_line import Parser, check_output, user_errors
from modules.errors import ConfigError, ModelFileError
from modules.files import disk_errors
from modules.logs import get_logger
from modules.options import float_between
from modules.tensor_files import write_tensors
from networks.lora_files import lora_file, read_adapter_tensors
from networks.lora_keys import parse_key
from networks.lora_saving import with_hashes
from networks.lora_scales import PEFT_METADATA, UNSCALED, PeftSettings, find_settings
from networks.lora_types import MAGNITUDE

log = get_logger(__name__)


def power_of_sigma_rel(sigma_rel: float) -> float:
    """Exponent gamma of the power-function average whose relative width is sigma_rel.

    The largest real root of g^3 + 7 g^2 + (16 - s^-2) g + (12 - s^-2) = 0 (appendix C of the paper).

    Raises:
        ConfigError: no root of at least 0; sigma_rel is too wide.
    """
    t = sigma_rel**-2
    roots = np.roots([1.0, 7.0, 16.0 - t, 12.0 - t])
    gamma = max((float(root.real) for root in roots if abs(root.imag) < 1e-9), default=-1.0)
    if gamma < 0:
        raise ConfigError(f"--sigma_rel {sigma_rel:g}: must lie within 0 .. 0.288")
    return gamma


def decay_rates(count: int, *, beta: float, beta2: float | None, sigma_rel: float | None) -> list[float]:
    """Decay of the average at each of `count` merges.

    `beta` each time; linear from `beta` to `beta2`; or with sigma_rel (1 - 1/t)^(gamma + 1) at merge t.
    """
    if sigma_rel is not None:
        gamma = power_of_sigma_rel(sigma_rel)
        return [(1 - 1 / t) ** (gamma + 1) for t in range(1, count + 1)]
    if beta2 is None or count < 2:
        return [beta] * count
    return [beta + (beta2 - beta) * index / (count - 1) for index in range(count)]


def average_files(paths: Sequence[Path], rates: Sequence[float]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """(tensors, metadata of the last file): average <- rate * average + (1 - rate) * next, in float32.

    Tensors keep the dtype of the first file; alphas must agree. Settings beside the files, which do not lie
    beside the average, go into its metadata.

    Raises:
        ModelFileError: a file cannot be read, or its keys, shapes or alphas differ from those of the first.
    """
    first, metadata = read_adapter_tensors(paths[0])
    settings = _settings(paths[0], first, metadata)
    average = {key: tensor.float() for key, tensor in first.items() if tensor.is_floating_point()}
    for path, rate in zip(paths[1:], rates, strict=True):
        tensors, metadata = read_adapter_tensors(path)
        _check_alike(paths[0], first, path, tensors)
        if replace(_settings(path, tensors, metadata), where=settings.where) != settings:
            raise ModelFileError(f"{path}: its scale is stated otherwise than that of {paths[0]}")
        for key, mean in average.items():
            if not _is_alpha(key):
                mean.lerp_(tensors[key].float(), 1 - rate)
    if settings.is_beside:
        metadata = {**metadata, PEFT_METADATA: settings.as_json()}
    return {key: average[key].to(t.dtype) if key in average else t for key, t in first.items()}, metadata


def _settings(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> PeftSettings:
    """What states the scale of the layers without `.alpha` tensors."""
    parsed = {key: found for key in tensors if (found := parse_key(key)) is not None}
    with_alpha = {name for name, role in parsed.values() if role == "alpha"}
    ranks = {
        name: tensors[key].shape[0]
        for key, (name, role) in parsed.items()
        if role == "lora_down" and name not in with_alpha
    }
    has_magnitudes = any(role == MAGNITUDE for _, role in parsed.values())
    return find_settings(path, metadata, ranks, has_magnitudes=has_magnitudes) if ranks else UNSCALED


def _is_alpha(key: str) -> bool:
    parsed = parse_key(key)
    return parsed is not None and parsed[1] == "alpha"


def _check_alike(first_path: Path, first: dict[str, Tensor], path: Path, tensors: dict[str, Tensor]) -> None:
    odd = sorted(first.keys() ^ tensors.keys())
    if odd:
        raise ModelFileError(f"{path}: {len(odd)} keys differ from {first_path}, first {odd[0]}")
    for key, tensor in tensors.items():
        if tensor.shape != first[key].shape:
            raise ModelFileError(f"{path}: {key} has another shape than in {first_path}")
        if _is_alpha(key) and not torch.equal(tensor.float(), first[key].float()):
            raise ModelFileError(f"{path}: {key} is {float(tensor)}, in {first_path} {float(first[key])}")


def _share(word: str) -> float:
    value = float(word)
    if not 0.0 <= value < 1.0:
        raise argparse.ArgumentTypeError(f"must be at least 0 and below 1, got {word}")
    return value


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        parser = Parser("python -m networks.post_hoc_ema", "Average the LoRA files of one run.")
        parser.add_argument("path", type=Path, nargs="+", help="LoRA files, at least two")
        parser.add_argument("--output_file", type=Path, required=True, help="file to write")
        parser.add_argument(
            "--beta", type=_share, default=0.95, help="share that stays (default: %(default)s)"
        )
        parser.add_argument("--beta2", type=_share, help="share at the last file; linear in between")
        parser.add_argument(
            "--sigma_rel",
            type=float_between(1e-12, 1e12),
            help="relative width of a power-function average instead",
        )
        parser.add_argument(
            "--no_sort", action="store_true", help="keep the given order (default: oldest first)"
        )
        parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
        options = parser.parse_args(argv)
        if len(options.path) < 2:
            raise ConfigError("at least two LoRA files are needed for an average")
        if options.sigma_rel is not None and options.beta2 is not None:
            raise ConfigError("--sigma_rel cannot be combined with --beta2")
        options.path = [lora_file(path) for path in options.path]
        missing = [path for path in options.path if not path.is_file()]
        if missing:
            raise ModelFileError([f"{path}: no such file" for path in missing])
        check_output(options.output_file, overwrite=options.overwrite, inputs=options.path)
        paths = (
            options.path if options.no_sort else sorted(options.path, key=lambda path: path.stat().st_mtime)
        )
        rates = decay_rates(
            len(paths) - 1, beta=options.beta, beta2=options.beta2, sigma_rel=options.sigma_rel
        )
        for path, rate in zip(paths, [0.0, *rates], strict=True):
            log.info("%s enters with weight %.4f", path.name, 1 - rate)
        tensors, metadata = average_files(paths, rates)
        with disk_errors(options.output_file, "run the command again"):
            write_tensors(options.output_file, tensors, with_hashes(tensors, metadata))
        log.info("wrote %s", options.output_file)


if __name__ == "__main__":
    main()
