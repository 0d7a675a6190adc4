"""The training command line: argv -> one checked `TrainConfig`. No other module sees the Namespace."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from kandinsky5.cli.attention_options import attention_problems, chosen_attention
from kandinsky5.cli.common import check_paths, local_name, raise_all
from kandinsky5.cli.compile_options import compile_config
from kandinsky5.cli.config_file import file_values, read_toml, with_config_file
from kandinsky5.cli.without_effect import (
    COMPILE_RULES,
    NABLA_RULES,
    OPTIMIZER_RULES,
    TASK_RULES,
    TIMESTEP_RULES,
    TRAIN_RULES,
    WEIGHT_RULES,
    given_options,
    ignored_notes,
    no_effect_notes,
)
from kandinsky5.configs.attention import ATTENTION_OPTIONS, NablaOptions
from kandinsky5.configs.caching import KEEP_CACHE
from kandinsky5.configs.compilation import NO_BACKEND, CompileConfig, DynamoOptions
from kandinsky5.configs.text_encoders import QwenOptions
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
    ShowTimesteps,
    ShowTimestepsConfig,
    TimestepConfig,
    TrackingConfig,
    TrainConfig,
)
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.tasks import DitParams, Task, get_task, override_params
from modules.command_line import Parser
from modules.errors import ConfigError
from modules.file_names import name_problem
from modules.keyword_args import parse_keyword_args
from modules.options import (
    Option,
    add_options,
    any_number,
    ignored_option,
    missing_options,
    options_of,
    read_options,
)
from modules.parsing import ParseError, parse_json
from modules.path_kinds import HUB_ID
from networks.lora_types import NETWORK_MODULES, lora_type

IGNORED = {
    **KEEP_CACHE,
    "no_vae_load": ignored_option("the VAE is only loaded for samples"),
    "guidance_scale": ignored_option(
        "it is an option of HunyuanVideo; its value goes into the metadata", default=1.0, read=any_number
    ),
    "img_in_txt_in_offloading": ignored_option("it is an option of HunyuanVideo"),
    "split_attn": ignored_option("clips of a batch never attend to each other"),
    "persistent_data_loader_workers": ignored_option("reader threads always run until the end"),
    "block_swap_h2d_only": ignored_option("frozen weights are only ever copied to the device"),
}
_CONFIG_FILE = {
    "config_file": Option(
        help="TOML file with options of this script; the command line takes precedence", metavar="PATH"
    )
}
_SECTIONS = {
    "model": options_of(ModelConfig),
    "weights and memory": options_of(WeightsConfig),
    "attention": ATTENTION_OPTIONS,
    "NABLA, block-sparse attention (training with it was tested on CPUs only)": options_of(NablaOptions),
    "compilation": options_of(CompileConfig),
    "compilation, accelerate's option names": options_of(DynamoOptions),
    "image to video": options_of(ConditioningConfig),
    "loss": options_of(LossConfig),
    "data": {**_CONFIG_FILE, **options_of(DataConfig)},
    "run": options_of(RunConfig),
    "optimizer and learning rate": options_of(OptimizerConfig),
    "LoRA": options_of(NetworkConfig),
    "timesteps": {**options_of(TimestepConfig), **options_of(ShowTimesteps)},
    "saving and resuming": options_of(SavingConfig),
    "metadata of the LoRA file": options_of(MetadataConfig),
    "logging": options_of(TrackingConfig),
    "samples during training": {**options_of(SampleConfig), **options_of(QwenOptions)},
    "Hugging Face hub": options_of(HubConfig),
    "": IGNORED,
}
"""Heading in the help -> options."""
_OPTIONS = {name: declared for section in _SECTIONS.values() for name, declared in section.items()}

_SECRETS = ("wandb_api_key", "huggingface_token")
_PLACES = ("vae",)
_PLACES_OR_IDS = ("text_encoder_qwen", "text_encoder_clip")
_NOT_OF_THE_RUN = ("help", "config_file", "resume", "overwrite", "traceback", "show_timesteps")
"""Options of a single invocation, which are not recorded for a repetition of the run."""
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


def build_parser() -> Parser:
    """The argument parser with all options."""
    parser = Parser(
        "kandinsky5_train_network.py", "Train a LoRA for Kandinsky 5 on cached latents and captions."
    )
    add_options(parser, _SECTIONS)
    return parser


def default_options() -> dict[str, Any]:
    """The defaults of all options, by name, as a saved configuration holds them."""
    parser = build_parser()
    return file_values(parser, parser.parse_args([]))


def parse_train(argv: Sequence[str] | None = None) -> TrainConfig | ShowTimestepsConfig:
    """Read the command line and its `--config_file`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = build_parser()
    args = parser.parse_args(with_config_file(parser, list(sys.argv[1:] if argv is None else argv)))
    given = given_options(parser, args)
    if args.show_timesteps:
        timesteps = read_options(TimestepConfig, args)
        return ShowTimestepsConfig(
            show_timesteps=args.show_timesteps,
            timesteps=timesteps,
            image_path=(args.output_dir or Path()) / f"{args.output_name or 'k5'}_timesteps.png",
            notes=tuple(no_effect_notes(TIMESTEP_RULES, timesteps, given).values()),
        )
    config = _train_config(parser, args)
    return replace(config, notes=tuple(_notes(config, given)))


