"""The options that have no effect beside the others: one table for all scripts.

A valid value without effect is one log line, never an error: shared command lines and configuration files run
as they are. Only what differs from its default counts as given, so a file may hold all options of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kandinsky5.configs.caching import CacheLatentsConfig
from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.configs.train import OptimizerConfig, TimestepConfig, TrainConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.tasks import NablaParams, Task
from modules.attention_backends import ATTENTION_BACKENDS
from modules.optimizer_kinds import is_schedule_free, takes_relative_steps
from modules.options import Option

_Config = TypeVar("_Config")


@dataclass(frozen=True, slots=True)
class IdleRule(Generic[_Config]):
    """Options that have no effect under a condition."""

    options: tuple[str, ...]
    """Names without dashes; a word of `--network_args` is "network_args word"."""
    is_idle: Callable[[_Config], bool]
    why: str
    """The reason, and what to add or leave out."""


def idle_notes(rules: Sequence[IdleRule[_Config]], config: _Config, given: Collection[str]) -> dict[str, str]:
    """Option -> log line, for every option in `given` that has no effect, by the first rule that holds."""
    notes: dict[str, str] = {}
    for rule in rules:
        idle = [name for name in rule.options if name in given and name not in notes]
        if idle and rule.is_idle(config):
            notes |= {name: f"--{name} has no effect: {rule.why}" for name in idle}
    return notes


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> set[str]:
    """Names of the options whose values are not their defaults."""
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}


def ignored_notes(options: Mapping[str, Option], given: Collection[str]) -> list[str]:
    """Log lines for the options in `given` that never have an effect."""
    return [
        f"--{name} has no effect: {declared.help}"
        for name, declared in options.items()
        if declared.is_ignored and name in given
    ]


_NABLA_WINDOW = ("nabla_wT", "nabla_wH", "nabla_wW")
_NABLA = ("nabla_method", "nabla_P", *_NABLA_WINDOW, "nabla_add_sta")
_COMPILE = (
    "compile_backend",
    "compile_mode",
    "compile_dynamic",
    "compile_fullgraph",
    "compile_cache_size_limit",
)

WEIGHT_RULES: tuple[IdleRule[WeightsConfig], ...] = (
    IdleRule(("fp8_fast",), lambda c: not c.fp8_base, "add --fp8_base"),
    IdleRule(("int8_fast",), lambda c: not c.int8_base, "add --int8_base"),
)

COMPILE_RULES: tuple[IdleRule[CompileConfig | None], ...] = (
    IdleRule(_COMPILE, lambda c: c is None, "add --compile"),
    IdleRule(
        ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"), lambda c: c is None, "add --dynamo_backend"
    ),
    IdleRule(
        ("compile_mode", "dynamo_mode"),
        lambda c: c is not None and c.compile_backend != "inductor",
        "only the back end inductor has modes",
    ),
)

NABLA_RULES: tuple[IdleRule[NablaParams | None], ...] = (
    IdleRule(_NABLA, lambda c: c is None, "the task has full attention; add --force_nabla_attention"),
    IdleRule(
        _NABLA_WINDOW,
        lambda c: c is not None and not c.add_sta,
        "the window is not always kept; leave out --no_nabla_add_sta",
    ),
)

TASK_RULES: tuple[IdleRule[Task], ...] = (
    IdleRule(
        ("force_nabla_attention",), lambda c: c.nabla is not None, "the task has this attention already"
    ),
)


_SIZE_SHIFTS = ("flux_shift", "qwen_shift", "krea2_shift", "flux2_shift")
_LOGISTIC = ("sigmoid", "shift", *_SIZE_SHIFTS, "qinglong_flux", "qinglong_qwen")
_DENSITIES = ("logit_normal", "mode")


def _draws_normal(config: TimestepConfig) -> bool:
    """Whether the mean and width of a normal distribution enter the draws."""
    if config.timestep_sampling == "sigma":
        return config.weighting_scheme == "logit_normal"
    return config.timestep_sampling in ("logsnr", "qinglong_flux")


TIMESTEP_RULES: tuple[IdleRule[TimestepConfig], ...] = (
    IdleRule(
        ("discrete_flow_shift",),
        lambda c: c.timestep_sampling != "shift",
        "only --timestep_sampling shift shifts by it",
    ),
    IdleRule(
        ("sigmoid_scale",),
        lambda c: c.timestep_sampling not in _LOGISTIC,
        f"only --timestep_sampling {', '.join(_LOGISTIC)} scale by it",
    ),
    IdleRule(
        ("weighting_scheme",),
        lambda c: c.weighting_scheme in _DENSITIES and c.timestep_sampling != "sigma",
        "logit_normal and mode belong to --timestep_sampling sigma; cosmap and sigma_sqrt act in all modes",
    ),
    IdleRule(
        ("logit_mean", "logit_std"),
        lambda c: not _draws_normal(c),
        "it belongs to --timestep_sampling logsnr and qinglong_flux, and to sigma with "
        "--weighting_scheme logit_normal",
    ),
    IdleRule(
        ("mode_scale",),
        lambda c: c.timestep_sampling != "sigma" or c.weighting_scheme != "mode",
        "it belongs to --timestep_sampling sigma with --weighting_scheme mode",
    ),
    IdleRule(
        ("preserve_distribution_shape",),
        lambda c: (c.min_timestep, c.max_timestep) == (0.0, 1000.0),
        "nothing lies outside 0..1000; add --min_timestep or --max_timestep",
    ),
)

_SHAPES = (
    "lr_warmup_steps",
    "lr_decay_steps",
    "lr_scheduler_num_cycles",
    "lr_scheduler_power",
    "lr_scheduler_timescale",
    "lr_scheduler_min_lr_ratio",
)
_CLASSES = ("lr_scheduler_type", "lr_scheduler_args")


def _sets_own_rate(config: OptimizerConfig) -> bool:
    return takes_relative_steps(config.optimizer_type, config.optimizer_args)


def _never_decays(config: OptimizerConfig) -> bool:
    return config.lr_scheduler == "warmup_stable_decay" and not config.lr_decay_steps


_OWN_RATE = "AdaFactor sets its own learning rate; add --optimizer_args relative_step=False"
OPTIMIZER_RULES: tuple[IdleRule[OptimizerConfig], ...] = (
    IdleRule(
        ("lr_scheduler", *_CLASSES, *_SHAPES),
        lambda c: is_schedule_free(c.optimizer_type),
        "a schedule-free optimizer has no schedule; a warm-up is one of its --optimizer_args",
    ),
    IdleRule(
        ("lr_scheduler",),
        lambda c: _sets_own_rate(c) and c.lr_scheduler != "adafactor",
        _OWN_RATE,
    ),
    IdleRule(
        ("learning_rate", "network_args loraplus_lr_ratio", *_CLASSES, *_SHAPES),
        _sets_own_rate,
        _OWN_RATE,
    ),
    IdleRule(
        ("lr_scheduler", *_SHAPES),
        lambda c: bool(c.lr_scheduler_type),
        "--lr_scheduler_type wins; its settings are --lr_scheduler_args",
    ),
    IdleRule(
        ("lr_warmup_steps",),
        lambda c: c.lr_scheduler == "constant",
        "--lr_scheduler constant has no warm-up; use --lr_scheduler constant_with_warmup",
    ),
    IdleRule(
        ("lr_warmup_steps",),
        lambda c: c.lr_scheduler == "piecewise_constant",
        "piecewise_constant follows its step_rules from the first step on",
    ),
    IdleRule(
        ("lr_decay_steps",),
        lambda c: c.lr_scheduler != "warmup_stable_decay",
        "it belongs to --lr_scheduler warmup_stable_decay",
    ),
    IdleRule(
        ("lr_scheduler_num_cycles",),
        _never_decays,
        "warmup_stable_decay turns while it falls; add --lr_decay_steps",
    ),
    IdleRule(
        ("lr_scheduler_num_cycles",),
        lambda c: c.lr_scheduler not in ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
        "it belongs to --lr_scheduler cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay",
    ),
    IdleRule(
        ("lr_scheduler_power",),
        lambda c: c.lr_scheduler != "polynomial",
        "it belongs to --lr_scheduler polynomial",
    ),
    IdleRule(
        ("lr_scheduler_timescale",),
        lambda c: c.lr_scheduler != "inverse_sqrt",
        "it belongs to --lr_scheduler inverse_sqrt",
    ),
    IdleRule(
        ("lr_scheduler_min_lr_ratio",),
        lambda c: _never_decays(c) and not c.lr_warmup_steps,
        "warmup_stable_decay never leaves the full rate; add --lr_decay_steps",
    ),
    IdleRule(
        ("lr_scheduler_min_lr_ratio",),
        lambda c: c.lr_scheduler not in ("cosine_with_min_lr", "polynomial", "warmup_stable_decay", "rex"),
        "it belongs to --lr_scheduler cosine_with_min_lr, polynomial, warmup_stable_decay and rex",
    ),
)


def _lacks_state_saves(config: TrainConfig, every: int | None) -> bool:
    return every is None or not config.saving.save_state


TRAIN_RULES: tuple[IdleRule[TrainConfig], ...] = (
    IdleRule(
        ("i2v_mode", "i2v_conditioning", "visual_cond_prob"),
        lambda c: not c.model.task.is_i2v,
        "--task names no image-to-video model",
    ),
    IdleRule(
        ("gradient_checkpointing_cpu_offload", "gradient_checkpointing_keep_attention"),
        lambda c: not c.model.gradient_checkpointing,
        "add --gradient_checkpointing",
    ),
    IdleRule(("mask_min_weight",), lambda c: not c.loss.masked_loss, "add --masked_loss"),
    IdleRule(("dim_from_weights",), lambda c: c.network.network_weights is None, "add --network_weights"),
    IdleRule(
        ("validate_every_n_steps", "validate_every_n_epochs"),
        lambda c: c.data.validation_split is None and c.data.validation_dataset_config is None,
        "add --validation_split or --validation_dataset_config",
    ),
    IdleRule(("resume_from_huggingface",), lambda c: c.run.resume is None, "add --resume USER/REPO/PATH"),
    IdleRule(
        ("mixed_precision",),
        lambda c: c.model.dit_dtype is not None,
        "--dit_dtype wins",
    ),
    IdleRule(
        ("lora_allow_partial",),
        lambda c: not c.model.base_weights and c.network.network_weights is None,
        "no LoRA is read; it belongs to --base_weights and --network_weights",
    ),
    IdleRule(
        ("use_pinned_memory_for_block_swap", "block_swap_ring_size"),
        lambda c: c.model.blocks_to_swap == 0 and c.run.vram_budget is None,
        "no block is swapped; add --blocks_to_swap",
    ),
    IdleRule(
        ("network_dim", "network_alpha"),
        lambda c: c.network.dim_from_weights,
        "--dim_from_weights takes ranks and alphas from --network_weights",
    ),
    IdleRule(
        ("network_args conv_dim", "network_args conv_alpha"),
        lambda c: True,
        "the model has no convolutions",
    ),
    IdleRule(
        ("max_train_steps",),
        lambda c: c.run.max_train_epochs is not None,
        "--max_train_epochs wins",
    ),
    IdleRule(
        ("allow_changed_data",),
        lambda c: c.run.resume is None,
        "nothing is continued; it belongs to --resume",
    ),
    IdleRule(
        ("overwrite",),
        lambda c: c.run.resume is not None,
        "--resume continues what is there",
    ),
    IdleRule(
        ("save_last_n_epochs",),
        lambda c: c.saving.save_every_n_epochs is None,
        "add --save_every_n_epochs",
    ),
    IdleRule(
        ("save_last_n_steps",),
        lambda c: c.saving.save_every_n_steps is None,
        "add --save_every_n_steps",
    ),
    IdleRule(
        ("save_last_n_epochs_state",),
        lambda c: _lacks_state_saves(c, c.saving.save_every_n_epochs),
        "needs both --save_state and --save_every_n_epochs",
    ),
    IdleRule(
        ("save_last_n_steps_state",),
        lambda c: _lacks_state_saves(c, c.saving.save_every_n_steps),
        "needs both --save_state and --save_every_n_steps",
    ),
    IdleRule(
        ("training_comment",),
        lambda c: c.metadata.no_metadata,
        "--no_metadata leaves it out",
    ),
    IdleRule(
        ("log_prefix",),
        lambda c: not c.tracking.uses_tensorboard,
        "it names TensorBoard's folder; add --logging_dir",
    ),
    IdleRule(
        ("log_tracker_config",),
        lambda c: not c.tracking.uses_tensorboard and not c.tracking.uses_wandb,
        "no tracker is used; add --logging_dir or --log_with wandb",
    ),
    IdleRule(
        ("wandb_run_name", "wandb_api_key", "log_tracker_name"),
        lambda c: not c.tracking.uses_wandb,
        "add --log_with wandb",
    ),
    IdleRule(
        ("huggingface_token",),
        lambda c: c.hub.huggingface_repo_id is None and not c.hub.resume_from_huggingface,
        "the hub is not used; add --huggingface_repo_id",
    ),
    IdleRule(
        (
            "huggingface_repo_type",
            "huggingface_repo_visibility",
            "huggingface_path_in_repo",
            "save_state_to_huggingface",
            "async_upload",
        ),
        lambda c: c.hub.huggingface_repo_id is None,
        "nothing is uploaded; add --huggingface_repo_id",
    ),
    IdleRule(
        (
            "sample_every_n_steps",
            "sample_every_n_epochs",
            "sample_at_first",
            "vae",
            "text_encoder_qwen",
            "text_encoder_clip",
            "vae_dtype",
            "fp8_llm",
            "quantized_qwen",
            "prompt_templates",
            "offload_dit_during_sampling",
        ),
        lambda c: c.samples.sample_prompts is None,
        "only used for samples; add --sample_prompts",
    ),
)


_MAGCACHE = ("magcache_threshold", "magcache_k", "magcache_retention_ratio", "magcache_mag_ratios")
_CLIP = (
    "negative_prompt",
    "image",
    "image_last",
    "width",
    "height",
    "frames",
    "steps",
    "guidance",
    "scheduler_scale",
    "seed",
    "cpu_noise",
)
_DIT = (
    "dtype",
    "fp8_base",
    "fp8_fast",
    "int8_base",
    "int8_fast",
    "blocks_to_swap",
    "use_pinned_memory_for_block_swap",
    "offload_dit_during_sampling",
    "disable_numpy_memmap",
    "no_weight_check",
    "magcache",
    *_MAGCACHE,
    *ATTENTION_BACKENDS,
    "attn_mode",
    "force_nabla_attention",
    *_NABLA,
    "compile",
    *_COMPILE,
)
_TEXT = (
    "text_encoder_qwen",
    "text_encoder_clip",
    "text_encoder_cpu",
    "fp8_llm",
    "quantized_qwen",
    "prompt_templates",
)
_LORA = (
    "lora_weight",
    "lora_multiplier",
    "include_patterns",
    "exclude_patterns",
    "lora_mode",
    "lora_allow_partial",
    "no_lora_trigger",
)
_DECODING = ("vae_dtype", "vae_tiling", "vae_spatial_tile_sample_min_size")
_VIDEO = ("fps", "crf")


def _makes_many(config: GenerateConfig) -> bool:
    return config.from_file is not None or config.interactive


def _names_by_time(config: GenerateConfig) -> bool:
    output = config.output.output
    is_folder = config.output.output_is_folder or (output is not None and output.is_dir())
    return is_folder or _makes_many(config)


def _writes_no_video(config: GenerateConfig) -> bool:
    output = config.output.output
    is_image = output is not None and output.suffix.lower() == ".png" and not _names_by_time(config)
    return config.output.output_type not in ("video", "both") or is_image


def _has_one_pass(config: GenerateConfig) -> bool:
    guidance = config.task.guidance if config.spec.guidance is None else config.spec.guidance
    return guidance == 1 and not _makes_many(config)


GENERATE_RULES: tuple[IdleRule[GenerateConfig], ...] = (
    IdleRule(
        ("dit", "vram_budget", *_CLIP, *_DIT, *_TEXT, *_LORA),
        lambda c: c.latent_path is not None,
        "--latent_path decodes what was sampled before",
    ),
    IdleRule(
        (
            "prompt",
            "from_file",
            "interactive",
            "latent_path",
            "vram_budget",
            *_CLIP,
            *_DIT,
            *_TEXT,
            "vae",
            *_DECODING,
            "output",
            "output_type",
            *_VIDEO,
            "trim_tail_frames",
            "overwrite",
            "no_metadata",
            "no_lora_trigger",
        ),
        lambda c: c.lora.save_merged_model is not None,
        "--save_merged_model writes the model and stops",
    ),
    IdleRule(
        ("lora_mode", "lora_allow_partial", "no_lora_trigger", "include_patterns", "exclude_patterns"),
        lambda c: not c.lora.lora_weight,
        "no LoRA is read; add --lora_weight",
    ),
    IdleRule(
        _VIDEO,
        _writes_no_video,
        "no video is written",
    ),
    IdleRule(
        ("trim_tail_frames",),
        lambda c: c.output.output_type == "latent",
        "a latent is kept whole; give it with --latent_path",
    ),
    IdleRule(
        _DECODING,
        lambda c: c.output.output_type == "latent" and not c.task.is_i2v,
        "nothing is decoded; give it with --latent_path",
    ),
    IdleRule(
        ("offload_dit_during_sampling",),
        lambda c: not c.interactive,
        "each model is freed before the next one loads; it belongs to --interactive",
    ),
    IdleRule(
        ("vram_budget",),
        lambda c: c.interactive,
        "the sizes of the prompts are not known before; it belongs to --prompt and --from_file",
    ),
    IdleRule(_MAGCACHE, lambda c: c.dit.magcache is None, "add --magcache"),
    IdleRule(
        ("use_pinned_memory_for_block_swap",),
        lambda c: not c.dit.blocks_to_swap and c.vram_budget is None,
        "no block is swapped; add --blocks_to_swap",
    ),
    IdleRule(
        ("text_encoder_cpu",),
        lambda c: c.device == "cpu",
        "--device cpu computes everything there",
    ),
    IdleRule(
        ("overwrite",),
        _names_by_time,
        "files in a folder are named by time",
    ),
    IdleRule(
        ("negative_prompt",),
        _has_one_pass,
        "guidance 1 means no second pass",
    ),
)

CACHE_LATENTS_RULES: tuple[IdleRule[CacheLatentsConfig], ...] = (
    IdleRule(
        ("console_width", "console_num_images"),
        lambda c: c.debug is None or c.debug.mode != "console",
        "it belongs to --debug_mode console",
    ),
    IdleRule(
        (
            "vae",
            "vae_dtype",
            "vae_tiling",
            "vae_spatial_tile_sample_min_size",
            "device",
            "disable_cudnn_backend",
            "batch_size",
            "skip_existing",
            "prune",
            "strict",
            "skip_bad",
        ),
        lambda c: c.debug is not None,
        "--debug_mode encodes nothing",
    ),
)
