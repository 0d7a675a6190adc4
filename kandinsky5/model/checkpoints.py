"""DiT checkpoints: checked by their headers, then streamed tensor by tensor into a model on the device.

A weight is read, moved to the device, joined with its LoRAs, cast or quantised, and only then is the next one
read. So the host never holds more than what is to stay there and one tensor, and a 38 GB file loads on a
machine with less memory than that.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5.configs.weights import WeightFormat, WeightsConfig
from kandinsky5.model.dit import DiffusionTransformer3D, is_float32_island
from kandinsky5.model.offload import host_placement
from kandinsky5.tasks import TASKS, DitParams
from kandinsky5.weight_checks import FiniteCheck, not_finite_message
from modules.byte_sizes import size_text
from modules.dtypes import dtype_name
from modules.errors import ModelFileError
from modules.fp8 import FP8_DTYPES, Fp8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.logs import get_logger
from modules.messages import counted, names_in_short
from modules.nf4 import Nf4Linear, quantise_nf4
from modules.quantised_files import (
    COMPANIONS,
    FP8_MARK,
    ONE_BYTE_DTYPES,
    WEIGHT_DTYPES,
    find_rotations,
    find_scale_name,
    unfit_scales,
    unread_layout,
)
from modules.quantised_linear import QuantisedLinear, StoredLinear, dequantise, normalise_scale
from modules.rotation import NO_ROTATION
from modules.tensor_files import TensorInfo
from modules.weight_files import WeightSource, find_weight_files, key_prefix, open_weight_files
from networks.lora_files import LoadedLora
from networks.lora_kandinsky import is_target_name
from networks.merging import add_deltas, is_merged_layer, write_merged

log = get_logger(__name__)

_MARKER = "visual_embeddings.in_layer.weight"
"""A key of every DiT of this family."""
_KANDINSKY_6 = ("audio_text_transformer_blocks.", "video_text_transformer_blocks.")
_FOREIGN_MODELS = (
    (("lora_A", "lora_down", "lora_unet_", "hada_w1_a"), "a LoRA file; it belongs behind --lora_weight"),
    (("encoder.down_blocks.", "decoder.up_blocks.", "encoder.conv_in."), "a VAE; it belongs behind --vae"),
    (("double_blocks.", "single_blocks."), "a Flux or HunyuanVideo model"),
    (("blocks.0.self_attn.", "patch_embedding."), "a Wan model"),
    (("transformer_blocks.0.attn.", "transformer_blocks.0.attn1."), "a model of another family"),
    (("visual.blocks.", "model.layers.", "model.language_model."), "a Qwen text encoder"),
    (("text_model.", "vision_model."), "a CLIP model"),
)


@dataclass(frozen=True, slots=True)
class DitFileInfo:
    """The parsed headers of a DiT checkpoint."""

    files: tuple[Path, ...]
    prefix: str
    """Before every key; empty in the published files."""
    tensors: Mapping[str, TensorInfo]
    """By the model's own keys."""
    rotations: Mapping[str, int]
    """Of int8 weights, by the model's own layer: the block of the rotation that they are stored in."""

    @property
    def is_fp8(self) -> bool:
        return any(info.dtype in FP8_DTYPES for info in self.tensors.values())

    def describe(self) -> str:
        """Files, size and dtypes in one line."""
        elements: Counter[str] = Counter()
        for info in self.tensors.values():
            elements[dtype_name(info.dtype)] += (info.end - info.start) // info.dtype.itemsize
        size = sum(info.end - info.start for info in self.tensors.values())
        parts = ", ".join(f"{count / 1e6:.1f} M {name}" for name, count in elements.most_common())
        return f"{self.files[0].name}: {len(self.files)} file(s), {size_text(size)}, {parts}"


_DEFAULT_WEIGHTS = WeightsConfig()


def _layer_class(weights: WeightsConfig) -> type[QuantisedLinear]:
    """What holds attention and feed-forward weights of one byte."""
    if weights.weight_format is WeightFormat.FP8:
        return Fp8Linear
    return RotatedInt8Linear if weights.rotates_weights else Int8Linear


