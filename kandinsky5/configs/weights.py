"""How the DiT's frozen weights are held, the same in training and generation."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

DEFAULT_RING_SIZE = 2
"""Device buffers that the swapped blocks share in turn."""


class WeightFormat(Enum):
    """The storage of the attention and feed-forward weights of the blocks."""

    COMPUTE_DTYPE = "compute dtype"
    FP8 = "float8"
    INT8 = "int8"


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """The format and the place of the weights."""

    fp8_base: bool = False
    fp8_fast: bool = False
    """Multiply in float8 too; acts with fp8_base."""
    int8_base: bool = False
    int8_fast: bool = False
    """Multiply in int8 too; acts with int8_base."""
    blocks_to_swap: int = 0
    use_pinned_memory_for_block_swap: bool = False
    disable_numpy_memmap: bool = False
    no_weight_check: bool = False

    @property
    def weight_format(self) -> WeightFormat:
        if self.fp8_base:
            return WeightFormat.FP8
        return WeightFormat.INT8 if self.int8_base else WeightFormat.COMPUTE_DTYPE

    @property
    def use_fast_products(self) -> bool:
        """Whether products are computed in the storage format too."""
        return self.fp8_fast or self.int8_fast

    @property
    def has_one_byte_weights(self) -> bool:
        return self.weight_format is not WeightFormat.COMPUTE_DTYPE

    @property
    def storage_form(self) -> tuple[str, bool]:
        """Format and products of the frozen weights, whatever their place."""
        return self.weight_format.value, self.use_fast_products

    @property
    def modulation_on_host(self) -> bool:
        """Whether the modulation weights, an eighth of the model that is read once per step, stay there."""
        return self.has_one_byte_weights or self.blocks_to_swap > 0
