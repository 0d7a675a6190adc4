"""The training command line: argv -> one checked `TrainConfig`. The Namespace ends here."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from kandinsky5.cli.attention_options import attention_problems, chosen_attention
from kandinsky5.cli.common import local_name
from kandinsky5.cli.compile_options import compile_config
from kandinsky5.cli.config_file import file_values, read_toml, with_config_file
from kandinsky5.cli.idle_options import OPTIMIZER_RULES, RUN_RULES, TIMESTEP_RULES
from kandinsky5.cli.idle_rules import given_options, idle_notes
from kandinsky5.cli.train_options import ACCEPTED, build_parser
from kandinsky5.cli.weight_options import dit_weight_problems
from kandinsky5.configs.compilation import NO_BACKEND
from kandinsky5.configs.text_encoders import qwen_quantization
from kandinsky5.configs.train import (
    ROOM_FOR_ENDINGS,
    ConditioningConfig,
    DataConfig,
    HubConfig,
    LossConfig,
    MetadataConfig,
    ModelConfig,
    NetworkConfig,
    OptimizerConfig,
    RunConfig,
    SampleConfig,
    SavingConfig,
    ShowTimestepsConfig,
    TimestepConfig,
    TrackingConfig,
    TrainConfig,
)
from kandinsky5.tasks import DitParams, NablaParams, Task, get_task, override_params
from modules.errors import ConfigError
from modules.file_names import name_problem
from modules.keyword_args import parse_keyword_args
from networks.lora_types import NETWORK_MODULES, lora_type

_SECRETS = ("wandb_api_key", "huggingface_token")
_PLACES = ("vae",)
_PLACES_OR_IDS = ("text_encoder_qwen", "text_encoder_clip")
_NOT_OF_THE_RUN = ("help", "config_file", "resume", "overwrite", "traceback", "show_timesteps")
"""Options that say how this call is made, which a repeated run decides anew."""
_NEWCOMER_OPTIONS = (
    "discrete_flow_shift",
    "timestep_sampling",
    "learning_rate",
    "network_dim",
    "network_alpha",
)
_NEWCOMER_RECIPE = (
    "--timestep_sampling shift --discrete_flow_shift 5.0 --learning_rate 1e-4 "
    "--network_dim 32 --network_alpha 32"
)


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig | ShowTimestepsConfig:
    """Read the command line and its `--config_file`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = build_parser()
    words = list(sys.argv[1:] if argv is None else argv)
    args = parser.parse_args(with_config_file(parser, words))
    if args.show_timesteps:
        image = (args.output_dir or Path()) / f"{args.output_name or 'k5'}_timesteps.png"
        timesteps = _timesteps(args)
        notes = idle_notes(TIMESTEP_RULES, timesteps, given_options(parser, args))
        return ShowTimestepsConfig(
            show_timesteps=args.show_timesteps,
            timesteps=timesteps,
            image_path=image,
            notes=tuple(notes.values()),
        )
    return _train_config(parser, args)


def _train_config(parser: argparse.ArgumentParser, args: argparse.Namespace) -> TrainConfig:
    problems = [*_missing(args), *_refused(args), *_impossible_pairs(args)]
    parts: dict[str, Any] = {}
    builders: dict[str, Callable[[argparse.Namespace], Any]] = {
        "model": _model,
        "conditioning": lambda a: _fill(ConditioningConfig, a),
        "loss": lambda a: _fill(LossConfig, a),
        "data": lambda a: _fill(DataConfig, a),
        "timesteps": _timesteps,
        "optimizer": _optimizer,
        "network": _network,
        "run": lambda a: _fill(RunConfig, a),
        "saving": _saving,
        "metadata": lambda a: _fill(MetadataConfig, a),
        "tracking": _tracking,
        "hub": lambda a: _fill(HubConfig, a),
        "samples": _samples,
    }
    for name, build in builders.items():
        try:
            parts[name] = build(args)
        except ConfigError as error:
            problems += error.problems
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    values = file_values(parser, args, places=_PLACES, places_or_ids=_PLACES_OR_IDS)
    left_out = {*_SECRETS, *_NOT_OF_THE_RUN}
    options = {name: value for name, value in values.items() if name not in left_out}
    config = TrainConfig(**parts, options=options)
    return replace(config, notes=tuple(_notes(parser, args, config)))


def _fill(kind: type, args: argparse.Namespace, **changed: Any) -> Any:
    """A config from the options that have its fields' names."""
    given = vars(args)
    values = {field.name: given[field.name] for field in fields(kind) if field.name in given}
    return kind(**{**values, **changed})


def _missing(args: argparse.Namespace) -> list[str]:
    required = ("task", "dataset_config", "output_dir", "output_name")
    return [f"--{name} is required" for name in required if vars(args)[name] is None]


