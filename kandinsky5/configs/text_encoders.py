"""How Qwen's weights are held, the same in every command that encodes captions."""

from __future__ import annotations

from typing import Literal

from modules.errors import ConfigError

Quantization = Literal["nf4", "fp8"]
"""Of the Linear weights: 4 bits by bitsandbytes, or our float8."""


def qwen_quantization(*, fp8_llm: bool, quantized_qwen: bool) -> Quantization | None:
    """What the two options ask for together; None leaves the weights as they come.

    Raises:
        ConfigError: both at once.
    """
    if fp8_llm and quantized_qwen:
        raise ConfigError("--fp8_llm holds Qwen in 8 bits and --quantized_qwen in 4: give one of them")
    if quantized_qwen:
        return "nf4"
    return "fp8" if fp8_llm else None
