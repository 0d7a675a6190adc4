"""Settings of a training run. Fields with `option` are options of the same name."""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from kandinsky5.configs.compilation import CompileConfig, compile_option
from kandinsky5.configs.text_encoders import Quantization, prompt_templates_option
from kandinsky5.configs.vae import vae_dtype_option
from kandinsky5.configs.weights import DEFAULT_RING_SIZE, DTYPES, WeightsConfig, vram_budget_option
from kandinsky5.prompts import lora_strength, sampling_shift, seed_number
from kandinsky5.tasks import DitParams, NablaParams, Task
from modules.attention_backends import DEFAULT_BACKEND
from modules.errors import ConfigError
from modules.options import (
    Option,
    any_number,
    float_between,
    int_between,
    non_negative_int,
    off_at_zero,
    option,
    option_made_into,
    positive,
    positive_int,
    share,
)
from networks.lora_types import DEFAULT_TYPE, NETWORK_MODULES, lora_type

TimestepSampling = Literal[
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
]
TIMESTEP_SAMPLINGS: tuple[TimestepSampling, ...] = get_args(TimestepSampling)
WeightingScheme = Literal["none", "logit_normal", "mode", "cosmap", "sigma_sqrt"]
WEIGHTING_SCHEMES: tuple[WeightingScheme, ...] = get_args(WeightingScheme)
ROOM_FOR_ENDINGS = 64
"""Bytes kept for what is added to the output name: position, time, seed, ending of LoRA, state or sample."""
MODE_SCALES = (-1.0, 2.0 / (math.pi - 2.0))
"""Between these the formula of `--weighting_scheme mode` is monotone: Esser et al. 2024, arXiv 2403.03206,
section 3.1."""
DEFAULT_TRAIN_STEPS = 1600
_MEMORY = "weights and memory"
_CUDA = "CUDA arithmetic"


def keyword_option(help: str) -> Any:
    """A field of settings by name, from an option that takes NAME=VALUE words."""
    declared = Option(help=help, default=(), nargs="*", metavar="NAME=VALUE")
    return option_made_into(declared, default_factory=dict)


def secret_option(help: str) -> Any:
    """A field that no log and no file of the run shows."""
    return option_made_into(Option(help=help), default=None, repr=False)


def mode_scale(word: str) -> float:
    """Reads `--mode_scale`."""
    value, (low, high) = any_number(word), MODE_SCALES
    if not low <= value <= high:
        raise argparse.ArgumentTypeError(
            f"must lie within {low:g} .. {high:.4f} (2 / (pi - 2)), where the formula is a distribution over "
            f"0 .. 1; got {word}"
        )
    return value


def inner_share(word: str) -> float:
    """Reads a share that is neither nothing nor all."""
    value = share(word)
    if value in (0.0, 1.0):
        raise argparse.ArgumentTypeError(f"must lie between 0 and 1, got {word}")
    return value


def step_count(word: str) -> int | float:
    """Reads a number of steps, or a share of the run as `0.1` or `10%`."""
    try:
        if word.endswith("%"):
            value = float(word[:-1]) / 100
        elif "." in word or "e" in word.lower():
            value = float(word)
        else:
            return non_negative_int(word)
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be a number of steps or a share, got {word!r}") from None
    if value == 0:
        return 0
    if not 0 < value < 1:
        raise argparse.ArgumentTypeError(f"a share must lie between 0 and 1 (0% and 100%), got {word}")
    return value


