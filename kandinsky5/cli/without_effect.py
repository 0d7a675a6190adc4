"""Options that have no effect in combination with others: one table for all scripts.

A valid value without effect gives one log line, never an error, so that shared command lines and
configuration files work unchanged. Only values that differ from their defaults count, so a file may contain
all options of a run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from kandinsky5.configs.caching import CacheLatentsConfig, CacheTextConfig
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
class NoEffectRule(Generic[_Config]):
    """Options that have no effect under a condition."""

    options: tuple[str, ...]
    """Names without dashes; an argument of `--network_args` is "network_args name"."""
    applies: Callable[[_Config], bool]
    why: str
    """The reason, and what to add or remove."""


def no_effect_notes(
    rules: Sequence[NoEffectRule[_Config]], config: _Config, given: Collection[str]
) -> dict[str, str]:
    """Option -> log line, for every option in `given` that has no effect; the first rule that applies
    decides.
    """
    notes: dict[str, str] = {}
    for rule in rules:
        without_effect = [name for name in rule.options if name in given and name not in notes]
        if without_effect and rule.applies(config):
            notes |= {name: f"--{name} has no effect: {rule.why}" for name in without_effect}
    return notes


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> set[str]:
    """Names of the options whose values differ from their defaults."""
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

WEIGHT_RULES: tuple[NoEffectRule[WeightsConfig], ...] = (
    NoEffectRule(("fp8_fast",), lambda c: not c.fp8_base, "add --fp8_base"),
    NoEffectRule(("int8_fast",), lambda c: not c.int8_base, "add --int8_base"),
    NoEffectRule(("no_int8_rotation",), lambda c: not c.int8_fast, "add --int8_base --int8_fast"),
)

COMPILE_RULES: tuple[NoEffectRule[CompileConfig | None], ...] = (
    NoEffectRule(_COMPILE, lambda c: c is None, "add --compile"),
    NoEffectRule(
        ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic"), lambda c: c is None, "add --dynamo_backend"
    ),
    NoEffectRule(
        ("compile_mode", "dynamo_mode"),
        lambda c: c is not None and c.compile_backend != "inductor",
        "only the back end inductor has modes",
    ),
)

NABLA_RULES: tuple[NoEffectRule[NablaParams | None], ...] = (
    NoEffectRule(_NABLA, lambda c: c is None, "the task has full attention; add --force_nabla_attention"),
    NoEffectRule(
        _NABLA_WINDOW,
        lambda c: c is not None and not c.add_sta,
        "the window is not always kept; leave out --no_nabla_add_sta",
    ),
)

TASK_RULES: tuple[NoEffectRule[Task], ...] = (
    NoEffectRule(
        ("force_nabla_attention",), lambda c: c.nabla is not None, "the task has this attention already"
    ),
)


_SIZE_SHIFTS = ("flux_shift", "qwen_shift", "krea2_shift", "flux2_shift")
_LOGISTIC = ("sigmoid", "shift", *_SIZE_SHIFTS, "qinglong_flux", "qinglong_qwen")
_DENSITIES = ("logit_normal", "mode")


def _draws_normal(config: TimestepConfig) -> bool:
    """Whether sigma is drawn from a normal distribution with a configurable mean and width."""
    if config.timestep_sampling == "sigma":
        return config.weighting_scheme == "logit_normal"
    return config.timestep_sampling in ("logsnr", "qinglong_flux")


TIMESTEP_RULES: tuple[NoEffectRule[TimestepConfig], ...] = (
    NoEffectRule(
        ("discrete_flow_shift",),
        lambda c: c.timestep_sampling != "shift",
        "it applies to --timestep_sampling shift",
    ),
    NoEffectRule(
        ("sigmoid_scale",),
        lambda c: c.timestep_sampling not in _LOGISTIC,
        f"it applies to --timestep_sampling {', '.join(_LOGISTIC)}",
    ),
    NoEffectRule(
        ("weighting_scheme",),
        lambda c: c.weighting_scheme in _DENSITIES and c.timestep_sampling != "sigma",
        "logit_normal and mode apply to --timestep_sampling sigma; cosmap and sigma_sqrt apply to all modes",
    ),
    NoEffectRule(
        ("logit_mean", "logit_std"),
        lambda c: not _draws_normal(c),
        "it applies to --timestep_sampling logsnr and qinglong_flux, and to sigma with "
        "--weighting_scheme logit_normal",
    ),
    NoEffectRule(
        ("mode_scale",),
        lambda c: c.timestep_sampling != "sigma" or c.weighting_scheme != "mode",
        "it applies to --timestep_sampling sigma with --weighting_scheme mode",
    ),
    NoEffectRule(
        ("preserve_distribution_shape",),
        lambda c: (c.min_timestep, c.max_timestep) == (0.0, 1000.0),
        "the whole range 0..1000 is used; add --min_timestep or --max_timestep",
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
OPTIMIZER_RULES: tuple[NoEffectRule[OptimizerConfig], ...] = (
    NoEffectRule(
        ("lr_scheduler", *_CLASSES, *_SHAPES),
        lambda c: is_schedule_free(c.optimizer_type),
        "a schedule-free optimizer has no learning rate schedule; set its warm-up with --optimizer_args",
    ),
    NoEffectRule(
        ("lr_scheduler",),
        lambda c: _sets_own_rate(c) and c.lr_scheduler != "adafactor",
        _OWN_RATE,
    ),
    NoEffectRule(
        ("learning_rate", "network_args loraplus_lr_ratio", *_CLASSES, *_SHAPES),
        _sets_own_rate,
        _OWN_RATE,
    ),
    NoEffectRule(
        ("lr_scheduler", *_SHAPES),
        lambda c: bool(c.lr_scheduler_type),
        "--lr_scheduler_type takes precedence; its settings are --lr_scheduler_args",
    ),
    NoEffectRule(
        ("lr_warmup_steps",),
        lambda c: c.lr_scheduler == "constant",
        "--lr_scheduler constant has no warm-up; use --lr_scheduler constant_with_warmup",
    ),
    NoEffectRule(
        ("lr_warmup_steps",),
        lambda c: c.lr_scheduler == "piecewise_constant",
        "piecewise_constant follows its step_rules from the first step on",
    ),
    NoEffectRule(
        ("lr_decay_steps",),
        lambda c: c.lr_scheduler != "warmup_stable_decay",
        "it applies to --lr_scheduler warmup_stable_decay",
    ),
    NoEffectRule(
        ("lr_scheduler_num_cycles",),
        _never_decays,
        "it shapes the decay of warmup_stable_decay; add --lr_decay_steps",
    ),
    NoEffectRule(
        ("lr_scheduler_num_cycles",),
        lambda c: c.lr_scheduler not in ("cosine_with_restarts", "cosine_with_min_lr", "warmup_stable_decay"),
        "it applies to --lr_scheduler cosine_with_restarts, cosine_with_min_lr and warmup_stable_decay",
    ),
    NoEffectRule(
        ("lr_scheduler_power",),
        lambda c: c.lr_scheduler != "polynomial",
        "it applies to --lr_scheduler polynomial",
    ),
    NoEffectRule(
        ("lr_scheduler_timescale",),
        lambda c: c.lr_scheduler != "inverse_sqrt",
        "it applies to --lr_scheduler inverse_sqrt",
    ),
    NoEffectRule(
        ("lr_scheduler_min_lr_ratio",),
        lambda c: _never_decays(c) and not c.lr_warmup_steps,
        "without decay the minimum is never reached; add --lr_decay_steps",
    ),
    NoEffectRule(
        ("lr_scheduler_min_lr_ratio",),
        lambda c: c.lr_scheduler not in ("cosine_with_min_lr", "polynomial", "warmup_stable_decay", "rex"),
        "it applies to --lr_scheduler cosine_with_min_lr, polynomial, warmup_stable_decay and rex",
    ),
)


def _lacks_state_saves(config: TrainConfig, every: int | None) -> bool:
    return every is None or not config.saving.save_state


TRAIN_RULES: tuple[NoEffectRule[TrainConfig], ...] = (
    NoEffectRule(
        ("i2v_mode", "i2v_conditioning", "visual_cond_prob"),
        lambda c: not c.model.task.is_i2v,
        "--task is not an image-to-video task",
    ),
    NoEffectRule(
        ("gradient_checkpointing_cpu_offload", "gradient_checkpointing_keep_attention"),
        lambda c: not c.model.gradient_checkpointing,
        "add --gradient_checkpointing",
    ),
    NoEffectRule(("mask_min_weight",), lambda c: not c.loss.masked_loss, "add --masked_loss"),
    NoEffectRule(("dim_from_weights",), lambda c: c.network.network_weights is None, "add --network_weights"),
    NoEffectRule(
        ("validate_every_n_steps", "validate_every_n_epochs"),
        lambda c: c.data.validation_split is None and c.data.validation_dataset_config is None,
        "add --validation_split or --validation_dataset_config",
    ),
    NoEffectRule(("resume_from_huggingface",), lambda c: c.run.resume is None, "add --resume USER/REPO/PATH"),
    NoEffectRule(
        ("mixed_precision",),
        lambda c: c.model.dit_dtype is not None,
        "--dit_dtype takes precedence",
    ),
    NoEffectRule(
        ("lora_allow_partial",),
        lambda c: not c.model.base_weights and c.network.network_weights is None,
        "no LoRA is loaded; it applies to --base_weights and --network_weights",
    ),
    NoEffectRule(
        ("use_pinned_memory_for_block_swap", "block_swap_ring_size"),
        lambda c: c.model.blocks_to_swap == 0 and c.run.vram_budget is None,
        "no block is swapped; add --blocks_to_swap",
    ),
    NoEffectRule(
        ("network_dim", "network_alpha"),
        lambda c: c.network.dim_from_weights,
        "--dim_from_weights takes ranks and alphas from --network_weights",
    ),
    NoEffectRule(
        ("network_args conv_dim", "network_args conv_alpha"),
        lambda c: True,
        "the model has no convolutions",
    ),
    NoEffectRule(
        ("max_train_steps",),
        lambda c: c.run.max_train_epochs is not None,
        "--max_train_epochs takes precedence",
    ),
    NoEffectRule(
        ("allow_changed_data",),
        lambda c: c.run.resume is None,
        "no run is resumed; it applies to --resume",
    ),
    NoEffectRule(
        ("overwrite",),
        lambda c: c.run.resume is not None,
        "--resume continues the existing run",
    ),
    NoEffectRule(
        ("save_last_n_epochs",),
        lambda c: c.saving.save_every_n_epochs is None,
        "add --save_every_n_epochs",
    ),
    NoEffectRule(
        ("save_last_n_steps",),
        lambda c: c.saving.save_every_n_steps is None,
        "add --save_every_n_steps",
    ),
    NoEffectRule(
        ("save_last_n_epochs_state",),
        lambda c: _lacks_state_saves(c, c.saving.save_every_n_epochs),
        "it requires both --save_state and --save_every_n_epochs",
    ),
    NoEffectRule(
        ("save_last_n_steps_state",),
        lambda c: _lacks_state_saves(c, c.saving.save_every_n_steps),
        "it requires both --save_state and --save_every_n_steps",
    ),
    NoEffectRule(
        ("training_comment",),
        lambda c: c.metadata.no_metadata,
        "--no_metadata omits it",
    ),
    NoEffectRule(
        ("log_prefix",),
        lambda c: not c.tracking.uses_tensorboard,
        "it names the TensorBoard folder; add --logging_dir",
    ),
    NoEffectRule(
        ("log_tracker_config",),
        lambda c: not c.tracking.uses_tensorboard and not c.tracking.uses_wandb,
        "no tracker is used; add --logging_dir or --log_with wandb",
    ),
    NoEffectRule(
        ("wandb_run_name", "wandb_api_key", "log_tracker_name"),
        lambda c: not c.tracking.uses_wandb,
        "add --log_with wandb",
    ),
    NoEffectRule(
        ("huggingface_token",),
        lambda c: c.hub.huggingface_repo_id is None and not c.hub.resume_from_huggingface,
        "the hub is not used; add --huggingface_repo_id",
    ),
    NoEffectRule(
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
    NoEffectRule(
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
    "no_int8_rotation",
    "nf4_base",
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


GENERATE_RULES: tuple[NoEffectRule[GenerateConfig], ...] = (
    NoEffectRule(
        ("dit", "vram_budget", *_CLIP, *_DIT, *_TEXT, *_LORA),
        lambda c: c.latent_path is not None,
        "--latent_path decodes a saved latent",
    ),
    NoEffectRule(
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
    NoEffectRule(
        ("lora_mode", "lora_allow_partial", "no_lora_trigger", "include_patterns", "exclude_patterns"),
        lambda c: not c.lora.lora_weight,
        "no LoRA is loaded; add --lora_weight",
    ),
    NoEffectRule(
        _VIDEO,
        _writes_no_video,
        "no video is written",
    ),
    NoEffectRule(
        ("trim_tail_frames",),
        lambda c: c.output.output_type == "latent",
        "latents are saved with all frames; use it with --latent_path",
    ),
    NoEffectRule(
        _DECODING,
        lambda c: c.output.output_type == "latent" and not c.task.is_i2v,
        "nothing is decoded; use it with --latent_path",
    ),
    NoEffectRule(
        ("offload_dit_during_sampling",),
        lambda c: not c.interactive,
        "each model is freed before the next one is loaded; it applies to --interactive",
    ),
    NoEffectRule(
        ("vram_budget",),
        lambda c: c.interactive,
        "the sizes of the prompts are not known in advance; it applies to --prompt and --from_file",
    ),
    NoEffectRule(_MAGCACHE, lambda c: c.dit.magcache is None, "add --magcache"),
    NoEffectRule(
        ("use_pinned_memory_for_block_swap",),
        lambda c: not c.dit.blocks_to_swap and c.vram_budget is None,
        "no block is swapped; add --blocks_to_swap",
    ),
    NoEffectRule(
        ("text_encoder_cpu",),
        lambda c: c.device == "cpu",
        "--device cpu computes everything there",
    ),
    NoEffectRule(
        ("overwrite",),
        _names_by_time,
        "files in a folder are named by time",
    ),
    NoEffectRule(
        ("negative_prompt",),
        _has_one_pass,
        "guidance 1 means no second pass",
    ),
)

CACHE_TEXT_RULES: tuple[NoEffectRule[CacheTextConfig], ...] = (
    NoEffectRule(
        ("device", "batch_size", "skip_existing", "prune", "fp8_llm", "quantized_qwen"),
        lambda c: c.run.check,
        "--check encodes and deletes nothing",
    ),
)

CACHE_LATENTS_RULES: tuple[NoEffectRule[CacheLatentsConfig], ...] = (
    NoEffectRule(
        ("console_width", "console_num_images"),
        lambda c: c.debug is None or c.debug.mode != "console",
        "it applies to --debug_mode console",
    ),
    NoEffectRule(
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
    NoEffectRule(
        (
            "vae",
            "vae_tiling",
            "vae_spatial_tile_sample_min_size",
            "disable_cudnn_backend",
            "batch_size",
            "skip_existing",
            "prune",
        ),
        lambda c: c.run.check or c.preview is not None,
        "--check encodes and deletes nothing",
    ),
)
