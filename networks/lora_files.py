"""Reads LoRA files of every layout in use.

Layouts (told apart by their keys, see `lora_keys`):

    transformer.<layer>.lora_A.weight                diffusers, SimpleTuner; our default
    diffusion_model.<layer>.lora_A.weight            ComfyUI, diffusion-pipe
    base_model.model.<layer>.lora_A[.default].weight PEFT, the official adapters; also without the prefix
    lora_unet_<layer_with_underscores>.lora_down.weight   kohya, musubi-tuner, with `.alpha`
    lycoris_<layer_with_underscores>.hada_w1_a, ...       LyCORIS, with `.alpha`

lora_A is lora_down [rank, in], lora_B is lora_up [out, rank].
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from modules.errors import ConfigError, ModelFileError
from modules.logs import get_logger
from modules.messages import names_in_short
from modules.tensor_files import SAFETENSORS_SUFFIXES, read_tensors
from modules.torch_files import TORCH_SUFFIXES, read_torch_tensors
from networks.dora import DoraFactors, foldable
from networks.factors import LayerFactors, factors_from_roles
from networks.lora import LoRANetwork
from networks.lora_keys import (
    ForeignKind,
    KeyGroups,
    LayerNames,
    foreign_kind,
    group_keys,
    is_marker,
    parse_key,
)
from networks.lora_scales import FOLDED_MARK, UNSCALED, PeftSettings, find_settings, header_settings
from networks.lora_types import MAGNITUDE, LoraType, type_of_roles

log = get_logger(__name__)

LayerSizes = tuple[int, int]
"""(out_features, in_features)."""

_NAMES_IN_FOLDERS = (
    *("adapter_model.safetensors", "adapter_model.bin"),
    *("pytorch_lora_weights.safetensors", "lora.safetensors"),
)
"""Of PEFT, diffusers and the official adapters."""
_MAX_TRIGGER_LENGTH = 500
PARTIAL_HELP = "use a LoRA even if some of its keys match no layer"
"""Of `--lora_allow_partial`, which messages offer."""


@dataclass(frozen=True, slots=True)
class LoadedLora:
    """A LoRA file, ready to be merged, applied or trained further."""

    path: Path
    layers: Mapping[str, LayerFactors]
    """By dotted layer name."""
    metadata: Mapping[str, str]
    trigger: str | None = None
    """Words that its author wants put before the prompt."""
    multiplier: float = 1.0

    def with_multiplier(self, multiplier: float) -> LoadedLora:
        """The same LoRA at another strength."""
        return replace(self, multiplier=multiplier)

    def adapter_type(self) -> LoraType:
        """The kind of adapter that can stand beside the model's layers with these factors.

        Raises:
            ConfigError: there is none, and the file can only be merged.
        """
        roles = {frozenset(layer.tensors) for layer in self.layers.values()}
        kind = type_of_roles(roles.pop()) if len(roles) == 1 else None
        if kind is None or not all(map(foldable, self.layers.values())):
            raise ConfigError(
                f"{self.path}: holds LoHa or LoKr layers, layers of several kinds, or magnitudes per column, "
                "which can only be merged; a LoRA or DoRA is required here"
            )
        return kind


def read_lora(
    path: Path,
    layers: Mapping[str, LayerSizes] | Collection[str],
    *,
    allow_partial: bool = False,
    include_patterns: Sequence[str] = (),
    exclude_patterns: Sequence[str] = (),
) -> LoadedLora:
    """Read a LoRA, LoHa or LoKr file of any layout for a model with the given linear layers.

    Args:
        layers: the model's linear layers by dotted name, with (out_features, in_features) if they are known.
        allow_partial: only warn about keys without a layer, as long as some match.
        include_patterns, exclude_patterns: regular expressions searched in the keys; others are left out.
    Raises:
        ModelFileError: missing, damaged, not a LoRA, made for another model, or not fully usable.
        ConfigError: a pattern is no regular expression.
    """
    path = lora_file(path)
    tensors, metadata = read_adapter_tensors(path)
    chosen = _filter_keys(tensors, include_patterns, exclude_patterns)
    foreign = [key for key in tensors if parse_key(key) is None]
    if len(foreign) == len(tensors):
        raise ModelFileError(f"{path}: {_what_it_is(foreign)}")
    groups = group_keys([key for key in chosen if key not in foreign], LayerNames(layers))
    _check_matches(path, groups, [key for key in chosen if key in foreign], allow_partial)
    raw = {
        layer: _build_layer(path, layer, {role: tensors[key] for role, key in roles.items()})
        for layer, roles in groups.layers.items()
    }
    loaded = _scaled_layers(path, raw, metadata, groups)
    if isinstance(layers, Mapping):
        _check_sizes(path, loaded, layers)
    return LoadedLora(path, loaded, metadata, _clean_trigger(metadata.get("trigger")))


def lora_file(path: Path) -> Path:
    """The LoRA file that `path` names: itself, or the one in a folder as PEFT and diffusers write it.

    Raises:
        ModelFileError: a folder without such a file.
    """
    if not path.is_dir():
        return path
    inside = sorted(
        file for file in path.iterdir() if file.suffix.lower() in SAFETENSORS_SUFFIXES | TORCH_SUFFIXES
    )
    usual = [path / name for name in _NAMES_IN_FOLDERS if (path / name).is_file()]
    if usual or len(inside) == 1:
        return (usual or inside)[0]
    names = names_in_short([file.name for file in inside]) or "no .safetensors file"
    raise ModelFileError(f"{path}: is a folder; name a LoRA file (inside: {names})")


def read_adapter_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a safetensors file, or of a torch file that holds nothing but tensors.

    Raises:
        ModelFileError: missing, damaged, not finite, or a pickle with anything else in it.
    """
    path = lora_file(path)
    if path.suffix.lower() in TORCH_SUFFIXES:
        tensors, metadata = read_torch_tensors(path), {}
    else:
        tensors, metadata = read_tensors(path)
    for key, tensor in tensors.items():
        if tensor.is_floating_point() and not bool(tensor.float().isfinite().all()):
            raise ModelFileError(f"{path}: tensor {key} holds NaN or infinite values")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def _filter_keys(keys: Collection[str], includes: Sequence[str], excludes: Sequence[str]) -> list[str]:
    try:
        wanted = [re.compile(pattern) for pattern in includes]
        unwanted = [re.compile(pattern) for pattern in excludes]
    except re.error as error:
        raise ConfigError(f"--include_patterns / --exclude_patterns: {error.pattern!r}: {error}") from error
    return [
        key
        for key in keys
        if (not wanted or any(p.search(key) for p in wanted)) and not any(p.search(key) for p in unwanted)
    ]