def check_train_paths(config: TrainConfig) -> None:
    """Check that the files and folders of a training are there, before the import of torch.

    Raises:
        ConfigError, ModelFileError: see `check_paths`.
    """
    data, samples, network = config.data, config.samples, config.network
    files = [
        ("--dataset_config", data.dataset_config),
        ("--validation_dataset_config", data.validation_dataset_config),
        ("--sample_prompts", samples.sample_prompts),
        ("--prompt_templates", samples.prompt_templates),
    ]
    models = [
        ("--dit", None if config.run.dry_run else config.model.dit),
        *(("--base_weights", path) for path in config.model.base_weights),
        # A state has its own weights.
        ("--network_weights", network.network_weights if config.run.resume is None else None),
    ]
    if samples.sample_prompts is not None:
        encoders = [
            ("--text_encoder_qwen", samples.text_encoder_qwen),
            ("--text_encoder_clip", samples.text_encoder_clip),
        ]
        models += [("--vae", samples.vae)]
        models += [(flag, Path(name)) for flag, name in encoders if not HUB_ID.fullmatch(name)]
    check_paths(files, models)


def _train_config(parser: Parser, args: argparse.Namespace) -> TrainConfig:
    problems = [
        *missing_options(_OPTIONS, args),
        *attention_problems(args, for_training=True),
        *_contradictions(args),
    ]
    parts: dict[str, Any] = {}
    builders: dict[str, Callable[[argparse.Namespace], Any]] = {
        "model": _model,
        "conditioning": lambda a: read_options(ConditioningConfig, a),
        "loss": lambda a: read_options(LossConfig, a),
        "data": lambda a: read_options(DataConfig, a),
        "timesteps": lambda a: read_options(TimestepConfig, a),
        "optimizer": _optimizer,
        "network": _network,
        "run": _run,
        "saving": _saving,
        "metadata": lambda a: read_options(MetadataConfig, a),
        "tracking": _tracking,
        "hub": lambda a: read_options(HubConfig, a),
        "samples": _samples,
    }
    for name, build in builders.items():
        try:
            parts[name] = build(args)
        except ConfigError as error:
            problems += error.problems
    raise_all(problems)
    values = file_values(parser, args, places=_PLACES, places_or_ids=_PLACES_OR_IDS)
    left_out = {*_SECRETS, *_NOT_OF_THE_RUN}
    return TrainConfig(
        **parts, options={name: value for name, value in values.items() if name not in left_out}
    )


def _contradictions(args: argparse.Namespace) -> list[str]:
    """Invalid values and combinations of options that belong to different parts of the config."""
    checks = [
        (
            args.mixed_precision == "fp16" or args.dit_dtype in ("fp16", "float16"),
            "this model's activations overflow fp16: use --mixed_precision bf16, or --mixed_precision no "
            "for float32",
        ),
        (
            args.blocks_to_swap > 0 and not args.gradient_checkpointing,
            "--blocks_to_swap requires --gradient_checkpointing, because the backward pass needs the "
            "weights again",
        ),
        (
            (args.compile or args.dynamo_backend != NO_BACKEND)
            and args.gradient_checkpointing
            and args.gradient_checkpointing_keep_attention > 0,
            "--gradient_checkpointing_keep_attention does not work with compiled blocks: omit it, or the "
            "compilation",
        ),
        (
            len(args.base_weights_multiplier) > len(args.base_weights),
            f"--base_weights_multiplier: {len(args.base_weights_multiplier)} values for "
            f"{len(args.base_weights)} files of --base_weights; give one for each file",
        ),
        (
            bool(args.validation_split and args.validation_dataset_config),
            "--validation_split and --validation_dataset_config both select what to measure: give only one "
            "of them",
        ),
        (
            args.resume_from_huggingface and args.resume == "auto",
            "--resume_from_huggingface requires --resume USER/REPO/PATH",
        ),
    ]
    return [message for is_wrong, message in checks if is_wrong]


def _model(args: argparse.Namespace) -> ModelConfig:
    task = _task(args)
    multipliers = tuple(args.base_weights_multiplier)
    recomputes = args.gradient_checkpointing
    nabla = read_options(NablaOptions, args).params(task)
    if nabla is not None and recomputes and args.gradient_checkpointing_keep_attention > 0:
        raise ConfigError(
            "--gradient_checkpointing_keep_attention does not work with NABLA's compiled attention: omit it"
        )
    return read_options(
        ModelConfig,
        args,
        task=task,
        dit=args.dit or task.dit_path,
        dit_params=_dit_params(task, args.override_dit),
        nabla=nabla,
        scheduler_scale=args.scheduler_scale or task.scheduler_scale,
        attention=chosen_attention(args),
        fp8_fast=args.fp8_fast and args.fp8_base,
        int8_fast=args.int8_fast and args.int8_base,
        no_int8_rotation=args.no_int8_rotation and args.int8_fast and args.int8_base,
        gradient_checkpointing_cpu_offload=recomputes and args.gradient_checkpointing_cpu_offload,
        gradient_checkpointing_keep_attention=(
            args.gradient_checkpointing_keep_attention if recomputes else 0
        ),
        compile=compile_config(args, for_training=True, has_nabla=nabla is not None),
        base_weights_multiplier=multipliers + (1.0,) * (len(args.base_weights) - len(multipliers)),
    )


