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
    path_text,
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
"""Bytes reserved for suffixes of the output name: position, time, seed, and extension of LoRA, state or
sample.
"""
MODE_SCALES = (-1.0, 2.0 / (math.pi - 2.0))
"""Range in which the formula of `--weighting_scheme mode` is monotone: Esser et al. 2024, arXiv 2403.03206,
section 3.1."""
DEFAULT_TRAIN_STEPS = 1600
_MEMORY = "weights and memory"
_CUDA = "CUDA arithmetic"


def keyword_option(help: str) -> Any:
    """A field with named settings, from an option that takes NAME=VALUE arguments."""
    declared = Option(help=help, default=(), nargs="*", metavar="NAME=VALUE")
    return option_made_into(declared, default_factory=dict)


def secret_option(help: str) -> Any:
    """A field that is written neither to the log nor to any file of the run."""
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
    """Reads a share between 0 and 1, both excluded."""
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
        raise argparse.ArgumentTypeError(
            f"must be a number of steps, or a share such as 0.1 or 10%, got {word!r}"
        ) from None
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
    """Distribution of sigma and weighting of the loss."""

    timestep_sampling: TimestepSampling = option(
        "sigma", "distribution of sigma (default: sigma; shift is usual)"
    )
    discrete_flow_shift: float = option(
        1.0, "with --timestep_sampling shift (default: 1.0; 5.0 is usual)", positive
    )
    """s in sigma' = s*sigma / (1 + (s-1)*sigma); above 1 favours high sigma."""
    sigmoid_scale: float = option(1.0, "spread of the logistic distributions (default: 1.0)", positive)
    min_timestep: float = option(0.0, "lower limit of 1000 * sigma (default: 0)", float_between(0, 1000))
    max_timestep: float = option(
        1000.0, "upper limit of 1000 * sigma (default: 1000)", float_between(0, 1000)
    )
    preserve_distribution_shape: bool = option(
        False,
        "redraw values outside --min_timestep..--max_timestep instead of rescaling the distribution to it",
    )
    num_timestep_buckets: int | None = option(
        None,
        "stratify the draws of each epoch into this many equal buckets; 0: off (default)",
        off_at_zero(int_between(2)),
    )
    weighting_scheme: WeightingScheme = option(
        "none",
        "weighting of the loss; with --timestep_sampling sigma also the distribution of sigma "
        "(default: none)",
    )
    logit_mean: float = option(0.0, "mean for logit_normal and logsnr (default: 0.0)", any_number)
    logit_std: float = option(1.0, "standard deviation for logit_normal and logsnr (default: 1.0)", positive)
    mode_scale: float = option(1.29, "scale for --weighting_scheme mode (default: 1.29)", mode_scale)

    def __post_init__(self) -> None:
        if not self.min_timestep < self.max_timestep:
            raise ConfigError("--min_timestep must be below --max_timestep")


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowTimesteps:
    """`--show_timesteps`, which plots instead of training."""

    show_timesteps: Literal["image", "console"] | None = option(
        None, "plot 100 000 draws of sigma and the loss weights, then stop"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig(WeightsConfig):
    """The frozen model: weights, dtype, attention and memory."""

    task: Task = option_made_into(
        Option(help="model preset: k5-pro-t2v-5s-sd, k5-lite-t2v-5s-sd, ...", metavar="NAME", required=True)
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
    """The task's, with the changes of `--override_dit`."""
    nabla: NablaParams | None = None
    scheduler_scale: float = option_made_into(
        Option(help="shift of the sampling schedule (default: the task's)", read=sampling_shift)
    )
    """Shift of the sampling schedule; recorded in the metadata."""
    mixed_precision: Literal["no", "bf16"] | None = option_made_into(
        Option(
            help="bf16, or no for float32 (default: accelerate's, else bf16 on CUDA)",
            choices=("no", "fp16", "bf16"),
        ),
        default=None,
    )
    """None: accelerate's setting, else bf16 on CUDA and float32 on the CPU."""
    dit_dtype: str | None = option(
        None, "compute dtype; takes precedence over --mixed_precision", choices=DTYPES
    )
    attention: str = DEFAULT_BACKEND
    """A name in `ATTENTION_BACKENDS`."""
    gradient_checkpointing: bool = option(False, "recompute blocks in the backward pass", group=_MEMORY)
    gradient_checkpointing_keep_attention: int = option(
        0,
        "number of visual blocks that store their attention outputs instead of recomputing them (default: 0)",
        non_negative_int,
        group=_MEMORY,
    )
    gradient_checkpointing_cpu_offload: bool = option(
        False, "keep block inputs in host memory", group=_MEMORY
    )
    block_swap_ring_size: int = option(
        DEFAULT_RING_SIZE,
        f"number of device buffers for swapped blocks (default: {DEFAULT_RING_SIZE})",
        positive_int,
        group=_MEMORY,
    )
    base_weights: tuple[Path, ...] = option(
        (), "LoRA files merged in before training", Path, nargs="*", metavar="PATH"
    )
    base_weights_multiplier: tuple[float, ...] = option(
        (), "strength of each file of --base_weights (default: 1.0)", lora_strength, nargs="*"
    )
    lora_allow_partial: bool = option(False, "accept LoRA files even if some of their keys match no layer")
    compile: CompileConfig | None = compile_option()
    cuda_allow_tf32: bool = option(False, "use TF32 for float32 matrix products", group=_CUDA)
    cuda_cudnn_benchmark: bool = option(False, "let cuDNN benchmark its algorithms", group=_CUDA)
    vae: str | None = None
    """Used for samples; its file name is recorded in the metadata."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ConditioningConfig:
    """Image-to-video training."""

    i2v_mode: Literal["first", "first_last"] = option(
        "first", "conditioning frames (default: first; first_last is experimental)"
    )
    i2v_conditioning: Literal["inference", "channels"] = option(
        "inference",
        "inference: clean frames replace the noisy ones, as in generation (default); "
        "channels: clean frames go into the condition channels",
    )
    visual_cond_prob: float = option(1.0, "probability that a clip is conditioned (default: 1.0)", share)


@dataclass(frozen=True, kw_only=True, slots=True)
class LossConfig:
    """Masks and additional terms of the loss."""

    masked_loss: bool = option(False, "weight the loss by the clips' masks")
    mask_min_weight: float = option(0.0, "weight of the black parts of a mask, 0 to 1 (default: 0)", share)
    prior_loss_weight: float = option(
        0.0,
        "weight of a loss that keeps the LoRA close to the base model on other captions (default: 0, off)",
        float_between(0.0, 1e12),
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Training and validation data."""

    dataset_config: Path = option_made_into(Option(help="dataset file", read=Path, required=True))
    caption_dropout_rate: float = option(
        0.0,
        "probability that a clip is trained with the empty caption; the rate of a dataset takes precedence "
        "(default: 0)",
        share,
        group="loss",
    )
    validation_dataset_config: Path | None = option(
        None, "dataset file for the validation loss, measured with and without the LoRA on fixed noise", Path
    )
    validation_split: float | None = option(
        None,
        "hold out this share of the source files for the validation loss",
        float_between(0.001, 0.999),
        metavar="SHARE",
    )
    validate_every_n_steps: int | None = option(
        None, "validate after every n-th step and at the end", positive_int
    )
    validate_every_n_epochs: int | None = option(
        None, "validate after every n-th epoch and at the end", positive_int
    )
    max_data_loader_n_workers: int = option(
        8, "threads that prefetch caches (default: 8, at most the CPU count); 0: none", non_negative_int
    )
    strict: bool = option(False, "any skipped item is an error")
    allow_missing: bool = option(False, "train even if some items have no cache")
    allow_upstream_text_cache: bool = option(
        False, "use musubi-tuner's text caches for videos, which were encoded with the image template"
    )
    allow_changed_data: bool = option(
        False, "resume even if dataset, seed or batch settings differ; the resumed run is then not exact"
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
        "", "class of torch.optim.lr_scheduler or package.module.Class; takes precedence over --lr_scheduler"
    )
    lr_scheduler_args: Mapping[str, Any] = keyword_option("arguments of the schedule")
    lr_warmup_steps: int | float = option(
        0, "steps, or a share of the run such as 0.1 or 10%% (default: 0)", step_count
    )
    lr_decay_steps: int | float = option(
        0, "warmup_stable_decay: length of the decay, in the same form (default: 0)", step_count
    )
    """Integers are optimizer steps, fractions below 1 are shares of the run."""
    lr_scheduler_num_cycles: int = option(
        1, "number of cycles of schedules with cycles (default: 1)", positive_int
    )
    lr_scheduler_power: float = option(1.0, "exponent of polynomial (default: 1)", positive)
    lr_scheduler_timescale: int | None = option(
        None, "timescale of inverse_sqrt in steps (default: the warm-up steps)", positive_int
    )
    lr_scheduler_min_lr_ratio: float | None = option(
        None, "minimum learning rate as a share of --learning_rate", share
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class NetworkConfig:
    """The adapter to train."""

    network_module: str = option(
        DEFAULT_TYPE.network_module,
        f"kind of adapter: {', '.join(NETWORK_MODULES)} (default: {DEFAULT_TYPE.network_module})",
    )
    network_dim: int = option(4, "rank (default: 4; 32 is usual)", positive_int)
    network_alpha: float = option(
        1.0,
        "LoRA alpha; the weight change is scaled by alpha / rank; 0: alpha = rank (default: 1)",
        float_between(0.0, 1e6),
    )
    network_dropout: float | None = option(
        None, "dropout of the activations between the two LoRA matrices", float_between(0.0, 0.999)
    )
    network_args: Mapping[str, Any] = keyword_option(
        "settings of the adapter: rank_dropout, module_dropout, loraplus_lr_ratio, exclude_patterns, "
        "include_patterns, verbose; LoRA: use_dora=True for DoRA; LoKr: factor"
    )
    network_weights: Path | None = option(None, "start from this LoRA file, in any known layout", Path)
    dim_from_weights: bool = option(False, "take ranks and alphas from --network_weights")
    scale_weight_norms: float | None = option(
        None, "maximum norm of each layer's weight change; 0: off (default)", off_at_zero(positive)
    )
    ema_decay: float | None = option(
        None,
        "also save an exponential moving average of the LoRA with this decay, such as 0.99",
        inner_share,
    )

    def __post_init__(self) -> None:
        kind = lora_type(self.network_module, self.network_args)
        switch = f" with {kind.switch}" if kind.switch else ""
        given = {
            "network_dropout": self.network_dropout,
            "dim_from_weights": self.dim_from_weights,
            "scale_weight_norms": self.scale_weight_norms is not None,
        }
        problems = [
            f"--{name}: not supported by --network_module {self.network_module}{switch}; omit it"
            for name, value in given.items()
            if value and name not in kind.options
        ]
        if problems:
            raise ConfigError(problems)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunConfig:
    """Length, seed and checks of a run."""

    max_train_steps: int | None = option(
        None,
        f"optimizer steps (default: {DEFAULT_TRAIN_STEPS}, or with --resume those of the first run)",
        non_negative_int,
    )
    """None: `DEFAULT_TRAIN_STEPS`, or the planned end of the resumed run."""
    max_train_epochs: int | None = option(
        None, "epochs; takes precedence over --max_train_steps", positive_int
    )
    gradient_accumulation_steps: int = option(
        1, "batches per optimizer step (default: 1); the last step of an epoch may have fewer", positive_int
    )
    seed: int | None = option(None, "seed of all random numbers (default: a random one)", seed_number)
    on_nan: Literal["stop", "skip"] = option(
        "stop",
        "at a loss or gradient that is not finite: stop, or skip the step and stop after 10 in a row",
    )
    resume: str | None = option(
        None, "state folder to resume from; auto: the latest complete one", path_text, metavar="DIR|auto"
    )
    dry_run: bool = option(False, "check everything, print memory and FLOPs of each bucket, then stop")
    no_probe: bool = option(False, "on a GPU: do not run the largest batch once before the first step")
    vram_budget: float | None = vram_budget_option(
        "GiB of device memory: add the cheapest of these options that make the largest batch fit"
    )
    """GiB of device memory available to the largest batch."""
    ddp_timeout: float | None = option(
        None, "several processes: timeout for communication, in minutes", positive
    )
    ddp_gradient_as_bucket_view: bool = option(False, "several processes: avoid a copy of the gradients")
    ddp_static_graph: bool = option(
        False, "several processes: declare that every step uses all LoRA parameters"
    )

    def __post_init__(self) -> None:
        if self.max_train_steps == 0 and self.max_train_epochs is None:
            raise ConfigError(
                "--max_train_steps 0 means that --max_train_epochs sets the length: add "
                "--max_train_epochs, or give a number of steps"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class SavingConfig:
    """Saving and deletion of LoRAs and states."""

    output_dir: Path = option_made_into(Option(help="output folder", read=Path, required=True))
    output_name: str = option_made_into(Option(help="name of the LoRA", required=True))
    output_dir_fallback: Path | None = option(
        None,
        "folder on another disk for LoRA and state, used if the disk of --output_dir fills up during the run",
        Path,
    )
    overwrite: bool = option(False, "replace results of the same --output_name")
    save_precision: Literal["float", "fp32", "fp16", "bf16"] = option(
        "bf16", "dtype of the saved LoRA (default: bf16)"
    )
    lora_format: Literal["diffusers", "kohya"] = option(
        "diffusers",
        "key layout of the LoRA file (default: diffusers, for diffusers, ComfyUI and the official code)",
    )
    save_every_n_epochs: int | None = option(None, "save every n-th epoch", positive_int)
    save_every_n_steps: int | None = option(None, "save every n-th step", positive_int)
    save_last_n_epochs: int | None = option(None, "delete LoRAs older than n epochs", positive_int)
    save_last_n_steps: int | None = option(None, "delete LoRAs older than n steps", positive_int)
    save_state: bool = option(False, "save a state for --resume with every LoRA")
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

    no_metadata: bool = option(
        False, "store only the metadata that is needed to load the file, and the name of the run"
    )
    training_comment: str | None = option(None, "free text")
    metadata_title: str | None = option(None, "modelspec.title")
    metadata_author: str | None = option(None, "modelspec.author")
    metadata_description: str | None = option(None, "modelspec.description")
    metadata_license: str | None = option(None, "modelspec.license")
    metadata_tags: str | None = option(None, "modelspec.tags")
    metadata_reso: tuple[int, int] | None = option(
        None, "modelspec.resolution (default: the dataset's)", resolution, metavar="WIDTH,HEIGHT"
    )
    """Width and height."""
    metadata_arch: str | None = option(None, "architecture before /lora (default: Kandinsky-5)")


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackingConfig:
    """Trackers, in addition to metrics.jsonl."""

    logging_dir: Path | None = option(None, "folder for TensorBoard curves and wandb's files", Path)
    log_with: Literal["tensorboard", "wandb", "all"] | None = option(
        None, "tracker for curves and samples (default: tensorboard with --logging_dir)"
    )
    """None: TensorBoard with `logging_dir`, else no tracker."""
    log_prefix: str = option("", "prefix of the run's TensorBoard folder", path_text, metavar="TEXT")
    log_tracker_name: str = option("network_train", "wandb project (default: network_train)")
    wandb_run_name: str | None = option(None, "name of the run in wandb (default: the output name)")
    wandb_api_key: str | None = secret_option(
        "wandb API key; never saved (default: the login of `wandb login`)"
    )
    log_tracker_settings: Mapping[str, Mapping[str, Any]] = option_made_into(
        Option(
            help="TOML file with tracker arguments under [wandb] and [tensorboard]",
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
            raise ConfigError(f"--log_with {self.log_with} requires --logging_dir")

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
        None, "hub repository to which every saved LoRA is uploaded; created if missing", metavar="USER/REPO"
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
        "private", "visibility of a repository that is created (default: private)"
    )
    save_state_to_huggingface: bool = option(False, "upload states too")
    resume_from_huggingface: bool = option(
        False, "--resume names a state on the hub: USER/REPO/PATH[:REVISION[:TYPE]]"
    )
    async_upload: bool = option(False, "upload while training continues")


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleConfig:
    """Samples generated during training."""

    vae: Path = option_made_into(
        Option(help="VAE: a file or a folder (default: the task's)", metavar="PATH", read=path_text)
    )
    text_encoder_qwen: str = option_made_into(
        Option(help="Qwen2.5-VL: a folder or a hub id (default: the task's)", metavar="PATH", read=path_text)
    )
    text_encoder_clip: str = option_made_into(
        Option(help="CLIP: a folder or a hub id (default: the task's)", metavar="PATH", read=path_text)
    )
    """Paths that are not given default to the task's."""
    sample_prompts: Path | None = option(None, "file of prompts: .txt, .toml or .json", Path)
    """None: no samples."""
    sample_every_n_steps: int | None = option(None, "sample after every n-th step", positive_int)
    sample_every_n_epochs: int | None = option(None, "sample after every n-th epoch", positive_int)
    sample_at_first: bool = option(False, "sample before the first step too")
    vae_dtype: str | None = vae_dtype_option()
    quantization: Quantization | None = None
    """Of Qwen's Linear weights: --fp8_llm or --quantized_qwen."""
    prompt_templates: Path | None = prompt_templates_option()
    offload_dit_during_sampling: bool = option(
        False, "move the DiT to host memory while the VAE decodes samples"
    )


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
    """The values of all options, defaults included, as in a configuration file; files and folders are `Path`.
    Without secrets, and without options that apply to a single invocation."""
    notes: tuple[str, ...] = ()
    """Log lines about options that have no effect, and other advice."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ShowTimestepsConfig:
    """Settings of `--show_timesteps`, which draws and plots sigma without training."""

    show_timesteps: Literal["image", "console"]
    timesteps: TimestepConfig
    image_path: Path
    """Folder of the plot in image mode."""
    notes: tuple[str, ...] = ()
    """Log lines about options that have no effect."""
