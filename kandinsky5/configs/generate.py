"""Settings of `kandinsky5_generate_video.py`. Fields with `option` are options of the same name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from dataset.geometry import FPS
from kandinsky5.configs.compilation import CompileConfig, compile_option
from kandinsky5.configs.text_encoders import Quantization, prompt_templates_option
from kandinsky5.configs.vae import vae_dtype_option
from kandinsky5.configs.weights import DTYPES, WeightsConfig, vram_budget_option
from kandinsky5.prompts import PromptSpec, lora_strength
from kandinsky5.tasks import NablaParams, Task
from modules.attention_backends import DEFAULT_BACKEND
from modules.errors import ConfigError
from modules.options import (
    Option,
    float_between,
    int_between,
    non_negative_int,
    option,
    option_made_into,
    path_text,
    positive_int,
)

DEFAULT_TASK = "k5-pro-t2v-5s-sd"
OUTPUT_SUFFIXES = (".mp4", ".png", ".safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelPaths:
    """Paths of the models; encoders may be hub ids. Paths that are not given default to the task's."""

    dit: Path = option_made_into(
        Option(help="DiT: a .safetensors file, shards or a diffusers folder (default: the task's)", read=Path)
    )
    vae: Path = option_made_into(
        Option(help="HunyuanVideo's VAE: a file or a folder (default: the task's)", read=Path)
    )
    text_encoder_qwen: str = option_made_into(
        Option(help="Qwen2.5-VL: a folder or a hub id (default: the task's)", metavar="PATH", read=path_text)
    )
    text_encoder_clip: str = option_made_into(
        Option(
            help="CLIP ViT-L/14: a folder or a hub id (default: the task's)", metavar="PATH", read=path_text
        )
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MagCacheConfig:
    """Skips the visual blocks in steps where their output is known to change little."""

    magcache_mag_ratios: tuple[float, ...] | None = option(
        None,
        "ratios that replace the task's: conditional and unconditional alternately, from the second step on",
        float_between(0, 100),
        nargs="+",
    )
    magcache_threshold: float = option(
        0.12, "maximum accumulated error of skipped steps (default: 0.12)", float_between(0, 10)
    )
    magcache_k: int = option(2, "maximum number of consecutive skipped passes (default: 2)", positive_int)
    magcache_retention_ratio: float = option(
        0.2, "share of steps at the start that are never skipped (default: 0.2)", float_between(0, 1)
    )

    def __post_init__(self) -> None:
        if self.magcache_mag_ratios is not None and len(self.magcache_mag_ratios) % 2:
            raise ConfigError(
                f"--magcache_mag_ratios: expected pairs of numbers, got {len(self.magcache_mag_ratios)} "
                "numbers"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class DitConfig(WeightsConfig):
    """Storage and execution of the DiT."""

    dtype: str | None = option(
        None, "compute dtype (default: bfloat16; float32 on a CPU)", choices=DTYPES, group="size and sampling"
    )
    offload_dit_during_sampling: bool = option(
        False, "with --interactive: keep the DiT in host memory while encoders and VAE run"
    )
    nabla: NablaParams | None = None
    """Block-sparse attention; None is full attention."""
    attention: str = DEFAULT_BACKEND
    """A name in `ATTENTION_BACKENDS`."""
    magcache: MagCacheConfig | None = option_made_into(
        Option(
            help="skip blocks according to the task's official ratios: faster, less exact",
            default=False,
            group="MagCache",
        ),
        default=None,
    )
    """None: all blocks run at every step."""
    cpu_noise: bool = option(
        False, "draw the noise on the CPU: the same noise on every GPU", group="size and sampling"
    )
    compile: CompileConfig | None = compile_option()


@dataclass(frozen=True, kw_only=True, slots=True)
class TextEncoderConfig:
    """How prompts are encoded."""

    text_encoder_cpu: bool = option(False, "encode prompts on the CPU")
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = prompt_templates_option()


@dataclass(frozen=True, kw_only=True, slots=True)
class VaeConfig:
    """How pixels and latents are converted."""

    vae_dtype: str | None = vae_dtype_option()
    tile_px: int | None = None
    """Side of spatial tiles in pixels; None: decode whole frames if memory allows."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LoraConfig:
    """LoRAs to apply."""

    lora_weight: tuple[Path, ...] = option(
        (), "LoRA files, in any known layout", Path, nargs="+", metavar="PATH"
    )
    lora_multiplier: tuple[float, ...] = option(
        (), "strengths in the same order (default: 1.0)", lora_strength, nargs="+"
    )
    """May be shorter than `lora_weight`; missing values are 1."""
    lora_mode: Literal["merge", "runtime"] = option(
        "merge", "merge: add to the weights before the model runs; runtime: keep separate (default: merge)"
    )
    include_patterns: tuple[str, ...] = option(
        (), "use only LoRA keys that contain a match of this regular expression", nargs="+", metavar="RE"
    )
    exclude_patterns: tuple[str, ...] = option(
        (), "skip LoRA keys that contain a match of this regular expression", nargs="+", metavar="RE"
    )
    lora_allow_partial: bool = option(False, "use a LoRA even if some of its keys match no layer")
    no_lora_trigger: bool = option(False, "do not prepend a LoRA's trigger words to the prompt")
    save_merged_model: Path | None = option(None, "write the DiT with the LoRAs merged, then stop", Path)

    def __post_init__(self) -> None:
        problems = []
        if len(self.lora_multiplier) > len(self.lora_weight):
            problems.append(
                f"--lora_multiplier: {len(self.lora_multiplier)} values for {len(self.lora_weight)} "
                "--lora_weight: give at most one for each"
            )
        if self.save_merged_model is not None and not self.lora_weight:
            problems.append("--save_merged_model has nothing to merge: add --lora_weight")
        if self.save_merged_model is not None and self.lora_mode == "runtime":
            problems.append("--save_merged_model merges, --lora_mode runtime does not: give only one of them")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class OutputConfig:
    """Output files."""

    output: Path | None = option_made_into(
        Option(
            help="a .mp4 file, a .png file (one image) or a folder (files named by time)",
            metavar="PATH",
            read=path_text,
            hidden_names=("save_path",),
        )
    )
    """None only with --save_merged_model."""
    output_is_folder: bool = False
    """Whether the path ended with a separator."""
    output_type: Literal["video", "images", "latent", "both", "latent_images"] = option(
        "video", "what to write; both: video and latent (default: video)"
    )
    fps: int = option(FPS, f"frames per second, at most 1000 (default: {FPS})", int_between(1, 1000))
    crf: int = option(14, "quality of the video: 0 lossless, 51 worst (default: 14)", int_between(0, 51))
    trim_tail_frames: int = option(0, "drop the last N frames (default: 0)", non_negative_int)
    overwrite: bool = option(False, "replace existing files instead of choosing a new name")
    no_metadata: bool = option(False, "do not store prompt and settings in the files")
    verbose: bool = option(False, "log the command that makes each video again")

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

    task: Task = option_made_into(
        Option(
            help=f"model and its default settings (default: {DEFAULT_TASK})",
            default=DEFAULT_TASK,
            metavar="NAME",
        )
    )
    models: ModelPaths
    spec: PromptSpec
    """Prompt and settings of the command line; the settings are the defaults of prompts from a file or the
    console.
    """
    from_file: Path | None = option(
        None, "a .txt, .json or .toml file of prompts; --output is a folder", Path
    )
    interactive: bool = option(False, "read prompts from the console; models stay loaded")
    latent_path: Path | None = option(None, "decode a saved latent instead of sampling", Path)
    dry_run: bool = option(False, "check everything, print memory and FLOPs of each prompt, then stop")
    vram_budget: float | None = vram_budget_option(
        "GiB of device memory: add the base that suits the card, and --blocks_to_swap as far as needed"
    )
    """GiB of device memory available to sampling."""
    device: str | None = option(
        None, "where to compute (default: cuda if there is one, else cpu)", group="models"
    )
    dit: DitConfig
    text: TextEncoderConfig
    vae: VaeConfig
    lora: LoraConfig
    output: OutputConfig
    options: Mapping[str, Any] = field(default_factory=dict, compare=False)
    """The values of all options, defaults included, by name; files and folders are `Path`."""

    def __post_init__(self) -> None:
        sources = {
            "--prompt": self.spec.prompt is not None,
            "--from_file": self.from_file is not None,
            "--interactive": self.interactive,
            "--latent_path": self.latent_path is not None,
        }
        given = [flag for flag, is_given in sources.items() if is_given]
        problems = []
        merges = self.lora.save_merged_model is not None
        if not merges and len(given) != 1:
            what = f"got {' and '.join(given)}" if given else "none was given"
            problems.append(f"exactly one of {', '.join(sources)} is required: {what}")
        if self.dry_run and (merges or self.interactive or self.latent_path is not None):
            problems.append(
                "--dry_run plans for --prompt or --from_file: omit --interactive, "
                "--latent_path and --save_merged_model"
            )
        if self.output.output is None and not merges:
            problems.append("--output is required: a .mp4, a .png or a folder")
        if problems:
            raise ConfigError(problems)
