"""Which layers of Kandinsky 5 carry adapters, and networks built from `--network_args`."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from modules.errors import ConfigError
from modules.logs import get_logger
from networks.lora import Adapter, DropoutRates, LoRANetwork, inject
from networks.lora_files import LayerSizes, LoadedLora, load_weights
from networks.lora_types import DEFAULT_TYPE, NetworkArgs, lora_type, parse_network_args

log = get_logger(__name__)

_ATTENTION_LAYERS = ("to_query", "to_key", "to_value", "out_layer")
_TARGET = re.compile(
    r"(text_transformer_blocks\.\d+\.self_attention"
    r"|visual_transformer_blocks\.\d+\.(self|cross)_attention)\.(to_query|to_key|to_value|out_layer)"
    r"|(text|visual)_transformer_blocks\.\d+\.feed_forward\.(in_layer|out_layer)"
)


def known_layer_names() -> list[str]:
    """The dotted names of all linear layers that a Kandinsky 5 model of any published size can have."""
    embeddings = ("text_embeddings", "pooled_text_embeddings", "visual_embeddings", "time_embeddings")
    names = [f"{name}.in_layer" for name in embeddings]
    names += ["time_embeddings.out_layer", "out_layer.out_layer", "out_layer.modulation.out_layer"]
    for kind, count, attentions in (
        ("text", 16, ("self_attention",)),
        ("visual", 128, ("self_attention", "cross_attention")),
    ):
        inside = [f"{kind}_modulation.out_layer", "feed_forward.in_layer", "feed_forward.out_layer"]
        inside += [f"{attention}.{layer}" for attention in attentions for layer in _ATTENTION_LAYERS]
        names += [f"{kind}_transformer_blocks.{index}.{layer}" for index in range(count) for layer in inside]
    return names


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
            problems.append(f"--network_args {option}: {pattern!r} is not a regular expression: {error}")
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


def create_network(
    dit: nn.Module,
    *,
    network_dim: int,
    network_alpha: float,
    network_dropout: float | None,
    network_args: Mapping[str, Any],
    seed: int,
    network_module: str = DEFAULT_TYPE.network_module,
) -> LoRANetwork:
    """Freeze the DiT, put adapters on its target layers and return the trainable network.

    Args:
        network_dim: rank.
        network_alpha: 0 means alpha = rank.
        network_args: `--network_args` as name -> Python value.
        network_module: one of `NETWORK_MODULES`.
    Raises:
        ConfigError: settings that this kind of network does not have, or see `parse_network_args` and
            `target_module_names`.
    """
    settings = parse_network_args(network_args, network_module=network_module)
    kind = lora_type(network_module, network_args)
    if network_dropout and "network_dropout" not in kind.options:
        raise ConfigError(f"--network_dropout: not available with --network_module {network_module}")
    adapter_class: type[Adapter] = kind.load_class(kind.adapter)
    return inject(
        dit,
        _chosen_layers(dit, settings),
        rank=network_dim,
        alpha=network_alpha,
        seed=seed,
        dropout=_dropout_rates(settings, network_dropout),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        make_adapter=partial(adapter_class, **settings.constructor),
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
        ConfigError: the file is neither a plain LoRA nor a DoRA or not of the kind that `network_args` asks
            for, or patterns and file have no layer in common.
    """
    settings = parse_network_args(network_args)
    kind, layers = lora.adapter_type(), lora.layers
    asked = lora_type(DEFAULT_TYPE.network_module, network_args)
    if asked.switch and asked is not kind:
        raise ConfigError(
            f"--network_args {asked.switch}: {lora.path} is a {kind.title}, not a {asked.title}"
        )
    names = [name for name in _chosen_layers(dit, settings) if name in layers]
    if not names:
        raise ConfigError(f"--dim_from_weights: {lora.path} has no weights for the layers to be trained")
    network = inject(
        dit,
        names,
        rank={name: layers[name].rank for name in names},
        alpha={name: layers[name].scale * layers[name].rank for name in names},
        seed=seed,
        dropout=_dropout_rates(settings, network_dropout),
        loraplus_lr_ratio=settings.loraplus_lr_ratio,
        make_adapter=kind.load_class(kind.adapter),
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