def _refused(args: argparse.Namespace) -> list[str]:
    if args.mixed_precision == "fp16" or args.dit_dtype in ("fp16", "float16"):
        return ["fp16 cannot hold this model's activations: use --mixed_precision bf16, or no for float32"]
    return []


def _impossible_pairs(args: argparse.Namespace) -> list[str]:
    checks = [
        (args.fp8_scaled and not args.fp8_base, "--fp8_scaled needs --fp8_base"),
        (
            args.blocks_to_swap > 0 and not args.gradient_checkpointing,
            "--blocks_to_swap needs --gradient_checkpointing: the backward pass would read weights that left",
        ),
        (
            args.gradient_checkpointing_cpu_offload and not args.gradient_checkpointing,
            "--gradient_checkpointing_cpu_offload needs --gradient_checkpointing",
        ),
        (
            args.gradient_checkpointing_keep_attention > 0 and not args.gradient_checkpointing,
            "--gradient_checkpointing_keep_attention needs --gradient_checkpointing",
        ),
        (
            (args.compile or args.dynamo_backend != NO_BACKEND)
            and args.gradient_checkpointing_keep_attention > 0,
            "--gradient_checkpointing_keep_attention cannot see into compiled blocks: leave one of them out",
        ),
        (
            args.dim_from_weights and args.network_weights is None,
            "--dim_from_weights needs --network_weights",
        ),
        (
            len(args.base_weights_multiplier) > len(args.base_weights),
            f"--base_weights_multiplier: {len(args.base_weights_multiplier)} values for "
            f"{len(args.base_weights)} files of --base_weights",
        ),
        (
            bool(args.validate_every_n_steps or args.validate_every_n_epochs)
            and not (args.validation_dataset_config or args.validation_split),
            "--validate_every_n_* needs --validation_split or --validation_dataset_config",
        ),
        (
            bool(args.validation_split and args.validation_dataset_config),
            "--validation_split and --validation_dataset_config both say what to measure: leave one out",
        ),
        (
            args.resume_from_huggingface and args.resume in (None, "auto"),
            "--resume_from_huggingface needs --resume USER/REPO/PATH",
        ),
        (args.mask_min_weight > 0 and not args.masked_loss, "--mask_min_weight needs --masked_loss"),
        (
            args.log_with in ("tensorboard", "all") and args.logging_dir is None,
            f"--log_with {args.log_with} needs --logging_dir",
        ),
    ]
    problems = [message for is_wrong, message in checks if is_wrong]
    return [*attention_problems(args, for_training=True), *problems, *dit_weight_problems(args)]


def _model(args: argparse.Namespace) -> ModelConfig:
    if args.task is None:
        raise ConfigError("--task is required")
    task = get_task(args.task)
    multipliers = tuple(args.base_weights_multiplier)
    nabla = _nabla(task, args)
    if nabla is not None and args.gradient_checkpointing_keep_attention > 0:
        raise ConfigError(
            "--gradient_checkpointing_keep_attention cannot see into NABLA's compiled attention: leave it out"
        )
    return _fill(
        ModelConfig,
        args,
        attention=chosen_attention(args),
        compile=compile_config(args, for_training=True, has_nabla=nabla is not None),
        task=task,
        dit=args.dit or task.dit_path,
        dit_params=_dit_params(task, args.override_dit),
        nabla=nabla,
        scheduler_scale=args.scheduler_scale or task.scheduler_scale,
        base_weights=tuple(args.base_weights),
        base_weights_multiplier=multipliers + (1.0,) * (len(args.base_weights) - len(multipliers)),
    )


def _dit_params(task: Task, override: str | None) -> DitParams:
    if override is None:
        return task.dit_params
    try:
        changes = json.loads(override)
    except json.JSONDecodeError as error:
        raise ConfigError(f"--override_dit: no JSON object: {error}") from error
    if not isinstance(changes, Mapping):
        raise ConfigError(f"--override_dit: expected a JSON object, got {override}")
    return override_params(task.dit_params, changes)


def _nabla(task: Task, args: argparse.Namespace) -> NablaParams | None:
    """The task's block-sparse attention, or what `--force_nabla_attention` asks for; given options win."""
    base = task.nabla or (NablaParams() if args.force_nabla_attention else None)
    if base is None:
        return None
    given = {
        "method": args.nabla_method,
        "P": args.nabla_P,
        "wT": args.nabla_wT,
        "wH": args.nabla_wH,
        "wW": args.nabla_wW,
        "add_sta": args.nabla_add_sta,
    }
    chosen = replace(base, **{key: value for key, value in given.items() if value is not None})
    if chosen.method == "topcdf" and chosen.P > 1:
        raise ConfigError(f"--nabla_P {chosen.P:g}: topcdf takes a share of at most 1")
    return chosen


def _timesteps(args: argparse.Namespace) -> TimestepConfig:
    return _fill(TimestepConfig, args)


