"""The kinds of adapter: one entry per kind, read by command lines, networks and files.

A new kind is a module with its `Adapter` and its `LayerFactors`, and an entry here. Nothing in this module
imports torch; the classes are imported when a network is built or a file is read.
"""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from modules.errors import ConfigError

EVERY_PROGRAM = ("this project", "musubi-tuner", "ComfyUI", "diffusers", "official pipeline")
LYCORIS_PROGRAMS = ("this project", "musubi-tuner", "ComfyUI")
MAGNITUDE = "dora_scale"
"""Role of the magnitudes of a DoRA: one number per row of the weight, or per column."""


class ArgCheck(NamedTuple):
    """The check of one value of `--network_args`."""

    is_valid: Callable[[Any], bool]
    expected: str
    """Completes the sentence "must be ..."."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraType:
    """One kind of adapter."""

    network_module: str
    """The value of `--network_module`."""
    switch: str | None = None
    """The setting of `--network_args` that chooses it instead of the first kind of its module."""
    title: str
    """The name in reports."""
    module: str
    """Where its two classes are defined."""
    adapter: str
    """Class name, a subclass of `networks.lora.Adapter`."""
    factors: str
    """Class name, a subclass of `networks.factors.LayerFactors`."""
    roles: tuple[str, ...]
    """Every role name that one of its tensors can have in a file, without ".weight"."""
    folds: bool = False
    """Its scale folds into `lora_up`, so that it can be written without `.alpha` tensors."""
    options: frozenset[str] = frozenset()
    """The options of `NetworkConfig` that not every kind has, and this one has."""
    args: Mapping[str, ArgCheck] = field(default_factory=dict)
    """Settings of `--network_args` that only this kind has."""
    constructor_args: tuple[str, ...] = ()
    """The `args` that its adapter's constructor accepts."""
    programs: tuple[str, ...] = LYCORIS_PROGRAMS
    """The programs that can apply it."""

    def load_class(self, name: str) -> Any:
        """Import the class `adapter` or `factors`, and torch with it."""
        return getattr(importlib.import_module(self.module), name)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _is_chance(value: Any) -> bool:
    return _is_number(value) and 0 <= value < 1


def _is_pattern_list(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value)


def _is_factor(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and (value == -1 or value > 0)


_CHANCE = ArgCheck(_is_chance, "a number from 0 to below 1")
_IS_BOOL = ArgCheck(lambda value: isinstance(value, bool), "True or False")

_DIRECTIONS = (
    LoraType(
        network_module="networks.lora_kandinsky",
        title="LoRA",
        module="networks.lora",
        adapter="LoRAAdapter",
        factors="LoraFactors",
        roles=("lora_down", "lora_up"),
        folds=True,
        options=frozenset({"network_dropout", "dim_from_weights", "scale_weight_norms"}),
        args={
            "rank_dropout": _CHANCE,
            "loraplus_lr_ratio": ArgCheck(lambda value: _is_number(value) and value > 0, "a number above 0"),
        },
        programs=EVERY_PROGRAM,
    ),
    LoraType(
        network_module="networks.loha",
        title="LoHa",
        module="networks.loha",
        adapter="LohaAdapter",
        factors="LohaFactors",
        roles=("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"),
    ),
    LoraType(
        network_module="networks.lokr",
        title="LoKr",
        module="networks.lokr",
        adapter="LokrAdapter",
        factors="LokrFactors",
        roles=("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b"),
        args={"factor": ArgCheck(_is_factor, "a whole number above 0, or -1")},
        constructor_args=("factor",),
    ),
)
# A DoRA may have the direction of any kind.
LORA_TYPES = (
    *_DIRECTIONS,
    LoraType(
        network_module="networks.lora_kandinsky",
        switch="use_dora",
        title="DoRA",
        module="networks.dora",
        adapter="DoraAdapter",
        factors="DoraFactors",
        roles=(MAGNITUDE, *(role for kind in _DIRECTIONS for role in kind.roles)),
        folds=True,
        options=frozenset({"network_dropout", "dim_from_weights"}),
        args=_DIRECTIONS[0].args,
        programs=("this project", "diffusers", "ComfyUI"),
    ),
)
DEFAULT_TYPE = LORA_TYPES[0]
NETWORK_MODULES = tuple(kind.network_module for kind in _DIRECTIONS)
"""What `--network_module` may name; nothing is imported because an option or a file says so."""


def lora_type(network_module: str, network_args: Mapping[str, Any]) -> LoraType:
    """The kind that `--network_module`, one of `NETWORK_MODULES`, and the switches in its settings choose."""
    kinds = [kind for kind in LORA_TYPES if kind.network_module == network_module]
    return next((kind for kind in kinds if kind.switch and network_args.get(kind.switch) is True), kinds[0])


def type_of_roles(roles: frozenset[str]) -> LoraType | None:
    """Return the kind with these role names; None for a mixture."""
    return next((kind for kind in LORA_TYPES if roles and roles <= set(kind.roles)), None)


ARGS_WITHOUT_EFFECT = ("conv_dim", "conv_alpha")
"""Settings of `--network_args` that are accepted although the model has no convolutions."""

_SHARED_ARGS = {
    "module_dropout": _CHANCE,
    "exclude_patterns": ArgCheck(
        _is_pattern_list, "a list of regular expressions, such as ['.*feed_forward.*']"
    ),
    "include_patterns": ArgCheck(
        _is_pattern_list, "a list of regular expressions, such as ['.*cross_attention.*']"
    ),
    "verbose": _IS_BOOL,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkArgs:
    """The checked settings of `--network_args`."""

    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    loraplus_lr_ratio: float | None = None
    exclude_patterns: tuple[str, ...] = ()
    include_patterns: tuple[str, ...] = ()
    verbose: bool = False
    constructor: Mapping[str, Any] = field(default_factory=dict)
    """Keyword arguments for the adapters of this kind."""


def parse_network_args(
    values: Mapping[str, Any], *, network_module: str = DEFAULT_TYPE.network_module
) -> NetworkArgs:
    """Check the values of `--network_args`, already read as Python literals.

    Raises:
        ConfigError: an unknown name or a value of the wrong type or range; all problems at once.
    """
    kind = lora_type(network_module, values)
    switches = [kind.switch for kind in LORA_TYPES if kind.switch and kind.network_module == network_module]
    checks = {**_SHARED_ARGS, **kind.args, **dict.fromkeys(switches, _IS_BOOL)}
    problems: list[str] = []
    settings: dict[str, Any] = {}
    for name, value in values.items():
        if name in ARGS_WITHOUT_EFFECT:
            continue
        if name in checks:
            if checks[name].is_valid(value):
                settings[name] = tuple(value) if isinstance(value, list) else value
            else:
                problems.append(f"--network_args {name}: must be {checks[name].expected}, got {value!r}")
        else:
            nearest = difflib.get_close_matches(name, checks, n=1)
            known = f"did you mean {nearest[0]}?" if nearest else f"known: {', '.join(checks)}"
            problems.append(f"--network_args {name}: unknown for {network_module}; {known}")
    if problems:
        raise ConfigError(problems)
    for switch in switches:
        settings.pop(switch, None)
    constructor = {name: settings.pop(name) for name in kind.constructor_args if name in settings}
    return NetworkArgs(**settings, constructor=constructor)