def resolution(word: str) -> tuple[int, int]:
    """Reads `width,height`, or one number for both."""
    parts = [positive_int(part.strip()) for part in word.split(",")]
    if len(parts) > 2:
        raise argparse.ArgumentTypeError(f'expected "width,height", got {word}')
    return parts[0], parts[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class TimestepConfig:
    """How a training step draws sigma and weights its loss."""

    timestep_sampling: TimestepSampling = option(
        "sigma", "distribution of sigma (default: sigma; shift is usual)"
    )
    discrete_flow_shift: float = option(
        1.0, "with --timestep_sampling shift (default: 1.0; 5.0 is usual)", positive
    )
    """s in sigma' = s*sigma / (1 + (s-1)*sigma); above 1 favours high sigma."""
    sigmoid_scale: float = option(1.0, "spread of the logistic distributions (default: 1.0)", positive)
    min_timestep: float = option(0.0, "lower end of 1000 * sigma (default: 0)", float_between(0, 1000))
    max_timestep: float = option(1000.0, "upper end of 1000 * sigma (default: 1000)", float_between(0, 1000))
    preserve_distribution_shape: bool = option(
        False, "redraw what falls outside min..max instead of squeezing the distribution into it"
    )
    num_timestep_buckets: int | None = option(
        None,
        "spread each epoch's draws evenly over this many parts; 0: off (default)",
        off_at_zero(int_between(2)),
    )
    weighting_scheme: WeightingScheme = option(
        "none", "weights of the loss, and with --timestep_sampling sigma the distribution (default: none)"
    )
    logit_mean: float = option(0.0, "mean for logit_normal and logsnr (default: 0.0)", any_number)
    logit_std: float = option(1.0, "standard deviation for logit_normal and logsnr (default: 1.0)", positive)
    mode_scale: float = option(1.29, "scale for --weighting_scheme mode (default: 1.29)", mode_scale)

    def __post_init__(self) -> None:
        if not self.min_timestep < self.max_timestep:
            raise ConfigError("--min_timestep must be below --max_timestep")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowTimesteps:
    """`--show_timesteps`, which trains nothing."""

    show_timesteps: Literal["image", "console"] | None = option(
        None, "show 100 000 draws of sigma and the weights, then stop"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(WeightsConfig):
    """The frozen model and how it computes."""

    task: Task = option_made_into(
        Option(help="which model: k5-pro-t2v-5s-sd, k5-lite-t2v-5s-sd, ...", metavar="NAME", required=True)
    )
    dit: Path = option_made_into(
        Option(help="DiT weights: file, first shard or folder (default: the task's)", read=Path)
    )
    dit_params: DitParams = option_made_into(
        Option(
            help="JSON object of DiT parameters that replace the task's",
            name="override_dit",
            metavar="JSON",
        )
    )
    """The task's, with `--override_dit` merged in."""
    nabla: NablaParams | None = None
    scheduler_scale: float = option_made_into(
        Option(help="shift of the sampling schedule (default: the task's)", read=sampling_shift)
    )
    """Sampling schedule of the task; goes into the metadata."""
    mixed_precision: Literal["no", "bf16"] | None = option_made_into(
        Option(
            help="bf16, or no for float32 (default: accelerate's, else bf16 on CUDA)",
            choices=("no", "fp16", "bf16"),
        ),
        default=None,
    )
    """None: what accelerate was started with, else bf16 on CUDA and float32 on the CPU."""
    dit_dtype: str | None = option(None, "compute dtype; wins over --mixed_precision", choices=DTYPES)
    attention: str = DEFAULT_BACKEND
    """A name in `ATTENTION_BACKENDS`."""
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass", group=_MEMORY)
    gradient_checkpointing_keep_attention: int = option(
        0,
        "visual blocks that keep their attention outputs instead of computing them again (default: 0)",
        non_negative_int,
        group=_MEMORY,
    )
    gradient_checkpointing_cpu_offload: bool = option(
        False, "keep block inputs in host memory", group=_MEMORY
    )
    block_swap_ring_size: int = option(
        DEFAULT_RING_SIZE,
        f"device buffers that the swapped blocks share (default: {DEFAULT_RING_SIZE})",
        positive_int,
        group=_MEMORY,
    )
    base_weights: tuple[Path, ...] = option(
        (), "LoRA files merged in before training", Path, nargs="*", metavar="PATH"
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "one strength per file of --base_weights (default: 1.0)", lora_strength, nargs="*"
    )
    lora_allow_partial: bool = option(False, "accept LoRA files some of whose keys fit no layer")
    compile: CompileConfig | None = compile_option()
    cuda_allow_tf32: bool = option(False, "TF32 in float32 products", group=_CUDA)
    cuda_cudnn_benchmark: bool = option(False, "let cuDNN time its algorithms", group=_CUDA)
    vae: str | None = None
    """Given for samples; its name goes into the metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Image-to-video training."""

    i2v_mode: Literal["first", "first_last"] = option(
        "first", "which frames the model is given (default: first; first_last is experimental)"
    )
    i2v_conditioning: Literal["inference", "channels"] = option(
        "inference", "clean frames in place of noisy ones, as in generation, or in the condition channels"
    )
    visual_cond_prob: float = option(1.0, "probability that a clip is conditioned (default: 1.0)", share)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Terms of the loss beside the velocity error."""

    masked_loss: bool = option(False, "weight the loss by the clips' masks")
    mask_min_weight: float = option(0.0, "weight of the black parts of a mask, 0 to 1 (default: 0)", share)
    prior_loss_weight: float = option(
        0.0,
        "weight of a loss that keeps the LoRA close to the base model on other captions (default: 0, off)",
        float_between(0.0, 1e12),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Which caches are trained on, and how they are read."""

    dataset_config: Path = option_made_into(Option(help="dataset file", read=Path, required=True))
    caption_dropout_rate: float = option(
        0.0,
        "probability that a clip is trained with the empty caption; a dataset's own rate wins (default: 0)",
        share,
        group="loss",
    )
    validation_dataset_config: Path | None = option(
        None, "dataset whose loss is measured on fixed noise, with and without the LoRA", Path
    )
    validation_split: float | None = option(
        None,
        "measure this share of the source files and do not train on it",
        float_between(0.001, 0.999),
        metavar="SHARE",
    )
    validate_every_n_steps: int | None = option(
        None, "measure after every n-th step as well as at the end", positive_int
    )
    validate_every_n_epochs: int | None = option(
        None, "measure after every n-th epoch as well as at the end", positive_int
    )
    max_data_loader_n_workers: int = option(
        8, "threads that read caches ahead (default: 8, at most the CPU count); 0: none", non_negative_int
    )
    strict: bool = option(False, "any skipped item is an error")
    allow_missing: bool = option(False, "train although some items have no cache")
    allow_upstream_text_cache: bool = option(
        False, "use text caches of musubi-tuner for videos although their template is the wrong one"
    )
    allow_changed_data: bool = option(
        False, "resume although dataset, seed or batch settings differ; the run is then not exact"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """Optimizer and learning rate."""

    optimizer_type: str = option(
        "AdamW",
        "AdamW, AdamW8bit, AdaFactor, a class of torch.optim or package.module.Class (default: AdamW)",
    )
    optimizer_args: Mapping[str, Any] = keyword_option(
        'arguments of the optimizer, such as "betas=(0.9,0.95)"'
    )
    learning_rate: float = option(2e-6, "learning rate (default: 2e-6; 1e-4 is usual)", positive)
    max_grad_norm: float = option(
        1.0, "gradients are clipped to this norm; 0: no clipping (default: 1.0)", float_between(0.0, 1e12)
    )
    lr_scheduler: str = option(
        "constant",
        "constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, "
        "inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, piecewise_constant, adafactor, rex "
        "(default: constant)",
    )
    lr_scheduler_type: str = option(
        "", "class of torch.optim.lr_scheduler or package.module.Class; wins over --lr_scheduler"
    )
    lr_scheduler_args: Mapping[str, Any] = keyword_option("arguments of the schedule")
    lr_warmup_steps: int | float = option(
        0, "steps, or a share of the run such as 0.1 or 10%% (default: 0)", step_count
    )
    lr_decay_steps: int | float = option(
        0, "warmup_stable_decay: length of the decay, in the same form (default: 0)", step_count
    )
    """Whole numbers are optimizer steps, fractions below 1 shares of the run."""
    lr_scheduler_num_cycles: int = option(
        1, "cycles of the schedules that have some (default: 1)", positive_int
    )
    lr_scheduler_power: float = option(1.0, "exponent of polynomial (default: 1)", positive)
    lr_scheduler_timescale: int | None = option(
        None, "steps of inverse_sqrt (default: the warm-up)", positive_int
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "lowest rate as a share of the learning rate", share
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The LoRA."""

    network_module: str = option(
        DEFAULT_TYPE.network_module,
        f"kind of adapter: {', '.join(NETWORK_MODULES)} (default: {DEFAULT_TYPE.network_module})",
    )
    network_dim: int = option(4, "rank (default: 4; 32 is usual)", positive_int)
    network_alpha: float = option(
        1.0,
        "the change is scaled by alpha / rank; 0: alpha = rank (default: 1)",
        float_between(0.0, 1e6),
    )
    network_dropout: float | None = option(
        None, "dropout of the rank-sized activations", float_between(0.0, 0.999)
    )
    network_args: Mapping[str, Any] = keyword_option(
        "settings of the adapter: rank_dropout, module_dropout, loraplus_lr_ratio, exclude_patterns, "
        "include_patterns, verbose; LoKr: factor"
    )
    network_weights: Path | None = option(None, "start from this LoRA, any format", Path)
    dim_from_weights: bool = option(False, "ranks and alphas from --network_weights")
    scale_weight_norms: float | None = option(
        None, "limit of the norm of every layer's change; 0: off (default)", off_at_zero(positive)
    )
    ema_decay: float | None = option(
        None,
        "save a moving average of the LoRA too, which keeps this share of itself at every step, such as 0.99",
        inner_share,
    )

    def __post_init__(self) -> None:
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


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """How long and in what order a run goes."""

    max_train_steps: int | None = option(
        None,
        f"optimizer steps (default: {DEFAULT_TRAIN_STEPS}, or with --resume those of the first run)",
        non_negative_int,
    )
    """None: `DEFAULT_TRAIN_STEPS`, or where the run that is resumed was to end."""
    max_train_epochs: int | None = option(None, "epochs; wins over --max_train_steps", positive_int)
    gradient_accumulation_steps: int = option(
        1, "batches per optimizer step (default: 1); the last step of an epoch may have fewer", positive_int
    )
    seed: int | None = option(None, "seed of all random numbers (default: a random one)", seed_number)
    on_nan: Literal["stop", "skip"] = option(
        "stop",
        "at a loss or gradient that is not finite: stop, or skip the step and stop after 10 in a row",
    )
    resume: str | None = option(
        None, "state folder to continue from; auto: the newest whole one", metavar="DIR|auto"
    )
    dry_run: bool = option(False, "check everything, print memory and FLOPs of each bucket, then stop")
    no_probe: bool = option(False, "on a GPU: do not try the largest batch before the first step")
    vram_budget: float | None = vram_budget_option(
        "add the cheapest of these options that make the largest batch fit into so much device memory"
    )
    """GiB of device memory that the largest batch may need."""
    ddp_timeout: float | None = option(None, "several processes: minutes to wait for each other", positive)
    ddp_gradient_as_bucket_view: bool = option(False, "several processes: avoid a copy of the gradients")
    ddp_static_graph: bool = option(False, "several processes: every step uses all parameters of the LoRA")

    def __post_init__(self) -> None:
        if self.max_train_steps == 0 and self.max_train_epochs is None:
            raise ConfigError("--max_train_steps 0 leaves the length to --max_train_epochs: give one of them")


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig:
    """What is written, when, and what is deleted again."""

    output_dir: Path = option_made_into(Option(help="folder of the results", read=Path, required=True))
    output_name: str = option_made_into(Option(help="name of the LoRA", required=True))
    output_dir_fallback: Path | None = option(
        None,
        "folder on another disk that LoRA and state go to if --output_dir fills up during the run",
        Path,
    )
    overwrite: bool = option(False, "replace results of the same --output_name")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = option(
        "bf16", "dtype of the saved LoRA (default: bf16)"
    )
    lora_format: Literal["diffusers", "kohya"] = option(
        "diffusers",
        "layout of the file (default: diffusers, read by diffusers, ComfyUI and the official code)",
    )
    save_every_n_epochs: int | None = option(None, "save every n-th epoch", positive_int)
    save_every_n_steps: int | None = option(None, "save every n-th step", positive_int)
    save_last_n_epochs: int | None = option(None, "delete LoRAs older than n epochs", positive_int)
    save_last_n_steps: int | None = option(None, "delete LoRAs older than n steps", positive_int)
    save_state: bool = option(False, "save with every LoRA what --resume needs")
    save_state_on_train_end: bool = option(False, "save a state at the end of the run")
    save_last_n_epochs_state: int | None = option(
        None, "delete states older than n epochs (default: --save_last_n_epochs)", positive_int
    )
    save_last_n_steps_state: int | None = option(
        None, "delete states older than n steps (default: --save_last_n_steps)", positive_int
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class MetadataConfig:
    """The metadata of a LoRA file."""

    no_metadata: bool = option(False, "only what is needed to use the file, and the name of the run")
    training_comment: str | None = option(None, "free text")
    metadata_title: str | None = option(None, "modelspec.title")
    metadata_author: str | None = option(None, "modelspec.author")
    metadata_description: str | None = option(None, "modelspec.description")
    metadata_license: str | None = option(None, "modelspec.license")
    metadata_tags: str | None = option(None, "modelspec.tags")
    metadata_reso: tuple[int, int] | None = option(
        None, "modelspec.resolution (default: the dataset's)", resolution, metavar="WIDTH,HEIGHT"
    )
    """Width, height."""
    metadata_arch: str | None = option(None, "architecture before /lora (default: Kandinsky-5)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Where curves go beside metrics.jsonl."""

    logging_dir: Path | None = option(None, "folder for TensorBoard curves and wandb's files", Path)
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "where curves and samples are shown (default: tensorboard with --logging_dir)"
    )
    """None: TensorBoard with a logging_dir, else nothing."""
    log_prefix: str = option("", "start of the name of the run's folder")
    log_tracker_name: str = option("network_train", "wandb project (default: network_train)")
    wandb_run_name: str | None = option(None, "name of the run in wandb (default: the output name)")
    wandb_api_key: str | None = secret_option("key for wandb; stored nowhere (default: as logged in)")
    log_tracker_settings: Mapping[str, Mapping[str, Any]] = option_made_into(
        Option(
            help="TOML file with arguments under [wandb] and [tensorboard]",
            read=Path,
            name="log_tracker_config",
        ),
        default_factory=dict,
        repr=False,
    )
    """Arguments for "tensorboard" and "wandb"."""
    log_config: bool = option(False, "log the options, without paths and keys")

    def __post_init__(self) -> None:
        if self.log_with in ("tensorboard", "all") and self.logging_dir is None:
            raise ConfigError(f"--log_with {self.log_with} needs --logging_dir")

    @property
    def uses_tensorboard(self) -> bool:
        return self.logging_dir is not None and self.log_with != "wandb"

    @property
    def uses_wandb(self) -> bool:
        return self.log_with in ("wandb", "all")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubConfig:
    """Uploads to the Hugging Face hub."""

    huggingface_repo_id: str | None = option(
        None, "upload every saved LoRA there; created if missing", metavar="USER/REPO"
    )
    """None: nothing is uploaded."""
    huggingface_repo_type: Literal["model", "dataset", "space"] = option(
        "model", "kind of the repository (default: model)"
    )
    huggingface_path_in_repo: str = option("", "folder in the repository", metavar="FOLDER")
    huggingface_token: str | None = secret_option(
        "access token (default: the one that `hf auth login` stored)"
    )
    huggingface_repo_visibility: Literal["public", "private"] = option(
        "private", "of a repository that is created (default: private)"
    )
    save_state_to_huggingface: bool = option(False, "upload states too")
    resume_from_huggingface: bool = option(
        False, "--resume names a state on the hub: USER/REPO/PATH[:REVISION[:TYPE]]"
    )
    async_upload: bool = option(False, "upload while training continues")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Videos and images made while training."""

    vae: Path = option_made_into(Option(help="VAE: a file or a folder (default: the task's)", metavar="PATH"))
    text_encoder_qwen: str = option_made_into(
        Option(help="Qwen2.5-VL: a folder or a hub id (default: the task's)", metavar="PATH")
    )
    text_encoder_clip: str = option_made_into(
        Option(help="CLIP: a folder or a hub id (default: the task's)", metavar="PATH")
    )
    """The task's places where no option names one."""
    sample_prompts: Path | None = option(None, "file of prompts: .txt, .toml or .json", Path)
    """None: no samples."""
    sample_every_n_steps: int | None = option(None, "sample after every n-th step", positive_int)
    sample_every_n_epochs: int | None = option(None, "sample after every n-th epoch", positive_int)
    sample_at_first: bool = option(False, "sample before the first step too")
    vae_dtype: str | None = vae_dtype_option()
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = prompt_templates_option()
    offload_dit_during_sampling: bool = option(False, "DiT to host memory while the VAE decodes samples")


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
