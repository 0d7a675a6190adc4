"""Finds and reads the files of a HunyuanVideo VAE."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky5.weight_checks import (
    FiniteCheck,
    WeightHash,
    describe_mismatch,
    kind_of_model,
    not_finite_message,
)
from modules.errors import ModelFileError
from modules.logs import get_logger
from modules.parsing import ParseError, parse_json
from modules.tensor_files import SAFETENSORS_SUFFIXES, TensorFile, read_header
from modules.torch_files import TORCH_SUFFIXES, read_torch_tensors

log = get_logger(__name__)

_CLASS_NAME = "AutoencoderKLHunyuanVideo"
_FILE_NAMES = ("diffusion_pytorch_model.safetensors", "pytorch_model.pt")
_ORIGINAL_PREFIX = "vae."
_MAX_CONFIG_NUMBER = 2**16
_EXPECTED = (
    "expected HunyuanVideo's VAE: a diffusers folder, its diffusion_pytorch_model.safetensors, "
    "or the original pytorch_model.pt"
)


def vae_from_config(config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> Any:
    """diffusers' class with these constructor arguments and exactly these tensors, used without a copy.

    Raises:
        ModelFileError: names or shapes differ; the message lists them.
    """
    model = _skeleton(config)
    problem = describe_mismatch(_shapes(tensors), _shapes(model.state_dict()))
    if problem:
        raise ModelFileError(problem)
    model.load_state_dict(dict(tensors), strict=True, assign=True)
    return model


def check_vae_file(path: Path) -> None:
    """Check from names and shapes alone that `path` holds a VAE that `load_vae` can load.

    Raises:
        ModelFileError: it does not; the message lists what was found.
    """
    file = _find_weights(path)
    config, _ = _read_config(file)
    _check_tensors(file, config, _read_shapes(file))


def check_vae_values(path: Path) -> None:
    """Read all weights of a VAE once, and keep none.

    Raises:
        ModelFileError: some hold NaN or infinity, or the file is damaged.
    """
    file = _find_weights(path)
    finite = FiniteCheck()
    for name, tensor in _iterate_tensors(file):
        finite.add(name, tensor)
    _refuse_bad_values(file, finite)


def _refuse_bad_values(file: Path, finite: FiniteCheck) -> None:
    bad = finite.bad_names()
    if bad:
        raise ModelFileError(f"{file}: {not_finite_message(bad)}")


def vae_fingerprint(path: Path) -> str:
    """Hash of configuration and weights for caches; independent of paths, without loading the weights.

    Raises:
        ModelFileError: as `check_vae_file`.
    """
    file = _find_weights(path)
    config, _ = _read_config(file)
    _check_tensors(file, config, _read_shapes(file))
    weights = WeightHash(json.dumps(_effective_config(config), sort_keys=True))
    if _is_safetensors(file):
        tensors = read_header(file).tensors
        weights.add_file(file, {_plain_name(name): info for name, info in tensors.items()})
    else:
        for name, tensor in _read_torch_file(file).items():
            weights.add(name, tensor)
    return weights.hexdigest()


def read_vae(path: Path, *, dtype: torch.dtype, device: torch.device) -> Any:
    """diffusers' model on `device` in `dtype`."""
    file = _find_weights(path)
    config, note = _read_config(file)
    if note:
        log.warning("%s", note)
    _check_tensors(file, config, _read_shapes(file))
    finite = FiniteCheck()
    tensors = {}
    for name, tensor in _iterate_tensors(file):
        tensors[name] = tensor.to(device, dtype)
        finite.add(name, tensor)  # as the file has it: what overflows in `dtype` is not the file's fault
    _refuse_bad_values(file, finite)
    return vae_from_config(config, tensors)


