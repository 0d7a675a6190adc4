"""Options of a training run that have no effect beside the others, and what would make each act."""

from __future__ import annotations

from kandinsky5.cli.idle_rules import IdleRule
from kandinsky5.configs.train import OptimizerConfig, TimestepConfig, TrainConfig
from modules.optimizer_kinds import is_schedule_free, takes_relative_steps

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


RUN_RULES: tuple[IdleRule[TrainConfig], ...] = (
    IdleRule(
        ("i2v_mode", "i2v_conditioning", "visual_cond_prob"),
        lambda c: not c.model.task.is_i2v,
        "--task names no image-to-video model",
    ),
    IdleRule(
        ("nabla_method", "nabla_P", "nabla_wT", "nabla_wH", "nabla_wW", "nabla_add_sta"),
        lambda c: c.model.nabla is None,
        "the task attends densely; add --force_nabla_attention",
    ),
    IdleRule(
        ("nabla_wT", "nabla_wH", "nabla_wW"),
        lambda c: c.model.nabla is not None and not c.model.nabla.add_sta,
        "the sliding window is left out; leave out --no_nabla_add_sta",
    ),
    IdleRule(
        ("force_nabla_attention",),
        lambda c: c.model.task.nabla is not None,
        "the task has this attention already",
    ),
    IdleRule(
        ("mixed_precision",),
        lambda c: c.model.dit_dtype is not None,
        "--dit_dtype wins",
    ),
    IdleRule(
        ("compile_mode", "dynamo_mode"),
        lambda c: c.model.compile is not None and c.model.compile.compile_backend != "inductor",
        "only the back end inductor has modes",
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
        ("huggingface_repo_type", "huggingface_repo_visibility"),
        lambda c: c.hub.huggingface_repo_id is None,
        "nothing is uploaded; add --huggingface_repo_id",
    ),
    IdleRule(
        (
            "vae",
            "text_encoder_qwen",
            "text_encoder_clip",
            "vae_dtype",
            "fp8_llm",
            "quantized_qwen",
            "offload_dit_during_sampling",
        ),
        lambda c: c.samples.sample_prompts is None,
        "only used for samples; add --sample_prompts",
    ),
)
