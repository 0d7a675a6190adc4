"""Report the contents of a LoRA file and the programs that can load it: `python -m networks.inspect_lora`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from torch import Tensor

from modules.command_line import Parser, user_errors
from modules.dtypes import dtype_name
from modules.logs import format_table, print_report
from networks.factors import LayerFactors, factors_class
from networks.lora_files import LoadedLora, lora_file, read_adapter_tensors, read_lora
from networks.lora_kandinsky import known_layer_names
from networks.lora_keys import LayerNames, layout_of, parse_key
from networks.lora_types import LORA_TYPES, MAGNITUDE, LoraType

_BLOCK = re.compile(r"((?:text|visual)_transformer_blocks\.\d+)\..+")
_MAX_VALUE_LENGTH = 100
# Layouts that each program reads; see docs on LoRA formats.
_READERS = {
    "this project": {"kohya", "lycoris", "diffusers", "comfy", "peft", "bare", "other"},
    "musubi-tuner": {"kohya"},
    "ComfyUI": {"kohya", "diffusers", "comfy", "bare"},
    "diffusers": {"diffusers"},
    "official pipeline": {"diffusers", "peft", "bare"},
}
_MAGNITUDE_KEYS = {
    "this project": (MAGNITUDE, "lora_magnitude_vector"),
    "ComfyUI": (MAGNITUDE,),
    "diffusers": ("lora_magnitude_vector",),
}
"""Ends of the keys of a DoRA's magnitudes that a program reads."""
_WITHOUT_ALPHA_KEYS = {"diffusers", "official pipeline"}
"""Programs that refuse `.alpha` tensors."""


def report(path: Path) -> str:
    """Return the report as text.

    Raises:
        ModelFileError: the file cannot be read or is no LoRA.
    """
    path = lora_file(path)
    tensors, _ = read_adapter_tensors(path)
    lora = read_lora(path, known_layer_names(), allow_partial=True)
    layers, layout = list(lora.layers.values()), layout_of(tensors, LayerNames(known_layer_names()))
    lines = [
        f"{path.name}: {len(tensors)} tensors, {path.stat().st_size / 2**20:.1f} MiB, {layout} layout",
        f"layers: {len(layers)} ({_counted(_type_of(layer).title for layer in layers)})",
        f"ranks: {_counted(layer.rank for layer in layers)}",
        f"scales: {_counted(f'{layer.scale:g}' for layer in layers)}",
        f"dtypes: {_counted(dtype_name(tensor.dtype) for tensor in tensors.values())}",
    ]
    foreign = [key for key in tensors if parse_key(key) is None]
    if foreign:
        lines.append(f"keys of no adapter: {len(foreign)}, first {foreign[0]}")
    if lora.trigger:
        lines.append(f"trigger words: {lora.trigger}")
    norm = "norm of the change"
    if any(MAGNITUDE in layer.tensors for layer in layers):
        norm += " of directions"
    lines += ["", format_table(("part of the model", "layers", norm), _norm_rows(lora)), ""]
    lines.append(format_table(("program", "loads it"), _reader_rows(lora, layout, tensors)))
    if lora.metadata:
        lines += ["", format_table(("metadata", "value"), _metadata_rows(lora.metadata))]
    return "\n".join(lines)


def _counted(values: Iterable[object]) -> str:
    counts = Counter(values)
    return ", ".join(
        f"{value} ({count})" if len(counts) > 1 else f"{value}" for value, count in counts.items()
    )


def _norm_rows(lora: LoadedLora) -> list[tuple[str, int, str]]:
    """Frobenius norms: of each block, the root of the sum of squares over its layers."""
    squares: dict[str, list[float]] = {}
    for name, layer in lora.layers.items():
        match = _BLOCK.fullmatch(name)
        squares.setdefault(match[1] if match else name, []).append(float(layer.norm()) ** 2)
    return [(part, len(values), f"{sum(values) ** 0.5:.4g}") for part, values in squares.items()]


def _type_of(layer: LayerFactors) -> LoraType:
    return next(kind for kind in LORA_TYPES if type(layer) is factors_class(kind))


def _reader_rows(lora: LoadedLora, layout: str, tensors: Mapping[str, Tensor]) -> list[tuple[str, str]]:
    kinds = [_type_of(layer) for layer in lora.layers.values()]
    has_alpha = any(key.endswith(".alpha") for key in tensors)
    roles = {role for layer in lora.layers.values() for role in layer.tensors}
    rows = []
    for program, layouts in _READERS.items():
        if layout not in layouts:
            answer = "no: convert it (python -m networks.convert_lora)"
        elif any(program not in kind.programs for kind in kinds):
            answer = "no: only plain LoRA"
        elif MAGNITUDE in roles and not any(key.endswith(_MAGNITUDE_KEYS[program]) for key in tensors):
            answer = "no: it would leave out the magnitudes, convert it"
        elif program in _WITHOUT_ALPHA_KEYS and has_alpha:
            answer = "no: it refuses .alpha keys, convert it"
        else:
            answer = "yes"
        rows.append((program, answer))
    return rows


def _metadata_rows(metadata: Mapping[str, str]) -> list[tuple[str, str]]:
    rows = []
    for key in sorted(metadata):
        # Printable and short: a stranger's file must not steer the terminal.
        value = "".join(char if char.isprintable() else "?" for char in metadata[key])
        rows.append((key, value if len(value) <= _MAX_VALUE_LENGTH else f"{value[:_MAX_VALUE_LENGTH]}..."))
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        parser = Parser("python -m networks.inspect_lora", "Report what is inside LoRA files.")
        parser.add_argument("path", type=Path, nargs="+", help="LoRA files of any layout")
        options = parser.parse_args(argv)
        for path in options.path:
            print_report(report(path))


if __name__ == "__main__":
    main()
