"""Rewrite a LoRA file in the layout of another program: `python -m networks.convert_lora`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor

from modules.command_line import Parser, check_output, user_errors
from modules.errors import ConfigError
from modules.files import disk_errors
from modules.logs import get_logger
from modules.tensor_files import write_tensors
from networks.dora import foldable
from networks.lora_files import PARTIAL_HELP, LoadedLora, read_lora
from networks.lora_kandinsky import known_layer_names
from networks.lora_keys import underscored
from networks.lora_saving import kohya_suffix, save_folded, with_hashes
from networks.lora_scales import FOLDED_MARK

log = get_logger(__name__)

Target = Literal["default", "other", "diffusers", "comfy", "official"]
TARGETS: tuple[Target, ...] = ("default", "other", "diffusers", "comfy", "official")

_DEFAULT_PREFIX = "diffusion_model"
_PREFIX_AND_SUFFIX = {
    "diffusers": ("transformer.", ""),
    "comfy": ("diffusion_model.", ""),
    "official": ("base_model.model.", ".default"),
}


def convert_lora(
    source: Path, output: Path, target: Target, *, diffusers_prefix: str, allow_partial: bool = False
) -> LoadedLora:
    """Write `source` in the target layout, every tensor in its own dtype; returns what was read.

    Args:
        target: "default" is kohya's layout with `.alpha`. All others fold the scale into lora_B; LoHa and
            LoKr keep their tensors and alpha. "other" puts `diffusers_prefix` and a dot before the names.
    Raises:
        ModelFileError: not a LoRA, or keys that belong to no layer of Kandinsky 5.
        ResourceError: the output cannot be written.
    """
    lora = read_lora(source, known_layer_names(), allow_partial=allow_partial)
    with disk_errors(output, "run the command again"):
        _write(lora, output, target, diffusers_prefix)
    return lora


def _write(lora: LoadedLora, output: Path, target: Target, diffusers_prefix: str) -> None:
    metadata = {k: v for k, v in lora.metadata.items() if k not in {FOLDED_MARK[0], "lora_adapter_metadata"}}
    if target == "default":
        tensors = _kohya_tensors(lora)
        write_tensors(output, tensors, with_hashes(tensors, metadata))
        return
    prefix, suffix = _PREFIX_AND_SUFFIX.get(target, (f"{diffusers_prefix}." if diffusers_prefix else "", ""))
    if all(map(foldable, lora.layers.values())):
        save_folded(lora.layers, output, save_precision=None, metadata=metadata, prefix=prefix, suffix=suffix)
        return
    log.warning(
        "%s holds LoHa or LoKr layers, or magnitudes per column: diffusers and the official loader cannot "
        "read them",
        lora.path,
    )
    tensors = _factor_tensors(lora, {name: f"{prefix}{name}" for name in lora.layers})
    write_tensors(output, tensors, with_hashes(tensors, metadata))


def _kohya_tensors(lora: LoadedLora) -> dict[str, Tensor]:
    return _factor_tensors(lora, {name: f"lora_unet_{underscored(name)}" for name in lora.layers})


def _factor_tensors(lora: LoadedLora, written: Mapping[str, str]) -> dict[str, Tensor]:
    """The factors as they are, with an alpha that makes up their scale."""
    tensors = {}
    for name, layer in lora.layers.items():
        base = written[name]
        for role, tensor in layer.tensors.items():
            tensors[f"{base}.{kohya_suffix(role)}"] = tensor
        # float32: an alpha such as 3.3 would lose digits in the factors' bfloat16.
        tensors[f"{base}.alpha"] = torch.tensor(layer.alpha)
    return tensors


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        parser = Parser("python -m networks.convert_lora", "Convert a LoRA file between layouts.")
        parser.add_argument("--input", type=Path, required=True, help="LoRA file of any layout")
        parser.add_argument("--output", type=Path, required=True, help="file to write")
        parser.add_argument(
            "--target",
            choices=TARGETS,
            required=True,
            help="default: kohya / musubi-tuner; diffusers; comfy; official: PEFT names; "
            "other: --diffusers_prefix before the names",
        )
        parser.add_argument(
            "--diffusers_prefix", help=f"for --target other alone (default: {_DEFAULT_PREFIX})"
        )
        parser.add_argument("--lora_allow_partial", action="store_true", help=PARTIAL_HELP)
        parser.add_argument("--overwrite", action="store_true", help="replace an existing output file")
        options = parser.parse_args(argv)
        prefix = options.diffusers_prefix
        if prefix is not None and options.target != "other":
            raise ConfigError(
                f"--diffusers_prefix {prefix}: --target {options.target} has its own; use --target other"
            )
        check_output(options.output, overwrite=options.overwrite, inputs=[options.input])
        lora = convert_lora(
            options.input,
            options.output,
            cast(Target, options.target),
            diffusers_prefix=(_DEFAULT_PREFIX if prefix is None else prefix).rstrip("."),
            allow_partial=options.lora_allow_partial,
        )
        log.info("wrote %d layers to %s", len(lora.layers), options.output)


if __name__ == "__main__":
    main()
