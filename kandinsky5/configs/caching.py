"""Settings of the two cache scripts. Fields with `option` are options of the same name."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataset.geometry import NABLA_STEP
from kandinsky5.configs.text_encoders import Quantization, prompt_templates_option
from kandinsky5.configs.vae import vae_dtype_option
from modules.errors import ConfigError
from modules.options import Option, ignored_option, option, option_made_into, path_text, positive_int

KEEP_CACHE = {"keep_cache": ignored_option("caches are deleted only with --prune")}


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheRunConfig:
    """Settings that both cache scripts share."""

    dataset_config: Path = option_made_into(
        Option(help="dataset file, .toml or .json", read=Path, required=True)
    )
    batch_size: int | None = option(
        None, "items per encoder call (default: the dataset's batch_size)", positive_int
    )
    num_workers: int = option_made_into(
        Option(help="decoding threads (default: CPU count - 1)", read=positive_int), default=1
    )
    device: str | None = option(None, "where to compute (default: cuda if there is one, else cpu)")
    check: bool = option(False, "report what would be used, skipped and cut, and encode nothing")
    skip_existing: bool = option(
        False, "keep caches that match source, settings and encoder; encode only the rest"
    )
    prune: bool = option(False, "delete caches that no dataset file uses any more")
    strict: bool = option(False, "any skipped item is an error")
    skip_bad: bool = option(False, "skip damaged items; the exit code is 0 all the same")
    confine_paths: bool = option(
        False, "refuse folders, files and links that point outside the dataset file's folder"
    )

    def __post_init__(self) -> None:
        if self.strict and self.skip_bad:
            raise ConfigError("--strict and --skip_bad contradict each other: give only one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class DebugConfig:
    """Show what would be encoded instead of encoding it."""

    mode: Literal["console", "video"] = option_made_into(
        Option(
            help="show what would be encoded, then stop",
            name="debug_mode",
            choices=("image", "console", "video"),
        )
    )
    console_width: int = option(80, "characters per line of --debug_mode console (default: 80)", positive_int)
    console_num_images: int | None = option(
        None, "show N items per dataset without asking (default: all, asking after each)", positive_int
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheLatentsConfig:
    """`kandinsky5_cache_latents.py`."""

    run: CacheRunConfig
    vae: Path | None = option(
        None, "HunyuanVideo's VAE: a file or a diffusers folder (required for encoding)", Path
    )
    """None only with `debug`."""
    vae_dtype: str | None = vae_dtype_option()
    nabla_resize: bool = option(
        False, f"round sizes up to multiples of {NABLA_STEP} pixels, which NABLA attention requires"
    )
    preview: Path | None = option(
        None, "--check, and a page in this folder that shows every clip as it would be encoded", Path
    )
    tile_px: int | None = None
    """Side of the VAE's spatial tiles; None: whole frames."""
    disable_cudnn_backend: bool = option(False, "compute convolutions without cuDNN")
    debug: DebugConfig | None = None

    @property
    def encodes_nothing(self) -> bool:
        """Clips are checked or shown instead of encoded."""
        return self.debug is not None or self.run.check or self.preview is not None


@dataclass(frozen=True, kw_only=True, slots=True)
class CacheTextConfig:
    """`kandinsky5_cache_text_encoder_outputs.py`."""

    run: CacheRunConfig
    text_encoder_qwen: str = option_made_into(
        Option(
            help="Qwen2.5-VL-7B-Instruct: a folder or a hub id", metavar="PATH", read=path_text, required=True
        )
    )
    text_encoder_clip: str = option_made_into(
        Option(help="CLIP ViT-L/14: a folder or a hub id", metavar="PATH", read=path_text, required=True)
    )
    qwen_max_length: int = option(
        256,
        "maximum number of caption tokens; training refuses captions that generation (256) would truncate "
        "differently (default: 256)",
        positive_int,
    )
    clip_max_length: int = option(77, "maximum number of caption tokens for CLIP (default: 77)", positive_int)
    quantization: Quantization | None = None
    """Format of Qwen's linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = prompt_templates_option()
