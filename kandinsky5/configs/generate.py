"""What `kandinsky5_generate_video.py` was told to do."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from dataset.geometry import FPS
from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.configs.text_encoders import Quantization
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.prompts import PromptSpec
from kandinsky5.tasks import NablaParams, Task
from modules.attention_backends import DEFAULT_BACKEND
from modules.errors import ConfigError

OutputType = Literal["video", "images", "latent", "both", "latent_images"]
OUTPUT_TYPES: tuple[OutputType, ...] = ("video", "images", "latent", "both", "latent_images")
OUTPUT_SUFFIXES = (".mp4", ".png", ".safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPaths:
    """Where the models are; the encoders may be hub ids."""

    dit: Path
    vae: Path
    text_encoder_qwen: str
    text_encoder_clip: str


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheConfig:
    """Skipping the visual blocks where they are known to change little."""

    magcache_mag_ratios: tuple[float, ...] | None = None
    """None: the official ones of the task."""
    magcache_threshold: float = 0.12
    magcache_k: int = 2
    magcache_retention_ratio: float = 0.2


@dataclass(frozen=True, kw_only=True, slots=True)
class DitConfig(WeightsConfig):
    """How the DiT is held and run."""

    dtype: str | None = None
    """A dtype word; None: bfloat16 on CUDA, float32 on the CPU."""
    offload_dit_during_sampling: bool = False
    nabla: NablaParams | None = None
    """Block-sparse attention; None is full attention."""
    attention: str = DEFAULT_BACKEND
    """A name in `ATTENTION_BACKENDS`."""
    magcache: MagCacheConfig | None = None
    """None runs all blocks at every step."""
    cpu_noise: bool = False
    compile: CompileConfig | None = None
    """None runs the blocks as they are."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """How prompts are encoded."""

    text_encoder_cpu: bool = False
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """How pixels and latents are converted."""

    vae_dtype: str | None = None
    """A dtype word; None: float16 on CUDA, float32 on the CPU."""
    tile_px: int | None = None
    """Side of spatial tiles in pixels; None decodes frames whole while memory allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """The adapters to apply and how."""

    lora_weight: tuple[Path, ...] = ()
    lora_multiplier: tuple[float, ...] = ()
    """As many as were given; the rest are 1."""
    lora_mode: Literal["merge", "runtime"] = "merge"
    include_patterns: tuple[str, ...] = ()
    exclude_patterns: tuple[str, ...] = ()
    lora_allow_partial: bool = False
    no_lora_trigger: bool = False
    save_merged_model: Path | None = None

    def __post_init__(self) -> None:
        problems = []
        if len(self.lora_multiplier) > len(self.lora_weight):
            problems.append(
                f"--lora_multiplier: {len(self.lora_multiplier)} values for {len(self.lora_weight)} "
                "--lora_weight: at most one for each"
            )
        if self.save_merged_model is not None and not self.lora_weight:
            problems.append("--save_merged_model needs --lora_weight: there is nothing to merge")
        if self.save_merged_model is not None and self.lora_mode == "runtime":
            problems.append("--save_merged_model merges; it does not go with --lora_mode runtime")
        if not self.lora_weight and (self.include_patterns or self.exclude_patterns):
            problems.append(
                "--include_patterns and --exclude_patterns choose keys of --lora_weight: none given"
            )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """What is written, where and how."""

    output: Path | None
    """None only with --save_merged_model."""
    output_is_folder: bool = False
    """The word ended with a path separator."""
    output_type: OutputType = "video"
    fps: int = FPS
    crf: int = 14
    trim_tail_frames: int = 0
    overwrite: bool = False
    no_metadata: bool = False

    def __post_init__(self) -> None:
        problems = []
        if self.output is not None:
            suffix = self.output.suffix.lower()
            if suffix == ".safetensors" and self.output_type != "latent":
                problems.append(f"--output {self.output}: a .safetensors file needs --output_type latent")
            elif suffix == ".png" and self.output_type in ("both", "latent", "latent_images"):
                problems.append(
                    f"--output {self.output}: --output_type {self.output_type} needs a folder or .mp4"
                )
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerateConfig:
    """One run of the generation script."""

    task: Task
    models: ModelPaths
    spec: PromptSpec
    """The prompt and settings of the command line; defaults for prompts from elsewhere."""
    from_file: Path | None = None
    interactive: bool = False
    latent_path: Path | None = None
    dry_run: bool = False
    """Check and plan, then end."""
    vram_budget: float | None = None
    """GiB of device memory that sampling may need."""
    device: str | None = None
    dit: DitConfig
    text: TextEncoderConfig
    vae: VaeConfig
    lora: LoraConfig
    output: OutputConfig

    def __post_init__(self) -> None:
        sources = {
            "--prompt": self.spec.prompt is not None,
            "--from_file": self.from_file is not None,
            "--interactive": self.interactive,
            "--latent_path": self.latent_path is not None,
        }
        given = [flag for flag, is_given in sources.items() if is_given]
        problems = []
        if self.lora.save_merged_model is not None:
            if len(given) > 0:
                problems.append(
                    f"--save_merged_model writes a model and stops; it does not go with {given[0]}"
                )
        elif len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "none was given"
            problems.append(f"exactly one of {', '.join(sources)} is wanted: {what}")
        if self.dry_run or self.vram_budget is not None:
            option = "--dry_run" if self.dry_run else "--vram_budget"
            others = {
                "--interactive": self.interactive,
                "--latent_path": self.latent_path is not None,
                "--save_merged_model": self.lora.save_merged_model is not None,
            }
            problems += [
                f"{option} plans for --prompt or --from_file; it does not go with {name}"
                for name, is_used in others.items()
                if is_used
            ]
        if self.output.output is None and self.lora.save_merged_model is None:
            problems.append("--output is missing: a .mp4, a .png or a folder")
        if self.dit.use_pinned_memory_for_block_swap and not self.dit.blocks_to_swap:
            problems.append("--use_pinned_memory_for_block_swap acts with --blocks_to_swap only: add it")
        if problems:
            raise ConfigError(problems)
