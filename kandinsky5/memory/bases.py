"""The choice of a format for the frozen weights: what suits a card, and what each costs in precision.

Below compute capability 8.9 matrix units multiply in int8 but not in float8: rotated int8, whose inputs are
rounded too. From 8.9 on float8, widened for its products. NF4 is for what fits in no other way.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch

from kandinsky5.configs.weights import WeightFormat, WeightsConfig
from modules import fp8, int8
from modules.errors import ResourceError
from modules.logs import get_logger
from modules.nf4 import check_nf4, has_nf4

log = get_logger(__name__)

BASE_OPTIONS = ("fp8_base", "int8_base", "int8_fast", "nf4_base")
"""The options that a choice may set, in the order of a command line."""

_Options = TypeVar("_Options", bound=WeightsConfig)
_FLOAT8 = ("fp8_base",)
_INT8 = ("int8_base", "int8_fast")
_NF4 = ("nf4_base",)
_ERRORS = {WeightFormat.FP8: 2.7, WeightFormat.INT8: 0.9, WeightFormat.NF4: 9}
"""Per cent of a layer's output on normal weights, see docs/performance.md."""
_FAST_ERRORS = {WeightFormat.FP8: 3.8, WeightFormat.INT8: 1.2}
"""The same where inputs are rounded too."""


def suitable_base(capability: tuple[int, int] | None) -> tuple[str, ...]:
    """The options of the format in 8 bits for a CUDA card of this compute capability; None is unknown."""
    if capability is None:
        return _FLOAT8
    has_int8_alone = int8.FAST_PRODUCT.capability <= capability < fp8.FAST_PRODUCT.capability
    return _INT8 if has_int8_alone else _FLOAT8


def base_for(device: torch.device) -> tuple[str, ...]:
    """`suitable_base` of a device that is here; products in int8 only where they work."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return suitable_base(None)
    base = suitable_base(torch.cuda.get_device_capability(device))
    if base == _INT8:
        try:
            int8.check_int8_matmul(device)
        except ResourceError as error:
            log.warning("--int8_fast is not chosen for this card: %s", error)
            return _INT8[:1]
    return base


def last_resort(device: torch.device) -> tuple[str, ...] | None:
    """The options of the smallest format; None where bitsandbytes is missing or fails on the card."""
    if not has_nf4():
        return None
    if device.type == "cuda" and torch.cuda.is_available():
        try:
            check_nf4(device)
        except ResourceError as error:
            log.warning("--nf4_base is not chosen for this card: %s", error)
            return None
    return _NF4


def with_base(options: _Options, base: tuple[str, ...]) -> _Options:
    """The options with weights stored so."""
    return replace(options, **dict.fromkeys(base, True))


def with_base_of(options: _Options, earlier: Mapping[str, Any]) -> _Options:
    """The options with the base of an earlier part of the run, unless they have one."""
    chosen = tuple(name for name in BASE_OPTIONS if earlier.get(name))
    return options if options.is_quantised or not chosen else with_base(options, chosen)


def describe_error(options: WeightsConfig) -> str:
    """What rounding does to a layer's output, for the log; empty for weights as they are."""
    if not options.is_quantised:
        return ""
    errors = _FAST_ERRORS if options.use_fast_products else _ERRORS
    percent = errors[options.weight_format]
    return f"weights in {options.stored_as} move a layer's output by about {percent} %"
