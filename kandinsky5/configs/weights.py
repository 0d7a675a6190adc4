"""Storage of the DiT's frozen weights, for training and generation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import Any

from modules.errors import ConfigError
from modules.options import float_between, non_negative_int, option

DTYPES = ("float32", "fp32", "float", "float16", "fp16", "bfloat16", "bf16")
DEFAULT_RING_SIZE = 2
"""Number of device buffers for swapped blocks."""


class WeightFormat(Enum):
    """Storage format of the attention and feed-forward weights of the blocks."""

    COMPUTE_DTYPE = "compute dtype"
    FP8 = "float8"
    INT8 = "int8"
    NF4 = "nf4"


def vram_budget_option(help: str) -> Any:
    """`--vram_budget`; `help` says which options it adds in a script."""
    return option(None, help, float_between(1.0, 1024.0), metavar="GB", group="weights and memory")


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """Format and location of the weights."""

    fp8_base: bool = option(
        False,
        "store attention and feed-forward weights in float8",
        other_names=("fp8_scaled",),
        hidden_names=("fp8",),
    )
    fp8_fast: bool = option(
        False,
        "with --fp8_base: also compute matrix products in float8; requires compute capability 8.9 (Ada, "
        "Hopper) or later; not run on a GPU yet",
    )
    int8_base: bool = option(False, "store attention and feed-forward weights in int8 instead, on any device")
    int8_fast: bool = option(
        False,
        "with --int8_base: also compute matrix products in int8, of rotated weights and inputs; requires "
        "compute capability 7.5 (Turing, Ampere) or later; not run on a GPU yet",
    )
    no_int8_rotation: bool = option(
        False,
        "with --int8_fast: do not rotate weights and inputs before rounding, as earlier versions did not",
    )
    nf4_base: bool = option(
        False,
        "store attention and feed-forward weights in 4 bits (NF4) with bitsandbytes instead: half the memory "
        "of 8 bits, over three times the error; not run on a GPU yet",
    )
    blocks_to_swap: int = option(
        0, "number of blocks whose weights stay in host memory (default: 0)", non_negative_int
    )
    use_pinned_memory_for_block_swap: bool = option(False, "with --blocks_to_swap: use pinned host memory")
    disable_numpy_memmap: bool = option(False, "read model files without memory mapping")
    no_weight_check: bool = option(False, "do not check the weights for NaN and Inf while loading")

    def __post_init__(self) -> None:
        given = [f"--{name}" for name in ("fp8_base", "int8_base", "nf4_base") if getattr(self, name)]
        if len(given) > 1:
            raise ConfigError(
                f"{' and '.join(given)} select a format for the same weights: give only one of them"
            )

    @property
    def weight_format(self) -> WeightFormat:
        if self.fp8_base:
            return WeightFormat.FP8
        if self.nf4_base:
            return WeightFormat.NF4
        return WeightFormat.INT8 if self.int8_base else WeightFormat.COMPUTE_DTYPE

    @property
    def use_fast_products(self) -> bool:
        """Whether matrix products are also computed in the storage format."""
        return self.fp8_fast or self.int8_fast

    @property
    def rotates_weights(self) -> bool:
        """Whether weights are rotated before they are rounded.

        Only where inputs are rounded too: on normal weights the rotation leaves the error of `--int8_base`
        alone as it is, and it would cost a product per layer and pass.
        """
        return self.int8_base and self.int8_fast and not self.no_int8_rotation

    @property
    def stored_as(self) -> str:
        """Storage of the attention and feed-forward weights of the blocks, in words."""
        return f"{self.weight_format.value}{', rotated' if self.rotates_weights else ''}"

    @property
    def is_quantised(self) -> bool:
        """Whether weights are stored in fewer bits than they are computed in."""
        return self.weight_format is not WeightFormat.COMPUTE_DTYPE

    @property
    def storage_form(self) -> tuple[str, bool, bool]:
        """Format of the frozen weights and of their products, independent of their location."""
        return self.weight_format.value, self.use_fast_products, self.rotates_weights

    @property
    def modulation_on_host(self) -> bool:
        """Whether the modulation weights stay in host memory: an eighth of the model, read once per step."""
        return self.is_quantised or self.blocks_to_swap > 0