def _check_matches(path: Path, groups: KeyGroups, foreign: Sequence[str], allow_partial: bool) -> None:
    """Every key must be used, but for marks, and for what --lora_allow_partial lets pass."""
    used = sum(len(roles) for roles in groups.layers.values())
    total = used + len(groups.unmatched)
    if not groups.layers:
        names = names_in_short([*groups.unmatched, *foreign])
        raise ModelFileError(f"{path}: 0 of {total} keys match a layer of this model; first keys: {names}")
    if groups.repeated:
        raise ModelFileError(f"{path}: a layer occurs under two names: {names_in_short(groups.repeated)}")
    unused: dict[ForeignKind | None, list[str]] = {}
    for key in (*groups.unmatched, *foreign):
        if not is_marker(key):
            unused.setdefault(foreign_kind(key), []).append(key)
    problems, may_continue = [], True
    for kind, keys in unused.items():
        names = names_in_short(keys)
        if kind is None:
            count = f"{len(keys)} of {used + len(keys)}"
            problems.append(f"{path}: {count} keys match no layer of this model: {names}")
            continue
        may_continue &= kind.is_separate
        rest = "" if kind.is_separate else ": without them the LoRA would not act as it was trained"
        problems.append(f"{path}: holds {kind.name}, which cannot be applied here ({names}){rest}")
    if problems and not allow_partial:
        hint = "\nUse --lora_allow_partial to continue without them." if may_continue else ""
        raise ModelFileError([*problems[:-1], problems[-1] + hint])
    for problem in problems:
        log.warning("%s; left out (--lora_allow_partial)", problem)


def _what_it_is(foreign: Sequence[str]) -> str:
    kinds = {kind.name for key in foreign if (kind := foreign_kind(key)) is not None}
    if kinds:
        return f"holds {' and '.join(sorted(kinds))} alone ({foreign[0]}), which cannot be applied here"
    return (
        "not a LoRA file: no key like lora_A, lora_down, hada_w1_a or lokr_w1; "
        f"its first keys are {names_in_short(foreign)}"
    )


@dataclass(frozen=True, slots=True)
class _RawLayer:
    """A layer before its scale is known."""

    factors: LayerFactors
    alpha: float | None
    """Of its own tensor."""

    def scaled(self, layer: str, settings: PeftSettings) -> LayerFactors:
        factors = self.factors
        if not factors.is_scaled:
            if self.alpha is None and settings.scales_whole_matrices and settings.rank:
                return replace(factors, scale=settings.factor(layer, settings.rank))
            return factors
        if self.alpha is None:
            return replace(factors, scale=settings.factor(layer, factors.rank))
        return replace(factors, scale=(self.alpha or factors.rank) / factors.rank)  # alpha 0: alpha = rank


def _scaled_layers(
    path: Path, raw: Mapping[str, _RawLayer], metadata: Mapping[str, str], groups: KeyGroups
) -> dict[str, LayerFactors]:
    """The layers with their scales; see `find_settings` where there are no `.alpha` tensors."""
    without = {name: layer.factors for name, layer in raw.items() if layer.alpha is None}
    ranks = {name: factors.rank for name, factors in without.items() if factors.is_scaled}
    has_magnitudes = any(isinstance(layer.factors, DoraFactors) for layer in raw.values())
    if without and any(written.is_respelled for written in groups.written):
        # Keys with all dots are those of musubi-tuner's convert_lora --target other. It puts the scale into
        # both factors, and keeps the header, whose alpha is that of the file before.
        log.info("%s: converted by musubi-tuner: the scale is inside its factors", path.name)
        settings = UNSCALED
    elif without:
        settings = find_settings(path, metadata, ranks, has_magnitudes=has_magnitudes)
    else:
        settings = UNSCALED
        _compare_header(path, raw, metadata)
    return {name: layer.scaled(name, settings) for name, layer in raw.items()}


