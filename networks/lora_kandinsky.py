"""Which layers of Kandinsky 5 carry adapters, and networks made from the words of `--network_args`."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from modules.errors import ConfigError
from modules.logs import get_logger
from networks.loha import LohaAdapter
from networks.lokr import LokrAdapter
from networks.lora import Adapter, DropoutRates, LoRAAdapter, LoRANetwork, inject
from networks.lora_files import LayerSizes, LoadedLora, load_weights

log = get_logger(__name__)

_ATTENTION_LAYERS = ("to_query", "to_key", "to_value", "out_layer")
_TARGET = re.compile(
    r"(text_transformer_blocks\.\d+\.self_attention"
    r"|visual_transformer_blocks\.\d+\.(self|cross)_attention)\.(to_query|to_key|to_value|out_layer)"
    r"|(text|visual)_transformer_blocks\.\d+\.feed_forward\.(in_layer|out_layer)"
)


def block_layer_sizes(
    *, model_dim: int, ff_dim: int, time_dim: int, num_text_blocks: int, num_visual_blocks: int
) -> dict[str, LayerSizes]:
    """Every linear layer inside the blocks with its sizes, modulation included, from the model's sizes."""
    layers: dict[str, LayerSizes] = {}
    kinds = (
        ("text", num_text_blocks, ("self_attention",), 6),
        ("visual", num_visual_blocks, ("self_attention", "cross_attention"), 9),
    )
    for kind, count, attentions, chunks in kinds:
        for index in range(count):
            block = f"{kind}_transformer_blocks.{index}"
            layers[f"{block}.{kind}_modulation.out_layer"] = (chunks * model_dim, time_dim)
            for attention in attentions:
                layers |= {
                    f"{block}.{attention}.{name}": (model_dim, model_dim) for name in _ATTENTION_LAYERS
                }
            layers[f"{block}.feed_forward.in_layer"] = (ff_dim, model_dim)
            layers[f"{block}.feed_forward.out_layer"] = (model_dim, ff_dim)
    return layers


def known_layer_names() -> list[str]:
    """The dotted names of all linear layers that a Kandinsky 5 model of any size has, or might have."""
    sizes = block_layer_sizes(model_dim=1, ff_dim=1, time_dim=1, num_text_blocks=16, num_visual_blocks=128)
    embeddings = ("text_embeddings", "pooled_text_embeddings", "visual_embeddings", "time_embeddings")
    outside = [*(f"{name}.in_layer" for name in embeddings), "time_embeddings.out_layer"]
    return [*sizes, *outside, "out_layer.out_layer", "out_layer.modulation.out_layer"]


def is_target_name(layer: str) -> bool:
    """Whether a dotted name is one of the ten kinds of attention and feed-forward layers in the blocks."""
    return _TARGET.fullmatch(layer) is not None


def linear_layer_sizes(model: nn.Module) -> dict[str, LayerSizes]:
    """Every linear layer of a model (on any device, meta included) by its dotted name."""
    return {name: (layer.out_features, layer.in_features) for name, layer in _linear_layers(model)}


def _linear_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    for name, module in model.named_modules():
        if hasattr(module, "in_features") and hasattr(module, "out_features"):
            yield name, module


def target_module_names(
    model: nn.Module,
    *,
    exclude_patterns: Sequence[str] = (),
    include_patterns: Sequence[str] = (),
    verbose: bool = False,
) -> list[str]:
    """The layers that get an adapter: attention and feed-forward of all blocks, less what patterns leave out.

    Args:
        exclude_patterns: regular expressions that must match a whole dotted name; those layers are left out.
        include_patterns: with excludes, bring back what they left out; alone, "only these".
        verbose: log every chosen and every skipped layer.
    Raises:
        ConfigError: a pattern does not compile or matches no layer, or no layer is left.
    """
    linear_names = [name for name, _ in _linear_layers(model)]
    excludes = _compile("exclude_patterns", exclude_patterns, linear_names)
    includes = _compile("include_patterns", include_patterns, linear_names)
    if includes and not excludes:
        log.info("include_patterns without exclude_patterns: only the layers that match get an adapter")
        excludes = [re.compile(".*")]
    chosen = []
    for name in linear_names:
        is_skipped = _matches(excludes, name) and not _matches(includes, name)
        is_chosen = is_target_name(name) and not is_skipped
        if is_chosen:
            chosen.append(name)
        if verbose:
            log.info("%s %s", "adapter on" if is_chosen else "no adapter on", name)
    if not chosen:
        raise ConfigError(
            "--network_args: the patterns leave no layer to train. They must match whole names such as "
            f"{next((name for name in linear_names if is_target_name(name)), '(none in this model)')}"
        )
    return chosen


def _compile(option: str, patterns: Sequence[str], names: Sequence[str]) -> list[re.Pattern[str]]:
    compiled, problems = [], []
    for pattern in patterns:
        try:
            expression = re.compile(pattern)
        except re.error as error:
            problems.append(f"--network_args {option}: {pattern!r} is no regular expression: {error}")
            continue
        if not _matches([expression], *names):
            problems.append(
                f"--network_args {option}: {pattern!r} matches no layer; it must match a whole name such as "
                "visual_transformer_blocks.0.self_attention.to_query (begin and end it with .* for a part)"
            )
        compiled.append(expression)
    if problems:
        raise ConfigError(problems)
    return compiled


def _matches(patterns: Sequence[re.Pattern[str]], *names: str) -> bool:
    return any(pattern.fullmatch(name) for pattern in patterns for name in names)


