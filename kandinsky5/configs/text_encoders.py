"""Settings of the text encoders, the same in every command that encodes captions."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kandinsky5.tasks import DitParams, Task
from modules.errors import ConfigError
from modules.options import option

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


def prompt_templates_option() -> Any:
    """`--prompt_templates`."""
    help = "read the official prompt templates from this file instead of the installed diffusers"
    return option(None, help, Path)


@dataclass(frozen=True, kw_only=True, slots=True)
class QwenOptions:
    """How Qwen's weights are held."""

    fp8_llm: bool = option(False, "hold Qwen's weights in float8: half the memory", other_names=("fp8_vlm",))
    quantized_qwen: bool = option(False, "load Qwen in 4 bits (NF4) with bitsandbytes")

    def __post_init__(self) -> None:
        if self.fp8_llm and self.quantized_qwen:
            raise ConfigError("--fp8_llm holds Qwen in 8 bits and --quantized_qwen in 4: give one of them")

    @property
    def quantization(self) -> Quantization | None:
        """What the two options ask for together; None leaves the weights as they come."""
        if self.quantized_qwen:
            return "nf4"
        return "fp8" if self.fp8_llm else None
