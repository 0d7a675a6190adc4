"""Write a DiT checkpoint in one byte per weight: `python -m kandinsky5.quantise DIT OUT --int8 | --fp8`.

The file holds what `--int8_base --int8_fast` or `--fp8_base` would make while loading, to the bit. int8 has
ComfyUI's layout `int8_tensorwise` with `convrot`; float8 has a scale per row under `scale_weight`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from modules.byte_sizes import size_text
from modules.command_line import Parser, check_output, user_errors
from modules.devices import pick_device
from modules.errors import ModelFileError, ResourceError
from modules.files import check_free_space, disk_errors
from modules.fp8 import Fp8Linear
from modules.int8 import RotatedInt8Linear
from modules.logs import get_logger
from modules.quantised_files import DESCRIPTION, ONE_BYTE_DTYPES, describe_int8, unread_layout
from modules.quantised_linear import QuantisedLinear
from modules.tensor_files import write_tensor_stream
from modules.weight_files import WeightFiles, find_weight_files, open_weight_files
from networks.lora_kandinsky import is_target_name
from networks.merge_lora import layer_sizes_of_file

log = get_logger(__name__)


class _Quantised:
    """The tensors of the file to write, made one at a time.

    A file holds its scales before its weights, so each weight is rounded twice: once for its scale.
    """

    def __init__(self, files: WeightFiles, kind: type[QuantisedLinear], device: torch.device) -> None:
        prefix, sizes = layer_sizes_of_file(files.tensors)
        self._files, self._kind, self._device = files, kind, device
        self._scale = ".scale_weight" if kind is Fp8Linear else ".weight_scale"
        self.layers = {f"{prefix}{layer}": size for layer, size in sizes.items() if is_target_name(layer)}
        self.layout = {name: (info.dtype, info.shape) for name, info in files.tensors.items()}
        for layer, size in self.layers.items():
            self.layout[f"{layer}.weight"] = (kind.weight_dtype, size)
            self.layout[f"{layer}{self._scale}"] = (torch.float32, (size[0], 1))
            if kind is RotatedInt8Linear:
                description = self._description(layer)
                self.layout[f"{layer}{DESCRIPTION}"] = (description.dtype, tuple(description.shape))

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(dtype.itemsize * torch.Size(shape).numel() for dtype, shape in self.layout.values())

    def read(self, name: str) -> Tensor:
        layer = name.rpartition(".")[0]
        if layer not in self.layers or name == f"{layer}.bias":
            return self._files.read(name)
        if name.endswith(DESCRIPTION):
            return self._description(layer)
        weight8, scale = self._kind.quantise(self._files.read(f"{layer}.weight").to(self._device))
        if name.endswith(".weight"):
            return weight8.cpu()
        if not bool(scale.isfinite().all()):
            raise ModelFileError(
                f"{layer}.weight holds NaN or infinite values: download the checkpoint again"
            )
        return scale[:, None].cpu()

    def _description(self, layer: str) -> Tensor:
        return describe_int8(self._kind.rotation_of(self.layers[layer][1]))


def quantise_file(dit: Path, output: Path, kind: type[QuantisedLinear], device: torch.device) -> None:
    """Write `dit` with the attention and feed-forward weights of its blocks in one byte, tensor by tensor.

    Raises:
        ConfigError: `output` exists, or its name does not end in .safetensors.
        ModelFileError: not a Kandinsky 5 DiT, quantised already, or not finite; nothing is left behind.
        ResourceError: no space, a folder that cannot be written, or a device without memory.
    """
    check_output(output, overwrite=None, inputs=[dit])
    with open_weight_files(find_weight_files(dit, subfolder="transformer")) as files:
        unread = unread_layout(files)
        if unread is not None:
            raise ModelFileError(f"{dit}: {unread}")
        if any(info.dtype in ONE_BYTE_DTYPES for info in files.tensors.values()):
            raise ModelFileError(f"{dit}: its weights have one byte already; give the checkpoint in bfloat16")
        quantised = _Quantised(files, kind, device)
        check_free_space(output.parent, quantised.size)
        try:
            with disk_errors(output, "run the command again"):
                write_tensor_stream(output, quantised.layout, quantised.read, files.metadata)
        except torch.OutOfMemoryError as error:
            raise ResourceError("device memory ran out: use --device cpu") from error
    log.info("wrote %s: %d layers, %s", output, len(quantised.layers), size_text(quantised.size))


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        parser = Parser(
            "python -m kandinsky5.quantise",
            "Write a DiT checkpoint with the attention and feed-forward weights of its blocks in one byte: "
            "about half the size, ready to load. LoRAs merged into it are rounded a second time.",
        )
        parser.add_argument("dit", type=Path, metavar="DIT", help="checkpoint: file, shards or folder")
        parser.add_argument("output", type=Path, metavar="OUT", help=".safetensors file to write")
        kinds = parser.add_mutually_exclusive_group(required=True)
        kinds.add_argument(
            "--int8",
            dest="kind",
            action="store_const",
            const=RotatedInt8Linear,
            help="rotated int8, for --int8_base --int8_fast; also ComfyUI's layout",
        )
        kinds.add_argument(
            "--fp8", dest="kind", action="store_const", const=Fp8Linear, help="float8, for --fp8_base"
        )
        parser.add_argument("--device", default="cpu", help="where to compute: cpu or cuda (default: cpu)")
        options = parser.parse_args(argv)
        quantise_file(options.dit, options.output, options.kind, pick_device(options.device))


if __name__ == "__main__":
    main()
