"""How the DiT's frozen weights are held, the same in training and generation."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class WeightsConfig:
    """In what form, and where, the weights lie."""

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
    def has_one_byte_weights(self) -> bool:
        """Whether the blocks' attention and feed-forward weights are held in float8 or int8."""
        return self.fp8_base or self.int8_base

    @property
    def storage_form(self) -> tuple[bool, ...]:
        """What decides how the frozen weights are stored and multiplied, whatever their place."""
        return (self.fp8_base, self.fp8_fast, self.int8_base, self.int8_fast)

    @property
    def modulation_on_host(self) -> bool:
        """Whether the modulation weights, an eighth of the model that is read once per step, stay there."""
        return self.has_one_byte_weights or self.blocks_to_swap > 0
