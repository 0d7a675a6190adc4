"""Write a checkpoint with LoRAs merged into it: `python -m networks.merge_lora`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from modules.command_line import Parser, user_errors
from modules.devices import pick_device
from modules.dtypes import dtype_name
from modules.errors import ConfigError, ModelFileError
from modules.logs import get_logger
from modules.messages import names_in_short
from modules.options import float_between
from modules.quantised_files import WEIGHT_DTYPES, find_rotations, unfit_scales, unread_layout
from modules.tensor_files import TensorInfo
from modules.weight_files import WeightSource, find_weight_files, key_prefix, open_weight_files
from networks.lora_files import PARTIAL_HELP, LayerSizes, read_lora
from networks.merging import write_merged

log = get_logger(__name__)

_MARKER = "visual_transformer_blocks.0.self_attention.to_query.weight"


def layer_sizes_of_file(tensors: Mapping[str, TensorInfo]) -> tuple[str, dict[str, LayerSizes]]:
    """(prefix of all keys, linear layers with their sizes) from the header of a DiT checkpoint.

    Raises:
        ModelFileError: no Kandinsky 5 blocks in it.
    """
    prefix = key_prefix(tensors, _MARKER)
    if prefix is None:
        raise ModelFileError(f"not a Kandinsky 5 DiT; its first keys: {names_in_short(tensors)}")
    sizes: dict[str, LayerSizes] = {}
    for name, info in tensors.items():
        if name.startswith(prefix) and name.endswith(".weight") and len(info.shape) == 2:
            out_features, in_features = info.shape
            sizes[name.removeprefix(prefix).removesuffix(".weight")] = (out_features, in_features)
    return prefix, sizes


def merge_files(
    dit: Path,
    lora_paths: Sequence[Path],
    multipliers: Sequence[float],
    output: Path,
    device: torch.device,
    *,
    allow_partial: bool = False,
) -> None:
    """Write `dit` with the LoRAs added to `output`: same keys and dtypes, one tensor in memory at a time.

    Raises:
        UserError: the checkpoint or a LoRA cannot be used, or the output not written; see `read_lora` and
            `write_merged`.
    """
    with open_weight_files(find_weight_files(dit, subfolder="transformer")) as files:
        prefix, sizes = layer_sizes_of_file(files.tensors)
        _check_weights(dit, files, prefix)
        loras = [
            read_lora(path, sizes, allow_partial=allow_partial).with_multiplier(multiplier)
            for path, multiplier in zip(lora_paths, multipliers, strict=True)
        ]
        write_merged(files, output, loras, prefix=prefix, device=device)


def _check_weights(dit: Path, files: WeightSource, prefix: str) -> None:
    unread = unread_layout(files)
    problems = [] if unread is None else [unread]
    problems += [f"scales do not fit their weights: {text}" for text in unfit_scales(files.tensors, prefix)]
    problems += [f"int8 weights cannot be read: {text}" for text in find_rotations(files)[1]]
    problems += [
        f"LoRAs cannot be merged into weights of type {dtype_name(info.dtype)}: {name}"
        for name, info in files.tensors.items()
        if name.startswith(prefix) and name.endswith(".weight") and info.dtype not in WEIGHT_DTYPES
    ]
    if problems:
        more = f" ({len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ModelFileError(f"{dit}: {problems[0]}{more}")


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        parser = Parser("python -m networks.merge_lora", "Merge LoRAs into a DiT checkpoint.")
        parser.add_argument("--dit", type=Path, required=True, help="checkpoint: file, shards or folder")
        parser.add_argument("--lora_weight", type=Path, nargs="+", required=True, help="LoRA files")
        parser.add_argument(
            "--lora_multiplier",
            type=float_between(-1e3, 1e3),
            nargs="*",
            default=[],
            help="default: 1.0 each",
        )
        parser.add_argument("--lora_allow_partial", action="store_true", help=PARTIAL_HELP)
        parser.add_argument("--save_merged_model", type=Path, required=True, help="file to write")
        parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda (default: cpu)")
        options = parser.parse_args(argv)
        given, count = options.lora_multiplier, len(options.lora_weight)
        if len(given) > count:
            raise ConfigError(f"--lora_multiplier: {len(given)} numbers for {count} LoRAs")
        if given and len(given) < count:
            log.info("%d multipliers for %d LoRAs: the rest are 1.0", len(given), count)
        device = pick_device(options.device)
        multipliers = [*given, *[1.0] * (count - len(given))]
        merge_files(
            options.dit,
            options.lora_weight,
            multipliers,
            options.save_merged_model,
            device,
            allow_partial=options.lora_allow_partial,
        )
        log.info("wrote %s", options.save_merged_model)


if __name__ == "__main__":
    main()
