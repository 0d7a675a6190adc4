"""Finds the folders of the text encoders and reads only the files required to encode captions."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kandinsky5.configs.text_encoders import Quantization
from kandinsky5.weight_checks import (
    FiniteCheck,
    WeightHash,
    describe_mismatch,
    kind_of_model,
    not_finite_message,
)
from modules.errors import ModelFileError, ResourceError
from modules.fp8 import Fp8Linear, quantise_rows
from modules.logs import get_logger
from modules.parsing import parse_json
from modules.path_kinds import HUB_ID
from modules.tensor_files import TensorFile, TensorInfo, read_header

log = get_logger(__name__)

EncoderKind = Literal["qwen", "clip"]

_FLAGS = {"qwen": "--text_encoder_qwen", "clip": "--text_encoder_clip"}
_NAMES = {"qwen": "Qwen2.5-VL", "clip": "a CLIP text encoder"}
_EXAMPLES = {"qwen": "Qwen/Qwen2.5-VL-7B-Instruct", "clip": "openai/clip-vit-large-patch14"}
_MODEL_TYPES = {"qwen": ("qwen2_5_vl", "qwen2_5_vl_text"), "clip": ("clip", "clip_text_model")}
# Where diffusers' folders keep the tokenizer of the encoder beside it.
_TOKENIZER_SIBLINGS = {"qwen": "tokenizer", "clip": "tokenizer_2"}
_TOKENIZER_FILES = ("tokenizer.json", "vocab.json")
_HUB_FILES = ["*.json", "*.txt", "*.safetensors"]
_INDEX = "model.safetensors.index.json"
_SINGLE_FILE = "model.safetensors"

# In the order in which they are tried: a longer prefix before the one it begins with.
_PREFIXES = {
    "qwen": ("model.language_model.", "language_model.model.", "language_model.", "model."),
    "clip": ("text_model.",),
}
_LEFT_OUT = {
    "qwen": ("visual.", "model.visual.", "lm_head.", "language_model.lm_head."),
    "clip": ("vision_model.", "logit_scale", "text_projection.", "visual_projection."),
}
_IGNORED_SUFFIXES = ("position_ids", "rotary_emb.inv_freq")  # tables that are computed, found in old files
_WEIGHT_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LoadedEncoder:
    """A text model on its device, its tokenizer, and a hash of both."""

    model: Any
    tokenizer: Any
    fingerprint: str
    folder: Path


def check_text_encoder(name: str, kind: EncoderKind, width: int | None = None) -> list[str]:
    """Check an encoder without loading it; hub ids are not downloaded.

    Args:
        width: the hidden size that the DiT takes; None leaves it unchecked.
    """
    try:
        folder = _local_folder(name, kind)
        if folder is None:
            return []
        _check_folder(folder, kind)
        config = _read_json(folder / "config.json", kind)
    except ModelFileError as error:
        return error.problems
    nested = config.get("text_config")
    found = (nested if isinstance(nested, dict) else {}).get("hidden_size", config.get("hidden_size"))
    if width is not None and found is not None and found != width:
        return [wrong_width_message(kind, found, width)]
    return []


def wrong_width_message(kind: EncoderKind, found: int, wanted: int) -> str:
    """Message for an encoder that does not match the DiT."""
    return f"{_FLAGS[kind]}: the model is {found} wide, the task's DiT takes {wanted}"


def encoder_fingerprint(name: str, kind: EncoderKind, quantization: Quantization | None = None) -> str:
    """Compute the loaded encoder's `fingerprint`; reads only the first bytes of the weights."""
    folder = resolve_folder(name, kind)
    files = {file: _wanted(file, kind) for file in _weight_files(folder, kind)}
    return _fingerprint(folder, kind, files, _load_tokenizer(folder, kind), quantization)


def encoder_bytes(name: str, kind: EncoderKind) -> int | None:
    """Bytes of the weights that are read, as the files hold them; None for a hub id that is not here yet."""
    folder = _local_folder(name, kind)
    if folder is None:
        return None
    wanted = [_wanted(file, kind) for file in _weight_files(folder, kind)]
    return sum(info.end - info.start for tensors in wanted for _, info in tensors.values())