def build_meta_dit(params: DitParams, compute_dtype: torch.dtype) -> DiffusionTransformer3D:
    """The model without memory for its weights."""
    with torch.device("meta"):
        return DiffusionTransformer3D(**params.as_kwargs(), compute_dtype=compute_dtype)


def check_dit_file(path: Path, params: DitParams) -> DitFileInfo:
    """Check that `path` holds every tensor of the model and nothing else; only headers are read.

    Args:
        path: a file, a shard or index of several, or a diffusers folder (`transformer/` or its parent).
    Raises:
        ModelFileError: missing, damaged, another kind of model, or another size (with the first names).
    """
    files = find_weight_files(path, subfolder="transformer")
    with open_weight_files(files) as weights:
        return _check_tensors(path, files, weights, params)


def _check_tensors(
    path: Path, files: tuple[Path, ...], weights: WeightSource, params: DitParams
) -> DitFileInfo:
    found = weights.tensors
    _refuse_other_kinds(path, weights)
    expected = _expected_shapes(params)
    # The tensors outside the blocks are the same in every size of the model.
    outside = [key for key in expected if "_transformer_blocks." not in key]
    prefix = key_prefix(found, _MARKER) or ""
    tensors = {key: found[prefix + key] for key in expected if prefix + key in found}
    if sum(key in tensors for key in outside) < len(outside) // 2:
        raise ModelFileError(f"{path}: not a Kandinsky 5 DiT{_foreign_hint(found)}")
    extra = [name for name in found if name.removeprefix(prefix) not in expected]
    missing = [key for key in expected if key not in tensors]
    odd_shapes = [
        f"{key} {list(info.shape)} instead of {list(expected[key])}"
        for key, info in tensors.items()
        if info.shape != expected[key]
    ]
    odd_dtypes = [
        f"{key} {dtype_name(i.dtype)}"
        for key, i in tensors.items()
        if i.dtype not in WEIGHT_DTYPES or (i.dtype == torch.int8 and len(i.shape) != 2)
    ]
    another = "another shape (is this another model size or task?)"
    belong = "belong to the model"
    rotations, unread = find_rotations(weights)
    problems = [
        _listed(path, "tensor is missing", "tensors are missing", missing),
        _listed(
            path,
            f"tensor does not {belong}",
            f"tensors do not {belong}",
            _unexplained(extra, prefix, tensors),
        ),
        _listed(path, f"tensor has {another}", f"tensors have {another}", odd_shapes),
        _listed(
            path,
            "tensor has a dtype that cannot be used",
            "tensors have a dtype that cannot be used",
            odd_dtypes,
        ),
        _listed(
            path,
            "scale does not fit its weight",
            "scales do not fit their weights",
            unfit_scales(found, prefix),
        ),
        _listed(path, "int8 weight cannot be read", "int8 weights cannot be read", unread),
    ]
    if any(problems):
        tasks = _tasks_of({name.removeprefix(prefix): info.shape for name, info in found.items()})
        if tasks and (missing or odd_shapes):
            raise ModelFileError(
                f"{path}: is a checkpoint of another size or task; use --task {' or '.join(tasks)}"
            )
        raise ModelFileError([problem for problem in problems if problem])
    layers = {layer.removeprefix(prefix): block for layer, block in rotations.items()}
    return DitFileInfo(files, prefix, tensors, layers)


def _refuse_other_kinds(path: Path, weights: WeightSource) -> None:
    """Name a checkpoint of another model or in a layout that is not read, instead of listing its tensors."""
    newer = next((name for name in weights.tensors if any(mark in name for mark in _KANDINSKY_6)), None)
    if newer is not None:
        raise ModelFileError(
            f"{path}: this is a Kandinsky 6 model (key {newer}); Kandinsky 5 is trained and sampled here. "
            "Download a Kandinsky 5 checkpoint (docs/kandinsky5.md, Download)"
        )
    layout = unread_layout(weights)
    if layout is not None:
        raise ModelFileError(f"{path}: {layout}")


