"""Settings of the text encoders, shared by all commands that encode text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from kandinsky5.tasks import DitParams, Task
from modules.errors import ConfigError
from modules.options import option

Quantization = Literal["nf4", "fp8"]
"""Format of linear weights: 4 bits by bitsandbytes, or this project's float8."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncodersConfig:
    """The text encoders to load and their settings."""

    text_encoder_qwen: str
    text_encoder_clip: str
    """A folder or a hub id each."""
    quantization: Quantization | None = None
    """The format of Qwen's Linear weights; None keeps the compute dtype."""
    qwen_max_length: int = 256
    """Maximum number of tokens after the template's."""
    clip_max_length: int = 77
    """Maximum number of tokens, including start and end token."""
    require_official_crop: bool | None = None
    """Whether to refuse a tokenizer other than Qwen2.5-VL's; None: only if the model has the width of
    Qwen2.5-VL-7B.
    """
    expected_dims: tuple[int, int] | None = None
    """`in_text_dim` and `in_text_dim2` of the DiT, if they are known."""


def encoders_for_task(
    task: Task, params: DitParams, qwen: str, clip: str, quantization: Quantization | None
) -> TextEncodersConfig:
    """The encoder settings for a task whose DiT has these parameters."""
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
    """Format of Qwen's weights."""

    fp8_llm: bool = option(False, "store Qwen's weights in float8: half the memory", other_names=("fp8_vlm",))
    quantized_qwen: bool = option(False, "load Qwen in 4 bits (NF4) with bitsandbytes")

    def __post_init__(self) -> None:
        if self.fp8_llm and self.quantized_qwen:
            raise ConfigError(
                "--fp8_llm stores Qwen in 8 bits, --quantized_qwen in 4 bits: give only one of them"
            )

    @property
    def quantization(self) -> Quantization | None:
        """The format selected by the two options; None: as in the checkpoint."""
        if self.quantized_qwen:
            return "nf4"
        return "fp8" if self.fp8_llm else None