def _task(args: argparse.Namespace) -> Task:
    if args.task is None:
        raise ConfigError([])  # reported as missing
    return get_task(args.task)


def _dit_params(task: Task, override: str | None) -> DitParams:
    if override is None:
        return task.dit_params
    try:
        changes = parse_json(override)
    except ParseError as error:
        raise ConfigError(f"--override_dit: not valid JSON: {error}") from error
    if not isinstance(changes, Mapping):
        raise ConfigError(f"--override_dit: expected a JSON object, got {override}")
    return override_params(task.dit_params, changes)


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
            "--lr_scheduler reduce_lr_on_plateau depends on a validation loss and cannot be resumed; use "
            "--lr_scheduler cosine"
        )
    if problems:
        raise ConfigError(problems)
    return read_options(OptimizerConfig, args, **named)


def _network(args: argparse.Namespace) -> NetworkConfig:
    module = args.network_module.removeprefix("musubi_tuner.")
    if module not in NETWORK_MODULES:
        raise ConfigError(f"--network_module {args.network_module}: use one of {', '.join(NETWORK_MODULES)}")
    return read_options(
        NetworkConfig,
        args,
        network_module=module,
        dim_from_weights=args.dim_from_weights and args.network_weights is not None,
        network_args=parse_keyword_args(args.network_args, "--network_args", allow_plain_text=True),
    )


def _run(args: argparse.Namespace) -> RunConfig:
    config = read_options(RunConfig, args)
    return replace(config, max_train_steps=config.max_train_steps or None)


def _saving(args: argparse.Namespace) -> SavingConfig:
    if args.output_dir is None or args.output_name is None:
        raise ConfigError([])  # reported as missing
    problem = name_problem(args.output_name, room=ROOM_FOR_ENDINGS)
    if problem is not None:
        hint = "; give the folder with --output_dir" if set(args.output_name) & set("/\\") else ""
        raise ConfigError(f"--output_name {args.output_name!r}: {problem}{hint}")
    return read_options(
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
                    f"--log_tracker_config {path}: {name}: put arguments under [tensorboard] or [wandb]"
                )
    return read_options(TrackingConfig, args, log_tracker_settings=settings)


def _samples(args: argparse.Namespace) -> SampleConfig:
    task = _task(args)
    return read_options(
        SampleConfig,
        args,
        vae=Path(args.vae or task.vae_path),
        text_encoder_qwen=args.text_encoder_qwen or local_name(task.text_encoder_qwen_path),
        text_encoder_clip=args.text_encoder_clip or local_name(task.text_encoder_clip_path),
        quantization=read_options(QwenOptions, args).quantization,
    )


def _notes(config: TrainConfig, given: set[str]) -> list[str]:
    """Log lines about options that have no effect, and about likely mistakes."""
    given = given | {f"network_args {name}" for name in config.network.network_args}
    without_effect = {
        **no_effect_notes(TIMESTEP_RULES, config.timesteps, given),
        **no_effect_notes(OPTIMIZER_RULES, config.optimizer, given),
        **no_effect_notes(TRAIN_RULES, config, given),
        **no_effect_notes(WEIGHT_RULES, config.model, given),
        **no_effect_notes(COMPILE_RULES, config.model.compile, given),
        **no_effect_notes(NABLA_RULES, config.model.nabla, given),
        **no_effect_notes(TASK_RULES, config.model.task, given),
    }
    return [*ignored_notes(IGNORED, given), *without_effect.values(), *_hints(config, given)]


def _hints(config: TrainConfig, given: set[str]) -> list[str]:
    samples, optimizer = config.samples, config.optimizer
    kind = lora_type(config.network.network_module, config.network.network_args)
    checks = [
        (
            samples.sample_prompts is not None
            and not (
                samples.sample_every_n_steps or samples.sample_every_n_epochs or samples.sample_at_first
            ),
            "--sample_prompts without --sample_every_n_steps or --sample_every_n_epochs: samples are made "
            "only on request by the control file",
        ),
        (
            not kind.folds and config.saving.lora_format != "kohya",
            f"{kind.title} is saved in the kohya layout, which other programs read",
        ),
        (
            optimizer.lr_scheduler == "warmup_stable_decay" and optimizer.lr_decay_steps == 0,
            "--lr_scheduler warmup_stable_decay never decays without --lr_decay_steps, such as 10%",
        ),
        (
            not given & set(_NEWCOMER_OPTIONS),
            "timestep shift (none), learning rate (2e-6), rank (4) and alpha (1) are all at their "
            f"defaults, with which a LoRA learns very little. Common values: {_NEWCOMER_RECIPE}",
        ),
    ]
    return [hint for applies, hint in checks if applies]