def _expected_shapes(params: DitParams) -> dict[str, tuple[int, ...]]:
    return {
        key: tuple(tensor.shape)
        for key, tensor in build_meta_dit(params, torch.bfloat16).state_dict().items()
    }


def _tasks_of(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """The tasks whose checkpoint has tensors of these shapes, and no others in its blocks."""
    blocks = {name.partition(".self_attention.")[0] for name in shapes if ".self_attention." in name}
    fitting: dict[DitParams, bool] = {}
    for task in TASKS.values():
        params = task.dit_params
        if params not in fitting:
            expected = _expected_shapes(params)
            same_depth = len(blocks) == params.num_text_blocks + params.num_visual_blocks
            fitting[params] = same_depth and all(shapes.get(key) == shape for key, shape in expected.items())
    return [task.name for task in TASKS.values() if fitting[task.dit_params]]


def _unexplained(extra: Sequence[str], prefix: str, tensors: Mapping[str, TensorInfo]) -> list[str]:
    """The names among `extra` that are no companions of a one-byte weight, and no mark of such a file."""
    is_quantised = any(info.dtype in ONE_BYTE_DTYPES for info in tensors.values())
    return [
        name
        for name in extra
        if name.removeprefix(prefix) != FP8_MARK and not (is_quantised and name.endswith(COMPANIONS))
    ]


def _listed(path: Path, one: str, many: str, names: Sequence[str]) -> str:
    if not names:
        return ""
    return f"{path}: {counted(len(names), one, many)}: {names_in_short(names)}"


def _foreign_hint(found: Mapping[str, TensorInfo]) -> str:
    for marks, kind in _FOREIGN_MODELS:
        for name in found:
            if any(mark in name for mark in marks):
                return f": this looks like {kind} (key {name})"
    return f"; its first keys: {names_in_short(found) or 'none'}"


def file_name_warning(path: Path, *, is_i2v: bool) -> str | None:
    """A warning if file name and task disagree on T2V and I2V, which the tensors do not show."""
    name = path.name.lower()
    said, wanted = ("t2v", "i2v") if is_i2v else ("i2v", "t2v")
    if said in name and wanted not in name:
        return f"{path.name} sounds like a {said.upper()} model, but the task is {wanted.upper()}"
    return None


def load_dit(
    source: Path | WeightSource,
    params: DitParams,
    weights: WeightsConfig = _DEFAULT_WEIGHTS,
    *,
    device: torch.device,
    compute_dtype: torch.dtype,
    loras: Sequence[LoadedLora] = (),
) -> DiffusionTransformer3D:
    """Load a DiT, frozen, with every weight cast, merged and quantised on `device` as it is read.

    Args:
        source: the files, see `check_dit_file`, or what gives the tensors in their place.
        weights: format and place; in fewer bits the attention and feed-forward layers of the blocks
            become a `StoredLinear`; call `check_weight_format` first.
        device: where tensors are cast and quantised; on "meta" only headers are read, and the model that
            is returned has all dtypes and sizes but no data.
        compute_dtype: of activations and of all weights but the float32 islands, which keep the file's dtype.
        loras: merged before quantisation, in float32 with one rounding.
    Raises:
        ModelFileError: see `check_dit_file`; or a tensor holds NaN or infinite values.
    """
    if device.type != "meta":
        log.info("loading the DiT")
    placement = host_placement(
        params, device, blocks_to_swap=weights.blocks_to_swap, modulation_on_host=weights.modulation_on_host
    )
    if isinstance(source, Path):
        path, files = source, find_weight_files(source, subfolder="transformer")
        opening = open_weight_files(files, use_mmap=not weights.disable_numpy_memmap)
    else:
        path, files, opening = Path(type(source).__name__), (), nullcontext(source)
    with opening as opened:
        info = _check_tensors(path, files, opened, params)
        dit = build_meta_dit(params, compute_dtype)
        reader = _WeightReader(opened, info, device, check_finite=not weights.no_weight_check)
        if device.type != "meta":
            _report_stored_weights(path, info, weights, has_loras=bool(loras))
        stored: dict[str, StoredLinear] = {}
        # In file order: a hard disk then reads straight through.
        for key in sorted(info.tensors, key=lambda key: info.tensors[key].start):
            layer, _, name = key.rpartition(".")
            target_device = placement(key)
            if weights.is_quantised and name == "weight" and is_target_name(layer):
                stored[layer] = reader.read_layer(key, loras, weights, compute_dtype, target_device)
                continue
            dtype = compute_dtype
            if is_float32_island(key) and info.tensors[key].dtype not in ONE_BYTE_DTYPES:
                dtype = info.tensors[key].dtype
            _set_parameter(dit, key, reader.owned(reader.read(key, loras).to(dtype).to(target_device)))
        reader.raise_if_not_finite(path)
    for layer, linear in stored.items():
        plain = dit.get_submodule(layer)
        assert isinstance(plain, nn.Linear)
        linear.bias = plain.bias  # read by now
        dit.set_submodule(layer, linear)
    dit.reset_buffers(device)
    if device.type != "meta":
        _assert_materialised(dit)
    return dit.requires_grad_(False)


def _report_stored_weights(path: Path, info: DitFileInfo, weights: WeightsConfig, *, has_loras: bool) -> None:
    """Log what becomes of weights that the file holds in one byte."""
    wanted = weights.weight_format
    if wanted is WeightFormat.COMPUTE_DTYPE:
        return
    bases = {"float8": "--fp8_base", "int8": "--int8_base", "nf4": "--nf4_base"}
    for form, is_held in (("float8", info.is_fp8), ("int8", bool(info.rotations))):
        if is_held and wanted.value != form:
            text = "%s is %s already: %s rounds its weights a second time; %s takes them as they are"
            log.warning(text, path.name, form, bases[wanted.value], bases[form])
        elif is_held and has_loras:
            log.warning("%s is %s already: merging a LoRA rounds its weights a second time", path.name, form)
    blocks = sorted({block for block in info.rotations.values() if block != NO_ROTATION})
    if info.rotations and wanted is WeightFormat.INT8:
        how = f"rotated in blocks of {', '.join(map(str, blocks))}" if blocks else "not rotated"
        log.info("%s is int8 already, %s: taken as it is", path.name, how)


class _WeightReader:
    """Reads tensors by the model's keys onto the device, and notes which of them are not finite.

    On the CPU what it reads may still lie in the mapped file: `owned` copies what is to stay.
    """

    def __init__(
        self, weights: WeightSource, info: DitFileInfo, device: torch.device, *, check_finite: bool
    ) -> None:
        self._weights, self._info, self._device = weights, info, device
        self._finite = FiniteCheck() if check_finite else None
        self._last_read = 0

    def owned(self, tensor: Tensor) -> Tensor:
        """The tensor, made of what was read last, in memory of its own."""
        is_in_file = tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() == self._last_read
        return tensor.clone() if is_in_file else tensor

    def read(self, key: str, loras: Sequence[LoadedLora]) -> Tensor:
        """The tensor with its LoRAs; float32 if it had one byte or was merged, else in the file's dtype."""
        tensor = self._raw(key)
        layer, _, name = key.rpartition(".")
        if tensor.dtype in ONE_BYTE_DTYPES:
            # Scales belong to matrices; biases and norms can only be plain casts.
            is_matrix = tensor.ndim == 2
            rotation = self._info.rotations.get(layer, NO_ROTATION)
            scale = self._scale(layer) if is_matrix else None
            tensor = tensor.float() if scale is None else dequantise(tensor, scale, torch.float32, rotation)
        return add_deltas(tensor, layer, loras) if name == "weight" else tensor

    def read_layer(
        self,
        key: str,
        loras: Sequence[LoadedLora],
        weights: WeightsConfig,
        compute_dtype: torch.dtype,
        target: torch.device,
    ) -> StoredLinear:
        """The layer of a weight, stored as `weights` asks for on the device `target`, without a bias."""
        if weights.weight_format is WeightFormat.NF4:
            packed = quantise_nf4(self.read(key, loras)).to(target)
            return Nf4Linear(packed, None, compute_dtype=compute_dtype)
        kind, weight8, scale, rotation = self._read_quantised(key, loras, _layer_class(weights))
        return kind(
            self.owned(weight8.to(target)),
            scale.to(target),
            None,
            compute_dtype=compute_dtype,
            use_fast=weights.use_fast_products,
            rotation=rotation,
        )

    def _read_quantised(
        self, key: str, loras: Sequence[LoadedLora], layer_class: type[QuantisedLinear]
    ) -> tuple[type[QuantisedLinear], Tensor, Tensor, int]:
        """(layer, weight, scale, rotation) in one byte.

        A tensor that is stored in the wanted type and not merged is taken as it is, with its own rotation.
        """
        layer = key.rpartition(".")[0]
        dtype = self._info.tensors[key].dtype
        stored = dtype in FP8_DTYPES if layer_class is Fp8Linear else dtype == layer_class.weight_dtype
        if stored and not is_merged_layer(layer, loras):
            weight8, rotation = self._raw(key), self._info.rotations.get(layer, NO_ROTATION)
            if dtype == torch.int8:
                layer_class = Int8Linear if rotation == NO_ROTATION else RotatedInt8Linear
            return layer_class, weight8, normalise_scale(self._scale(layer), weight8.shape[0]), rotation
        weight8, scale = layer_class.quantise(self.read(key, loras))
        return layer_class, weight8, scale, layer_class.rotation_of(weight8.shape[1])

    def raise_if_not_finite(self, path: Path) -> None:
        """Ask the device once, at the end, about all tensors."""
        bad = self._finite.bad_names() if self._finite is not None else []
        if bad:
            raise ModelFileError(f"{path}: {not_finite_message(bad)}; --no_weight_check skips this check.")

    def _raw(self, key: str) -> Tensor:
        if self._device.type == "meta":
            info = self._info.tensors[key]
            return torch.empty(info.shape, dtype=info.dtype, device=self._device)
        mapped = self._weights.view(self._info.prefix + key)
        self._last_read = mapped.untyped_storage().data_ptr()
        tensor = mapped.to(self._device)
        if self._finite is not None:
            self._finite.add(key, tensor)
        return tensor

    def _scale(self, layer: str) -> Tensor:
        name = find_scale_name(self._weights.tensors, self._info.prefix + layer)
        if name is None:  # a plain cast to float8
            return torch.ones((), device=self._device)
        scale = self._weights.read(name).to(self._device)
        if self._finite is not None and self._device.type != "meta":
            self._finite.add(name, scale)
        return scale


def _set_parameter(dit: nn.Module, key: str, tensor: Tensor) -> None:
    layer, _, name = key.rpartition(".")
    setattr(dit.get_submodule(layer), name, nn.Parameter(tensor, requires_grad=False))


def _assert_materialised(dit: nn.Module) -> None:
    left = [name for name, tensor in [*dit.named_parameters(), *dit.named_buffers()] if tensor.is_meta]
    assert not left, f"left without memory: {left}"


def save_merged_model(
    path: Path, params: DitParams, loras: Sequence[LoadedLora], output: Path, *, device: torch.device
) -> None:
    """Write the checkpoint with LoRAs added: same keys and dtypes, metadata kept, tensor by tensor.

    Raises:
        UserError: see `check_dit_file` and `write_merged`.
    """
    info = check_dit_file(path, params)
    with open_weight_files(info.files) as weights:
        write_merged(weights, output, loras, prefix=info.prefix, device=device)