def _compare_header(path: Path, raw: Mapping[str, _RawLayer], metadata: Mapping[str, str]) -> None:
    """Report a header that contradicts the file's own `.alpha` tensors, which count."""
    if FOLDED_MARK[0] in metadata:
        return
    ranks = {name: layer.factors.rank for name, layer in raw.items()}
    for stated in header_settings(path, metadata):
        for name, layer in raw.items():
            stated_scale, scale = stated.factor(name, ranks[name]), layer.scaled(name, UNSCALED).scale
            if stated.misfit(ranks, False) is None and not math.isclose(stated_scale, scale, rel_tol=0.02):
                log.warning(
                    "%s: its .alpha tensors are used, with which its scale is %g; %s gives %g",
                    path.name, scale, stated.where, stated_scale,
                )  # fmt: skip
                return


def _build_layer(path: Path, layer: str, roles: dict[str, Tensor]) -> _RawLayer:
    alpha = roles.pop("alpha", None)
    if alpha is not None and alpha.numel() != 1:
        raise ModelFileError(f"{path}: layer {layer}: alpha has {alpha.numel()} elements instead of one")
    roles = {role: _as_matrix(role, tensor) for role, tensor in roles.items()}
    odd = [role for role, tensor in roles.items() if tensor.ndim != 2 or not tensor.numel()]
    factors = None if odd else factors_from_roles(roles, 1.0)
    if factors is None:
        shapes = ", ".join(f"{role} {list(tensor.shape)}" for role, tensor in sorted(roles.items()))
        raise ModelFileError(f"{path}: the weights of layer {layer} are incomplete: found {shapes}")
    problem = factors.product_problem()
    if problem:
        raise ModelFileError(f"{path}: layer {layer}: {problem}")
    return _RawLayer(factors, None if alpha is None else float(alpha))


def _as_matrix(role: str, tensor: Tensor) -> Tensor:
    """[m, n] of factors that are written as those of a 1 x 1 convolution, [m, n, 1, 1], or of a vector."""
    if role == MAGNITUDE and tensor.ndim == 1:
        return tensor[:, None]
    is_pointwise = tensor.ndim > 2 and all(size == 1 for size in tensor.shape[2:])
    return tensor.reshape(tensor.shape[:2]) if is_pointwise else tensor


def _check_sizes(path: Path, loaded: Mapping[str, LayerFactors], sizes: Mapping[str, LayerSizes]) -> None:
    wrong = [name for name, factors in loaded.items() if factors.shape != tuple(sizes[name])]
    if wrong:
        name = wrong[0]
        raise ModelFileError(
            f"{path}: made for a model of another size: {len(wrong)} of {len(loaded)} layers do not fit; "
            f"{name} (out, in) is {list(sizes[name])} in this model, {list(loaded[name].shape)} in the file"
        )


def _clean_trigger(text: str | None) -> str | None:
    """Printable and of bounded length: the words come from a stranger's file and go into logs and prompts."""
    cleaned = "".join(char for char in text or "" if char.isprintable())[:_MAX_TRIGGER_LENGTH].strip()
    return cleaned or None


@torch.no_grad()
def load_weights(network: LoRANetwork, lora: LoadedLora) -> None:
    """Start training from a file (`--network_weights`): the network then changes the model as the file does.

    The ranks must agree; alphas need not, since lora_up is rescaled to the network's alpha.

    Raises:
        ConfigError: another kind or rank, or layers that the network does not train; all problems at once.
    """
    problems = []
    for name, factors in lora.layers.items():
        adapter = network.adapters.get(name)
        if adapter is None:
            problems.append(f"{name}: in the file, but not among the layers to be trained")
            continue
        mine = adapter.factors()
        if {r: t.shape for r, t in mine.tensors.items()} != {r: t.shape for r, t in factors.tensors.items()}:
            problems.append(
                f"{name}: rank {factors.rank} in the file, {mine.rank} in this run (or another network type)"
            )
    if problems:
        hint = "Give the same --network_dim and --network_module, or --dim_from_weights."
        raise ConfigError(f"--network_weights {lora.path}: does not fit: {names_in_short(problems)}\n{hint}")
    for name, factors in lora.layers.items():
        mine = network.adapters[name].factors()
        for role, tensor in mine.tensors.items():
            # The last role is the one that starts at zero and carries the scale.
            ratio = factors.scale / mine.scale if role == list(mine.tensors)[-1] else 1.0
            tensor.copy_(factors.tensors[role].float() * ratio)
    fresh = len(network.adapters) - len(lora.layers)
    if fresh:
        log.info("%s: %d layers are not in the file and start from scratch", lora.path.name, fresh)