def _optimizer(args: argparse.Namespace) -> OptimizerConfig:
    problems = []
    named = {}
    for flag in ("optimizer_args", "lr_scheduler_args"):
        try:
            named[flag] = parse_keyword_args(vars(args)[flag], f"--{flag}")
        except ConfigError as error:
            problems += error.problems
    if args.lr_scheduler == "reduce_lr_on_plateau":
        problems.append(
            "--lr_scheduler reduce_lr_on_plateau follows a validation loss and cannot be resumed; use cosine"
        )
    if args.lr_scheduler == "constant" and args.lr_warmup_steps and not args.lr_scheduler_type:
        problems.append(
            "--lr_scheduler constant has no warm-up; use constant_with_warmup with --lr_warmup_steps"
        )
    if problems:
        raise ConfigError(problems)
    return _fill(OptimizerConfig, args, **named)


def _network(args: argparse.Namespace) -> NetworkConfig:
    module = args.network_module.removeprefix("musubi_tuner.")
    if module not in NETWORK_MODULES:
        raise ConfigError(f"--network_module {args.network_module}: use one of {', '.join(NETWORK_MODULES)}")
    return _fill(
        NetworkConfig,
        args,
        network_module=module,
        network_args=parse_keyword_args(args.network_args, "--network_args", allow_plain_text=True),
    )


def _saving(args: argparse.Namespace) -> SavingConfig:
    if args.output_dir is None or args.output_name is None:
        raise ConfigError([])  # reported as missing
    problem = name_problem(args.output_name, room=ROOM_FOR_ENDINGS)
    if problem is not None:
        hint = "; folders belong to --output_dir" if set(args.output_name) & set("/\\") else ""
        raise ConfigError(f"--output_name {args.output_name!r}: {problem}{hint}")
    return _fill(
        SavingConfig,
        args,
        save_last_n_epochs_state=args.save_last_n_epochs_state or args.save_last_n_epochs,
        save_last_n_steps_state=args.save_last_n_steps_state or args.save_last_n_steps,
    )


def _tracking(args: argparse.Namespace) -> TrackingConfig:
    path, settings = args.log_tracker_config, {}
    if path is not None:
        settings = read_toml(path, "--log_tracker_config")
        for name, value in settings.items():
            if name not in ("tensorboard", "wandb") or not isinstance(value, dict):
                raise ConfigError(
                    f"--log_tracker_config {path}: {name}: arguments stand under [tensorboard] and [wandb]"
                )
    return _fill(TrackingConfig, args, log_tracker_settings=settings)


def _samples(args: argparse.Namespace) -> SampleConfig:
    if args.task is None:
        raise ConfigError([])  # reported as missing
    task = get_task(args.task)
    return _fill(
        SampleConfig,
        args,
        vae=Path(args.vae or task.vae_path),
        text_encoder_qwen=args.text_encoder_qwen or local_name(task.text_encoder_qwen_path),
        text_encoder_clip=args.text_encoder_clip or local_name(task.text_encoder_clip_path),
        quantization=qwen_quantization(fp8_llm=args.fp8_llm, quantized_qwen=args.quantized_qwen),
    )


def _notes(parser: argparse.ArgumentParser, args: argparse.Namespace, config: TrainConfig) -> list[str]:
    """What has no effect, and what may not be what was meant."""
    given = given_options(parser, args)
    given |= {f"network_args {name}" for name in config.network.network_args}
    return [
        *(f"--{name} has no effect: {why}" for name, why in ACCEPTED.items() if name in given),
        *idle_notes(TIMESTEP_RULES, config.timesteps, given).values(),
        *idle_notes(OPTIMIZER_RULES, config.optimizer, given).values(),
        *idle_notes(RUN_RULES, config, given).values(),
        *_hints(config, given),
    ]


def _hints(config: TrainConfig, given: set[str]) -> list[str]:
    samples, optimizer = config.samples, config.optimizer
    checks = [
        (
            samples.sample_prompts is not None
            and not (
                samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
            ),
            "--sample_prompts without --sample_every_n_*: only the control file asks for samples",
        ),
        (
            not lora_type(config.network.network_module).is_plain and config.saving.lora_format != "kohya",
            f"{lora_type(config.network.network_module).title} is saved in the kohya layout, "
            "which other programs read",
        ),
        (
            optimizer.lr_scheduler == "warmup_stable_decay" and optimizer.lr_decay_steps == 0,
            "--lr_scheduler warmup_stable_decay never decays without --lr_decay_steps, such as 10%",
        ),
        (
            not given & set(_NEWCOMER_OPTIONS),
            "timestep shift (none), learning rate (2e-6), rank (4) and alpha (1) are all at their defaults, "
            f"which teach very little. A tested start: {_NEWCOMER_RECIPE}",
        ),
    ]
    return [hint for applies, hint in checks if applies]