WORDS_WITHOUT_EFFECT = ("conv_dim", "conv_alpha")
"""Words of `--network_args` that are taken although the model has no convolutions."""


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkArgs:
    """The settings that `--network_args` may carry, checked."""

    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    exclude_patterns: tuple[str, ...] = ()
    include_patterns: tuple[str, ...] = ()
    verbose: bool = False
    factor: int | None = None
    """LoKr only: the wanted size of the smaller matrix, -1 for the most even split."""


def parse_network_args(
    values: Mapping[str, Any], *, network_module: str = "networks.lora_kandinsky"
) -> NetworkArgs:
    """Check the values of `--network_args`, already read as Python literals.

    Raises:
        ConfigError: an unknown name or a value of the wrong type or range; all problems at once.
    """
    checks = _SHARED_CHECKS | _OWN_CHECKS[network_module]
    problems: list[str] = []
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name in WORDS_WITHOUT_EFFECT:
            continue
        if name in checks:
            check, wanted = checks[name]
            if check(value):
                settings[name] = tuple(value) if isinstance(value, list) else value
            else:
                problems.append(f"--network_args {name}: must be {wanted}, got {value!r}")
        else:
            nearest = difflib.get_close_matches(name, checks, n=1)
            known = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(checks)}"
            problems.append(f"--network_args {name}: unknown for {network_module}; {known}")
    if problems:
        raise ConfigError(problems)
    return NetworkArgs(**settings)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_chance(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_pattern_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_factor(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)


_Check = tuple[Callable[[Any], bool], str]
_SHARED_CHECKS: dict[str, _Check] = {
    "module_dropout": (_is_chance, "a number from 0 to below 1"),
    "exclude_patterns": (_is_pattern_list, "a list of regular expressions, such as ['.*feed_forward.*']"),
    "include_patterns": (_is_pattern_list, "a list of regular expressions, such as ['.*cross_attention.*']"),
    "verbose": (lambda value: isinstance(value, bool), "True or False"),
}
_OWN_CHECKS: dict[str, dict[str, _Check]] = {
    "networks.lora_kandinsky": {
        "rank_dropout": (_is_chance, "a number from 0 to below 1"),
        "loraplus_lr_ratio": (lambda value: _is_number(value) and value > 0, "a number above 0"),
    },
    "networks.loha": {},
    "networks.lokr": {"factor": (_is_factor, "a whole number above 0, or -1")},
}
NETWORK_KINDS: dict[str, Callable[..., Adapter]] = {
    "networks.lora_kandinsky": LoRAAdapter,
    "networks.loha": LohaAdapter,
    "networks.lokr": LokrAdapter,
}
"""What `--network_module` may name; nothing is imported because an option or a file says so."""


def create_network(
    dit: nn.Module,
    *,
    network_dim: int,
    network_alpha: float,
    network_dropout: float | None,
    network_args: Mapping[str, Any],
    seed: int,
    network_module: str = "networks.lora_kandinsky",
) -> LoRANetwork:
    """Freeze the DiT, put adapters on its target layers and return the trainable network.

    Args:
        network_dim: rank.
        network_alpha: 0 means alpha = rank.
        network_args: `--network_args` as name -> Python value.
        network_module: one of `NETWORK_KINDS`.
    Raises:
        ConfigError: settings that this kind of network does not have, or see `parse_network_args` and
            `target_module_names`.
    """
    settings = parse_network_args(network_args, network_module=network_module)
    make_adapter = NETWORK_KINDS[network_module]
    if make_adapter is not LoRAAdapter and network_dropout:
        raise ConfigError(f"--network_dropout: not available with --network_module {network_module}")
    if settings.factor is not None:
        make_adapter = partial(make_adapter, factor=settings.factor)
    return inject(
        dit,
        _chosen_layers(dit, settings),
        rank=network_dim,
        alpha=network_alpha,
        seed=seed,
        dropout=_dropout_rates(settings, network_dropout),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        make_adapter=make_adapter,
    )


def create_network_from_weights(
    dit: nn.Module,
    lora: LoadedLora,
    *,
    network_dropout: float | None,
    network_args: Mapping[str, Any],
    seed: int,
) -> LoRANetwork:
    """A network with layers, ranks, alphas and values of a LoRA file (`--dim_from_weights`).

    Raises:
        ConfigError: the file is not a plain LoRA, or patterns and file have no layer in common.
    """
    settings = parse_network_args(network_args)
    plain = lora.plain_layers()
    names = [name for name in _chosen_layers(dit, settings) if name in plain]
    if not names:
        raise ConfigError(f"--dim_from_weights: {lora.path} has no weights for the layers to be trained")
    network = inject(
        dit,
        names,
        rank={name: plain[name].rank for name in names},
        alpha={name: plain[name].scale * plain[name].rank for name in names},
        seed=seed,
        dropout=_dropout_rates(settings, network_dropout),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
    )
    load_weights(network, lora)
    return network


def _chosen_layers(dit: nn.Module, settings: NetworkArgs) -> list[str]:
    return target_module_names(
        dit,
        exclude_patterns=settings.exclude_patterns,
        include_patterns=settings.include_patterns,
        verbose=settings.verbose,
    )


def _dropout_rates(settings: NetworkArgs, network_dropout: float | None) -> DropoutRates:
    return DropoutRates(
        network_dropout=network_dropout or 0.0,
        rank_dropout=settings.rank_dropout,
        module_dropout=settings.module_dropout,
    )
