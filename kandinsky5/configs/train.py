"""Everything a training run is told, as frozen dataclasses. Field names are those of the options."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.configs.text_encoders import Quantization
from kandinsky5.configs.weights import DEFAULT_RING_SIZE, WeightsConfig
from kandinsky5.tasks import DitParams, NablaParams, Task
from modules.attention_backends import DEFAULT_BACKEND
from modules.errors import ConfigError
from networks.lora_types import DEFAULT_TYPE, lora_type

TIMESTEP_SAMPLINGS = (
    "sigma",
    "uniform",
    "sigmoid",
    "shift",
    "flux_shift",
    "qwen_shift",
    "krea2_shift",
    "flux2_shift",
    "logsnr",
    "qinglong_flux",
    "qinglong_qwen",
)
ROOM_FOR_ENDINGS = 64
"""Bytes kept for what is added to the output name: position, time, seed, ending of LoRA, state or sample."""
WEIGHTING_SCHEMES = ("none", "logit_normal", "mode", "cosmap", "sigma_sqrt")
MODE_SCALES = (-1.0, 2.0 / (math.pi - 2.0))
"""Between these the formula of `--weighting_scheme mode` is monotone: Esser et al. 2024, arXiv 2403.03206,
section 3.1."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig:
    """How a training step draws its noise level and weights its loss."""

    timestep_sampling: str = "sigma"
    discrete_flow_shift: float = 1.0
    """s in sigma' = s*sigma / (1 + (s-1)*sigma); above 1 favours high noise."""
    sigmoid_scale: float = 1.0
    min_timestep: float = 0.0
    max_timestep: float = 1000.0
    """Both in units of 1000 * sigma."""
    preserve_distribution_shape: bool = False
    """Redraw what falls outside min..max instead of squeezing the whole distribution into it."""
    num_timestep_buckets: int | None = None
    weighting_scheme: str = "none"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29

    def __post_init__(self) -> None:
        problems = []
        if self.discrete_flow_shift <= 0:
            problems.append(f"--discrete_flow_shift must be above 0, got {self.discrete_flow_shift:g}")
        if not 0.0 <= self.min_timestep < self.max_timestep <= 1000.0:
            problems.append("--min_timestep must lie below --max_timestep, both within 0..1000")
        if self.logit_std <= 0:
            problems.append(f"--logit_std must be above 0, got {self.logit_std:g}")
        low, high = MODE_SCALES
        if not low <= self.mode_scale <= high:
            problems.append(
                f"--mode_scale must lie within {low:g} .. {high:.4f} (2 / (pi - 2)), where the formula is a "
                f"distribution over 0 .. 1; got {self.mode_scale:g}"
            )
        if self.num_timestep_buckets is not None and self.num_timestep_buckets < 2:
            problems.append(f"--num_timestep_buckets must be at least 2, got {self.num_timestep_buckets}")
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(WeightsConfig):
    """The frozen model and how it computes."""

    task: Task
    dit: Path
    dit_params: DitParams
    """The task's, with `--override_dit` merged in."""
    nabla: NablaParams | None = None
    scheduler_scale: float = 10.0
    """Sampling schedule of the task; goes into the metadata."""
    mixed_precision: Literal["no", "bf16"] | None = None
    """None: what accelerate was started with, else bf16 on CUDA and float32 on the CPU."""
    dit_dtype: str | None = None
    """A dtype word; wins over mixed_precision."""
    attention: str = DEFAULT_BACKEND
    """A name in `ATTENTION_BACKENDS`."""
    gradient_checkpointing: bool = False
    gradient_checkpointing_keep_attention: int = 0
    """Visual blocks whose attention outputs are kept instead of computed again."""
    gradient_checkpointing_cpu_offload: bool = False
    block_swap_ring_size: int = DEFAULT_RING_SIZE
    """Device buffers that the swapped blocks take turns in."""
    base_weights: tuple[Path, ...] = ()
    base_weights_multiplier: tuple[float, ...] = ()
    lora_allow_partial: bool = False
    compile: CompileConfig | None = None
    """None runs the blocks as they are."""
    cuda_allow_tf32: bool = False
    cuda_cudnn_benchmark: bool = False
    vae: str | None = None
    """Given for samples; its name goes into the metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Image-to-video training."""

    i2v_mode: Literal["first", "first_last"] = "first"
    i2v_conditioning: Literal["inference", "channels"] = "inference"
    visual_cond_prob: float = 1.0
    """Chance per clip of being conditioned."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """What the loss is made of beside the velocity error."""

    masked_loss: bool = False
    """Weight the error by the clips' masks."""
    mask_min_weight: float = 0.0
    """What a position counts at least, where its mask is black."""
    prior_loss_weight: float = 0.0
    """Of the difference from the base model on other captions; 0 leaves that term out."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which caches are trained on, and how they are read."""

    dataset_config: Path
    caption_dropout_rate: float = 0.0
    """For datasets whose own table gives no rate."""
    validation_dataset_config: Path | None = None
    validation_split: float | None = None
    """Share of the source files that is measured and not trained on."""
    validate_every_n_steps: int | None = None
    validate_every_n_epochs: int | None = None
    max_data_loader_n_workers: int = 8
    strict: bool = False
    allow_missing: bool = False
    allow_upstream_text_cache: bool = False
    allow_changed_data: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    optimizer_type: str = "AdamW"
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 2e-6
    max_grad_norm: float = 1.0
    """0 means no clipping."""
    lr_scheduler: str = "constant"
    lr_scheduler_type: str = ""
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)
    lr_warmup_steps: int | float = 0
    lr_decay_steps: int | float = 0
    """Whole numbers are optimizer steps, fractions below 1 shares of the run."""
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The LoRA."""

    network_module: str = DEFAULT_TYPE.network_module
    network_dim: int = 4
    network_alpha: float = 1.0
    network_dropout: float | None = None
    network_args: Mapping[str, Any] = field(default_factory=dict)
    network_weights: Path | None = None
    dim_from_weights: bool = False
    scale_weight_norms: float | None = None
    ema_decay: float | None = None
    """Share of the moving average that stays at every step; None keeps no average."""

    def __post_init__(self) -> None:
        if self.ema_decay is not None and not 0.0 < self.ema_decay < 1.0:
            raise ConfigError(f"--ema_decay must lie between 0 and 1, got {self.ema_decay:g}")
        if lora_type(self.network_module).is_plain:
            return
        given = {
            "network_dropout": self.network_dropout,
            "dim_from_weights": self.dim_from_weights,
            "scale_weight_norms": self.scale_weight_norms is not None,
        }
        problems = [
            f"--{name}: not available with --network_module {self.network_module}"
            for name, value in given.items()
            if value
        ]
        if problems:
            raise ConfigError(problems)


DEFAULT_TRAIN_STEPS = 1600


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long and in what order a run goes."""

    max_train_steps: int | None = None
    """None: `DEFAULT_TRAIN_STEPS`, or where the run that is resumed was to end."""
    max_train_epochs: int | None = None
    """Wins over max_train_steps."""
    gradient_accumulation_steps: int = 1
    seed: int | None = None
    on_nan: Literal["stop", "skip"] = "stop"
    resume: str | None = None
    """A state directory, or "auto"."""
    dry_run: bool = False
    """Check and plan, then end."""
    no_probe: bool = False
    vram_budget: float | None = None
    """GiB of device memory that the largest batch may need."""
    ddp_timeout: float | None = None
    """Minutes."""
    ddp_gradient_as_bucket_view: bool = False
    ddp_static_graph: bool = False


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig:
    """What is written, when, and what is deleted again."""

    output_dir: Path
    output_name: str
    output_dir_fallback: Path | None = None
    """Where LoRA and state go when output_dir cannot be written any more; the run then ends."""
    overwrite: bool = False
    save_precision: str = "bf16"
    lora_format: Literal["diffusers", "kohya"] = "diffusers"
    save_every_n_epochs: int | None = None
    save_every_n_steps: int | None = None
    save_last_n_epochs: int | None = None
    save_last_n_steps: int | None = None
    save_state: bool = False
    save_state_on_train_end: bool = False
    save_last_n_epochs_state: int | None = None
    save_last_n_steps_state: int | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataConfig:
    """What a LoRA file says about itself."""

    no_metadata: bool = False
    training_comment: str | None = None
    metadata_title: str | None = None
    metadata_author: str | None = None
    metadata_description: str | None = None
    metadata_license: str | None = None
    metadata_tags: str | None = None
    metadata_reso: tuple[int, int] | None = None
    """Width, height."""
    metadata_arch: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where curves go beside metrics.jsonl."""

    logging_dir: Path | None = None
    log_with: Literal["tensorboard", "wandb", "all"] | None = None
    """None: TensorBoard with a logging_dir, else nothing."""
    log_prefix: str = ""
    log_tracker_name: str = "network_train"
    """Project of wandb."""
    wandb_run_name: str | None = None
    """None: the output name."""
    wandb_api_key: str | None = field(default=None, repr=False)
    log_tracker_settings: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, repr=False)
    """Arguments for "tensorboard" and "wandb", from `--log_tracker_config`."""
    log_config: bool = False

    @property
    def uses_tensorboard(self) -> bool:
        return self.logging_dir is not None and self.log_with != "wandb"

    @property
    def uses_wandb(self) -> bool:
        return self.log_with in ("wandb", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Uploads to the Hugging Face hub."""

    huggingface_repo_id: str | None = None
    """`user/name`; None: nothing is uploaded."""
    huggingface_repo_type: Literal["model", "dataset", "space"] = "model"
    huggingface_path_in_repo: str = ""
    huggingface_token: str | None = field(default=None, repr=False)
    """None: the one that `hf auth login` stored."""
    huggingface_repo_visibility: Literal["public", "private"] = "private"
    """Of a repository that does not exist yet."""
    save_state_to_huggingface: bool = False
    resume_from_huggingface: bool = False
    """`--resume` names a folder on the hub."""
    async_upload: bool = False

    def __post_init__(self) -> None:
        if self.huggingface_repo_id is not None:
            return
        given = {
            "huggingface_path_in_repo": self.huggingface_path_in_repo,
            "save_state_to_huggingface": self.save_state_to_huggingface,
            "async_upload": self.async_upload,
        }
        problems = [f"--{name} needs --huggingface_repo_id" for name, value in given.items() if value]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Videos and images made while training."""

    vae: Path
    text_encoder_qwen: str
    text_encoder_clip: str
    """The task's places where no option names one."""
    sample_prompts: Path | None = None
    """None: no samples."""
    sample_every_n_steps: int | None = None
    sample_every_n_epochs: int | None = None
    sample_at_first: bool = False
    vae_dtype: str | None = None
    """A dtype word; None: float16 on CUDA, float32 on the CPU."""
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    offload_dit_during_sampling: bool = False

    def __post_init__(self) -> None:
        if self.sample_prompts is not None:
            return
        given = {
            "sample_every_n_steps": self.sample_every_n_steps,
            "sample_every_n_epochs": self.sample_every_n_epochs,
            "sample_at_first": self.sample_at_first,
        }
        problems = [f"--{name} needs --sample_prompts" for name, value in given.items() if value]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run."""

    model: ModelConfig
    conditioning: ConditioningConfig
    loss: LossConfig
    data: DataConfig
    timesteps: TimestepConfig
    optimizer: OptimizerConfig
    network: NetworkConfig
    run: RunConfig
    saving: SavingConfig
    metadata: MetadataConfig
    tracking: TrackingConfig
    hub: HubConfig
    samples: SampleConfig
    options: Mapping[str, Any]
    """Every option as given or defaulted, as a configuration file would hold it; files and folders are
    `Path`. No secrets, and nothing that only concerns this call."""
    notes: tuple[str, ...] = ()
    """Log lines about options that have no effect here, and other advice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowTimestepsConfig:
    """`--show_timesteps`: draw and plot, train nothing."""

    show_timesteps: Literal["image", "console"]
    timesteps: TimestepConfig
    image_path: Path
    """Where the plot goes in image mode."""
    notes: tuple[str, ...] = ()
    """Log lines about options that have no effect here."""
