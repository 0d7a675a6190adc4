"""Settings of the text encoders, the same in every command that encodes captions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from kandinsky5.tasks import DitParams, Task
from modules.errors import ConfigError

Quantization = Literal["nf4", "fp8"]
"""Of the Linear weights: 4 bits by bitsandbytes, or our float8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncodersConfig:
    """Which encoders to load, and how they are used."""

    text_encoder_qwen: str
    text_encoder_clip: str
    """A folder or a hub id each."""
    quantization: Quantization | None = None
    """The format of Qwen's Linear weights; None keeps the compute dtype."""
    qwen_max_length: int = 256
    """Tokens kept after the template part."""
    clip_max_length: int = 77
    """Tokens with the start and the end token."""
    require_official_crop: bool | None = None
    """Refuse a tokenizer that is not Qwen2.5-VL's; None: if the width is that of Qwen2.5-VL-7B."""
    expected_dims: tuple[int, int] | None = None
    """in_text_dim and in_text_dim2 of the DiT, if there is one."""


def encoders_for_task(
    task: Task, params: DitParams, qwen: str, clip: str, quantization: Quantization | None
) -> TextEncodersConfig:
    """The encoders for a task whose DiT has these parameters."""
    return TextEncodersConfig(
        text_encoder_qwen=qwen,
        text_encoder_clip=clip,
        quantization=quantization,
        qwen_max_length=task.qwen_max_length,
        clip_max_length=task.clip_max_length,
        require_official_crop=not task.is_tiny,
        expected_dims=(params.in_text_dim, params.in_text_dim2),
    )


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