def vae_without_data(path: Path, dtype: torch.dtype) -> Any:
    """diffusers' model on the meta device in `dtype`, by its configuration alone.

    Raises:
        ModelFileError: as `check_vae_file`.
    """
    config, _ = _read_config(_find_weights(path))
    model = _skeleton(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    return model


def _find_weights(path: Path) -> Path:
    if path.is_file():
        if path.suffix.lower() not in SAFETENSORS_SUFFIXES | TORCH_SUFFIXES:
            raise ModelFileError(f"{path}: not a .safetensors or .pt file; {_EXPECTED}")
        return path
    if not path.is_dir():
        raise ModelFileError(f"{path}: no such file or folder; {_EXPECTED}")
    for folder in (path, path / "vae"):
        for name in _FILE_NAMES:
            if (folder / name).is_file():
                return folder / name
    raise ModelFileError(
        f"{path}: holds neither {' nor '.join(_FILE_NAMES)}, nor does its folder vae; {_EXPECTED}"
    )


def _read_config(weights: Path) -> tuple[dict[str, Any], str | None]:
    """Constructor arguments from the config.json beside the weights ({}: the real model), and what to log."""
    path = weights.parent / "config.json"
    if not path.is_file():
        return {}, None
    try:
        content = parse_json(path.read_bytes())
    except (OSError, ParseError) as error:
        raise ModelFileError(f"{path}: not valid JSON: {error}") from error
    class_name = content.get("_class_name") if isinstance(content, dict) else None
    if class_name != _CLASS_NAME:
        what = f"describes {class_name}" if class_name else "is of another kind"
        return {}, f"{path} {what}, not {_CLASS_NAME}, and is ignored"
    return {name: value for name, value in content.items() if not name.startswith("_")}, None


def _skeleton(config: Mapping[str, Any]) -> Any:
    """The model on the meta device: names and shapes, no memory."""
    from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import AutoencoderKLHunyuanVideo

    large = [name for name, value in config.items() if _largest(value) > _MAX_CONFIG_NUMBER]
    if large:
        raise ModelFileError(f"the VAE's config.json cannot be used: {large[0]} is larger than any VAE's")
    with torch.device("meta"):
        try:
            return AutoencoderKLHunyuanVideo(**config)
        # What a constructor makes of any JSON value in the place of its arguments.
        except (TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RuntimeError) as error:
            raise ModelFileError(f"the VAE's config.json cannot be used: {error!r}") from error


def _largest(value: Any) -> float:
    """The largest number in a JSON value: a model is built layer by layer, however many are asked for."""
    if isinstance(value, (list, dict)):
        items = value.values() if isinstance(value, dict) else value
        return max(map(_largest, items), default=0)
    return value if isinstance(value, (int, float)) else 0


def _effective_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """With defaults filled in, so that a file with its config.json and one without are the same VAE."""
    full = dict(_skeleton(config).config)
    return {name: value for name, value in full.items() if not name.startswith("_")}


def _check_tensors(file: Path, config: Mapping[str, Any], found: Mapping[str, tuple[int, ...]]) -> None:
    expected = _shapes(_skeleton(config).state_dict())
    problem = describe_mismatch(found, expected)
    if problem is None:
        return
    kind = kind_of_model(found)
    if kind and not found.keys() & expected.keys():
        raise ModelFileError(f"{file}: this looks like {kind}, not HunyuanVideo's VAE")
    raise ModelFileError(f"{file}: these are not the tensors of HunyuanVideo's VAE; {problem}")


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}


def _read_shapes(file: Path) -> dict[str, tuple[int, ...]]:
    if _is_safetensors(file):
        return {_plain_name(name): info.shape for name, info in read_header(file).tensors.items()}
    return _shapes(_read_torch_file(file))


def _iterate_tensors(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, CPU tensor in the file's dtype), one at a time."""
    if not _is_safetensors(file):
        yield from _read_torch_file(file).items()
        return
    with TensorFile(file) as opened:
        for name in opened.header.tensors:
            yield _plain_name(name), opened.read(name)


def _read_torch_file(file: Path) -> dict[str, Tensor]:
    """The tensors of a file written by torch.save; mapped, so that only what is used is read."""
    return {_plain_name(name): tensor for name, tensor in read_torch_tensors(file, is_mapped=True).items()}


def _is_safetensors(file: Path) -> bool:
    return file.suffix.lower() in SAFETENSORS_SUFFIXES


def _plain_name(name: str) -> str:
    return name.removeprefix(_ORIGINAL_PREFIX)