def load_qwen(
    name: str, *, device: torch.device, dtype: torch.dtype, quantization: Quantization | None
) -> LoadedEncoder:
    """The language model of Qwen2.5-VL without vision tower and head, weights in `dtype` or quantised."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

    folder = resolve_folder(name, "qwen")
    config = _read_model_config(folder, "qwen")
    model = _without_weights(folder, "qwen", lambda: Qwen2_5_VLTextModel(config))
    placers = {None: _plain_placer, "nf4": _nf4_placer, "fp8": _fp8_placer}
    place = placers[quantization](model, device, dtype)
    return _load(model, folder, "qwen", place, device, quantization)


def load_clip(name: str, *, device: torch.device) -> LoadedEncoder:
    """CLIP's text model in float32, from its own folder or a whole CLIPModel's."""
    from transformers import CLIPTextModel

    folder = resolve_folder(name, "clip")
    config = _read_model_config(folder, "clip")
    model = _without_weights(folder, "clip", lambda: CLIPTextModel(config))
    return _load(model, folder, "clip", _plain_placer(model, device, torch.float32), device, None)


def resolve_folder(name: str, kind: EncoderKind) -> Path:
    """The folder a `--text_encoder_*` value means; a hub id is downloaded or taken from the hub's cache.

    Raises:
        ModelFileError: neither a usable folder nor a model available on the hub.
    """
    folder = _local_folder(name, kind)
    if folder is None:
        folder = _download(name, kind)
    _check_folder(folder, kind)
    return folder


def _local_folder(name: str, kind: EncoderKind) -> Path | None:
    """The folder, or None for what must be a hub id."""
    path = Path(name)
    if path.is_dir():
        return path
    hint = f"give a folder with config.json, weights and tokenizer, or a hub id such as {_EXAMPLES[kind]}"
    if path.exists():
        raise ModelFileError(f"{_FLAGS[kind]} {name}: is a file; {hint}")
    if not HUB_ID.fullmatch(name):
        raise ModelFileError(f"{_FLAGS[kind]} {name}: no such folder; {hint}")
    return None


def _download(name: str, kind: EncoderKind) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(
            f"{_FLAGS[kind]} {name}: no such folder, and it cannot be had from the Hugging Face hub "
            f"({reason}). Download it once with a connection, or give the path of a local copy"
        ) from error


def _check_folder(folder: Path, kind: EncoderKind) -> None:
    config = _read_json(folder / "config.json", kind)
    found = config.get("model_type")
    if found not in _MODEL_TYPES[kind]:
        raise ModelFileError(
            f"{_FLAGS[kind]} {folder}: config.json describes {found or 'no transformers model'}, "
            f"not {_NAMES[kind]}"
        )
    tokenizer = _tokenizer_folder(folder, kind)
    for path in (folder / "config.json", tokenizer / "tokenizer_config.json"):
        # Such a model brings its own Python code. Nothing here would run it; saying so beats ignoring it.
        if path.is_file() and "auto_map" in _read_json(path, kind):
            raise ModelFileError(
                f"{_FLAGS[kind]} {folder}: {path.name} names code of its own (auto_map): refused"
            )
    for file in _weight_files(folder, kind):
        read_header(file)


def _tokenizer_folder(folder: Path, kind: EncoderKind) -> Path:
    candidates = (folder, folder.parent / _TOKENIZER_SIBLINGS[kind])
    for candidate in candidates:
        if any((candidate / name).is_file() for name in _TOKENIZER_FILES):
            return candidate
    raise ModelFileError(
        f"{_FLAGS[kind]} {folder}: no {' or '.join(_TOKENIZER_FILES)} there, nor in {candidates[1]}"
    )


def _weight_files(folder: Path, kind: EncoderKind) -> list[Path]:
    index = folder / _INDEX
    if not index.is_file():
        if (folder / _SINGLE_FILE).is_file():
            return [folder / _SINGLE_FILE]
        raise ModelFileError(f"{_FLAGS[kind]} {folder}: holds neither {_SINGLE_FILE} nor {_INDEX}")
    weight_map = _read_json(index, kind).get("weight_map")
    if not isinstance(weight_map, dict):
        raise ModelFileError(f"{_FLAGS[kind]} {index}: has no weight_map")
    files = [folder / name for name in sorted({str(name) for name in weight_map.values()})]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise ModelFileError(
            f"{_FLAGS[kind]} {folder}: {len(missing)} of {len(files)} weight files are missing: "
            f"{', '.join(missing)}. Copy or download them again"
        )
    return files


def _read_json(path: Path, kind: EncoderKind) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ModelFileError(f"{_FLAGS[kind]} {path.parent}: has no {path.name}") from error
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{_FLAGS[kind]} {path}: cannot be read as JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{_FLAGS[kind]} {path}: is not a JSON table")
    return content


def _read_model_config(folder: Path, kind: EncoderKind) -> Any:
    from transformers import AutoConfig

    with _settings_errors(folder, kind, "config.json cannot be used"):
        config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        return config.get_text_config()


@contextmanager
def _settings_errors(folder: Path, kind: EncoderKind, what: str) -> Iterator[None]:
    """Within the block, whatever transformers makes of the settings in a folder becomes a message.

    Raises:
        ModelFileError: instead of any Exception: tokenizers raises `Exception` itself, and transformers
            whatever its code meets where a value has another type than expected.
    """
    try:
        yield
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise ModelFileError(f"{_FLAGS[kind]} {folder}: {what}: {reason}") from error


def _without_weights(folder: Path, kind: EncoderKind, build: Callable[[], Any]) -> Any:
    """A model whose parameters take no memory yet; computed tables (buffers) are real."""
    from accelerate import init_empty_weights

    unusable = _settings_errors(folder, kind, "config.json cannot be used")
    with unusable, init_empty_weights(include_buffers=False):
        return build().requires_grad_(False).eval()


Placer = Callable[[str, Tensor], None]
"""Puts one tensor, given by its name in the model, into the model."""

WantedTensors = dict[Path, dict[str, tuple[str, TensorInfo]]]
"""Per weight file: name in the model without prefix -> (name in the file, where it lies)."""


def _load(
    model: Any,
    folder: Path,
    kind: EncoderKind,
    place: Placer,
    device: torch.device,
    quantization: Quantization | None,
) -> LoadedEncoder:
    """Stream the weights in: besides the model itself, one tensor is held at a time."""
    expected = {_plain_name(name, kind): name for name in model.state_dict()}
    files = {file: _wanted(file, kind) for file in _weight_files(folder, kind)}
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    _check_weights(folder, kind, files, {plain: shapes[name] for plain, name in expected.items()})
    finite = FiniteCheck()
    for plain, tensor in _read_weights(files):
        on_device = tensor.to(device)
        finite.add(plain, on_device)
        place(expected[plain], on_device)
    bad = finite.bad_names()
    if bad:
        raise ModelFileError(f"{_FLAGS[kind]} {folder}: {not_finite_message(bad)}")
    model.to(device)
    tokenizer = _load_tokenizer(folder, kind)
    return LoadedEncoder(model, tokenizer, _fingerprint(folder, kind, files, tokenizer, quantization), folder)


def local_tokenizer(name: str, kind: EncoderKind) -> Any | None:
    """The tokenizer of an encoder that is on this machine; None for a hub id that is not.

    Raises:
        ModelFileError: the folder cannot be used.
    """
    folder = _local_folder(name, kind)
    if folder is None:
        return None
    _check_folder(folder, kind)
    return _load_tokenizer(folder, kind)


def _load_tokenizer(folder: Path, kind: EncoderKind) -> Any:
    from transformers import AutoTokenizer

    source = _tokenizer_folder(folder, kind)
    with _settings_errors(source, kind, "tokenizer cannot be loaded"):
        return AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)


def _fingerprint(
    folder: Path, kind: EncoderKind, files: WantedTensors, tokenizer: Any, quantization: Quantization | None
) -> str:
    weights = WeightHash(
        kind,
        quantization or "",
        json.dumps(_stable_config(_read_json(folder / "config.json", kind)), sort_keys=True),
        json.dumps(sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])),
    )
    for file, wanted in files.items():
        weights.add_file(file, {plain: info for plain, (_, info) in wanted.items()})
    return weights.hexdigest()


def _wanted(file: Path, kind: EncoderKind) -> dict[str, tuple[str, TensorInfo]]:
    """What a weight file holds of the text model."""
    return {
        _plain_name(name, kind): (name, info)
        for name, info in read_header(file).tensors.items()
        if not name.startswith(_LEFT_OUT[kind]) and not name.endswith(_IGNORED_SUFFIXES)
    }


def _plain_name(name: str, kind: EncoderKind) -> str:
    for prefix in _PREFIXES[kind]:
        if name.startswith(prefix):
            return name.removeprefix(prefix)
    return name


def _check_weights(
    folder: Path,
    kind: EncoderKind,
    files: WantedTensors,
    expected: dict[str, tuple[int, ...]],
) -> None:
    found = {plain: info for wanted in files.values() for plain, (_, info) in wanted.items()}
    problem = describe_mismatch({plain: info.shape for plain, info in found.items()}, expected)
    if problem:
        look = kind_of_model(found)
        hint = f"this looks like {look}; " if look and len(found.keys() & expected.keys()) == 0 else ""
        raise ModelFileError(f"{_FLAGS[kind]} {folder}: weights do not fit config.json: {hint}{problem}")
    odd = [f"{plain} ({info.dtype})" for plain, info in found.items() if info.dtype not in _WEIGHT_DTYPES]
    if odd:
        raise ModelFileError(
            f"{_FLAGS[kind]} {folder}: {len(odd)} weights are neither float32, float16 nor bfloat16, "
            f"first: {odd[0]}. Give the unquantised model; --fp8_llm and --quantized_qwen make it smaller "
            "while loading"
        )


def _read_weights(files: WantedTensors) -> Iterator[tuple[str, Tensor]]:
    for file, wanted in files.items():
        with TensorFile(file) as opened:
            for plain, (name, _) in wanted.items():
                yield plain, opened.read(name)


def _plain_placer(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Placer:
    def place(name: str, tensor: Tensor) -> None:
        module, leaf = _owner(model, name)
        setattr(module, leaf, nn.Parameter(tensor.to(device, dtype), requires_grad=False))

    return place


def _nf4_placer(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Placer:
    """4-bit NF4 with double quantisation for the Linears of the layers, `dtype` for the rest."""
    try:
        from bitsandbytes.nn import Linear4bit, Params4bit
    except ImportError as error:
        raise ResourceError(
            f"--quantized_qwen needs bitsandbytes, which cannot be imported ({error}): "
            "pip install bitsandbytes"
        ) from error
    place_plain = _plain_placer(model, device, dtype)
    for path, linear in list(model.named_modules()):
        if isinstance(linear, nn.Linear):
            parent, leaf = _owner(model, path)
            with torch.device("meta"):
                quantized = Linear4bit(
                    linear.in_features,
                    linear.out_features,
                    bias=linear.bias is not None,
                    compute_dtype=dtype,
                    compress_statistics=True,
                    quant_type="nf4",
                )
            setattr(parent, leaf, quantized.requires_grad_(False))

    def place(name: str, tensor: Tensor) -> None:
        module, leaf = _owner(model, name)
        if not isinstance(module, Linear4bit) or leaf != "weight":
            place_plain(name, tensor)
            return
        weight: Any = Params4bit(
            tensor.contiguous(),
            requires_grad=False,
            compress_statistics=True,  # pyright: ignore[reportCallIssue]
            quant_type="nf4",  # pyright: ignore[reportCallIssue]
            module=module,  # pyright: ignore[reportCallIssue]
        )
        module.weight = weight.to(device)

    return place


def _fp8_placer(model: nn.Module, device: torch.device, dtype: torch.dtype) -> Placer:
    """float8 with a scale per row for the Linears of the layers, `dtype` for the rest."""
    place_plain = _plain_placer(model, device, dtype)
    linears = {path: module for path, module in model.named_modules() if isinstance(module, nn.Linear)}
    waiting: dict[str, dict[str, Tensor]] = {path: {} for path in linears}

    def place(name: str, tensor: Tensor) -> None:
        path, _, leaf = name.rpartition(".")
        if path not in linears:
            place_plain(name, tensor)
            return
        waiting[path][leaf] = tensor.to(device, dtype) if leaf == "bias" else tensor
        if len(waiting[path]) < 1 + (linears[path].bias is not None):
            return
        parts = waiting.pop(path)
        weight8, scale = quantise_rows(parts["weight"].to(device))
        linear = Fp8Linear(weight8, scale, parts.get("bias"), compute_dtype=dtype)
        model.set_submodule(path, linear.requires_grad_(False))

    return place


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, leaf = name.rpartition(".")
    return model.get_submodule(path), leaf


def _stable_config(config: dict[str, Any]) -> dict[str, Any]:
    """Without what says nothing about the numbers."""
    incidental = ("transformers_version", "_name_or_path", "architectures", "torch_dtype", "dtype")
    return {name: value for name, value in config.items() if name not in incidental}
