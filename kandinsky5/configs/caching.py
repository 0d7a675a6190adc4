"""The settings of the two cache scripts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from kandinsky5.configs.text_encoders import Quantization
from modules.errors import ConfigError

MIN_TILE_PX = 64
DEFAULT_TILE_PX = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRunConfig:
    """What both scripts share."""

    dataset_config: Path
    batch_size: int | None = None
    """Clips or captions per encoder call; None: the dataset's own."""
    num_workers: int = 1
    """Threads that read and decode media."""
    device: str | None = None
    skip_existing: bool = False
    """Encode only what has no cache, or one that no longer fits."""
    prune: bool = False
    """Delete caches that the dataset no longer uses."""
    strict: bool = False
    """Any skipped item is an error."""
    skip_bad: bool = False
    """Damaged items are skipped without an error."""
    confine_paths: bool = False
    """Refuse everything that leads out of the dataset file's folder."""

    def __post_init__(self) -> None:
        if self.strict and self.skip_bad:
            raise ConfigError("--strict and --skip_bad contradict each other: give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Show what would be encoded instead of encoding it."""

    mode: Literal["console", "video"]
    console_width: int = 80
    """Characters per line."""
    console_num_images: int | None = None
    """Items shown per dataset without asking; None: all, asking after each on a terminal."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLatentsConfig:
    """`kandinsky5_cache_latents.py`."""

    run: CacheRunConfig
    vae: Path | None = None
    """None only together with `debug`."""
    vae_dtype: str | None = None
    """None: float16, on a CPU float32."""
    nabla_resize: bool = False
    tile_px: int | None = None
    """Side of the VAE's spatial tiles; None: whole frames."""
    disable_cudnn_backend: bool = False
    debug: DebugConfig | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTextConfig:
    """`kandinsky5_cache_text_encoder_outputs.py`."""

    run: CacheRunConfig
    text_encoder_qwen: str
    text_encoder_clip: str
    """A folder or a hub id each."""
    qwen_max_length: int = 256
    """Tokens kept after the prompt template."""
    clip_max_length: int = 77
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = None
