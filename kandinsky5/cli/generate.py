"""The generation command line: argv -> one checked `GenerateConfig`. No other module sees the Namespace."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

from kandinsky5.cli.attention_options import attention_problems, chosen_attention
from kandinsky5.cli.common import check_paths, local_name, missing_file, raise_all
from kandinsky5.cli.compile_options import compile_config
from kandinsky5.cli.config_file import argv_of, file_values
from kandinsky5.cli.without_effect import (
    COMPILE_RULES,
    GENERATE_RULES,
    NABLA_RULES,
    TASK_RULES,
    WEIGHT_RULES,
    given_options,
    ignored_notes,
    no_effect_notes,
)
from kandinsky5.configs.attention import ATTENTION_MODE, ATTENTION_OPTIONS, NablaOptions
from kandinsky5.configs.compilation import CompileConfig, CompileMode
from kandinsky5.configs.generate import (
    OUTPUT_SUFFIXES,
    DitConfig,
    GenerateConfig,
    LoraConfig,
    MagCacheConfig,
    ModelPaths,
    OutputConfig,
    TextEncoderConfig,
    VaeConfig,
)
from kandinsky5.configs.text_encoders import QwenOptions
from kandinsky5.configs.vae import VAE_CHUNK_SIZE, TilingOptions
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.prompts import PromptSpec, text_problems
from kandinsky5.tasks import Task, get_task
from modules.command_line import Parser
from modules.errors import ConfigError
from modules.file_names import MAX_NAME_BYTES
from modules.logs import get_logger
from modules.options import add_options, ignored_option, options_of, read_options

log = get_logger(__name__)

_EPILOG = (
    "Option names of musubi-tuner's other scripts are accepted too: --video_size H W, --video_length, "
    "--infer_steps, "
    "--guidance_scale, --flow_shift, --save_path, --image_path, --end_image_path, --fp8, "
    "--compile_args BACKEND MODE DYNAMIC FULLGRAPH. --frames counts pixel frames."
)
_ROOM = len("-999_latent.safetensors")
"""Bytes kept free for suffixes of an output name: a number if the name is taken, and the file type."""
_IGNORED = {
    **VAE_CHUNK_SIZE,
    "lycoris": ignored_option("LoHa and LoKr files are recognised without it"),
    "img_in_txt_in_offloading": ignored_option("it is an option of HunyuanVideo"),
    "split_attn": ignored_option("guidance passes are never batched, so attention sees one clip at a time"),
}
_SECTIONS = {
    "what to make": options_of(GenerateConfig),
    "size and sampling": options_of(PromptSpec),
    "models": options_of(ModelPaths),
    "weights and memory": {**options_of(WeightsConfig), **options_of(DitConfig)},
    "attention": {**ATTENTION_OPTIONS, **ATTENTION_MODE},
    "NABLA, block-sparse attention": options_of(NablaOptions),
    "MagCache": options_of(MagCacheConfig),
    "compilation": options_of(CompileConfig),
    "LoRA": options_of(LoraConfig),
    "text encoders": {**options_of(TextEncoderConfig), **options_of(QwenOptions)},
    "VAE": {**options_of(VaeConfig), **options_of(TilingOptions)},
    "output": options_of(OutputConfig),
    "": _IGNORED,
}
"""Heading in the help -> options."""


def parse_generate(argv: Sequence[str] | None = None) -> GenerateConfig:
    """Parse the command line into a checked config.

    Raises:
        ConfigError: options contradict each other, are missing, or name files that do not exist.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    _read_old_spellings(args)
    given = given_options(parser, args)
    task = get_task(args.task)
    problems = attention_problems(args, for_training=False)
    for name in ("from_file", "latent_path", "prompt_templates"):
        problems += missing_file(f"--{name}", vars(args)[name])
    problems += _pattern_problems(args)
    problems += text_problems({"--prompt": args.prompt, "--negative_prompt": args.negative_prompt})
    parts: dict[str, Any] = {}
    builders: dict[str, Callable[[], Any]] = {
        "models": lambda: _models(args, task),
        "spec": lambda: read_options(PromptSpec, args, lora_multiplier=None),
        "dit": lambda: _dit(args, task),
        "text": lambda: read_options(
            TextEncoderConfig, args, quantization=read_options(QwenOptions, args).quantization
        ),
        "vae": lambda: read_options(VaeConfig, args, tile_px=read_options(TilingOptions, args).tile_px),
        "lora": lambda: read_options(LoraConfig, args),
        "output": lambda: _output(args),
    }
    for name, build in builders.items():
        try:
            parts[name] = build()
        except ConfigError as error:
            problems += error.problems
    raise_all(problems)
    config = read_options(
        GenerateConfig, args, task=task, **parts, **_sources(args), options=file_values(parser, args)
    )
    for note in _notes(config, given):
        log.info("%s", note)
    return config


def repeat_argv(options: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that set these options; values equal to the defaults are omitted."""
    return argv_of(_parser(), options)


def _parser() -> Parser:
    parser = Parser("kandinsky5_generate_video.py", "Generate videos and images with Kandinsky 5 and LoRAs.")
    parser.epilog = _EPILOG
    add_options(parser, _SECTIONS)
    parser.add_argument("--video_size", type=int, nargs=2, metavar=("H", "W"), help=argparse.SUPPRESS)
    parser.add_argument("--compile_args", nargs=4, metavar=("B", "M", "D", "F"), help=argparse.SUPPRESS)
    return parser


def _read_old_spellings(args: argparse.Namespace) -> None:
    """Copy the values of `--video_size` and `--compile_args` to the options that they replace."""
    if args.video_size is not None:
        height, width = args.video_size
        args.height = height if args.height is None else args.height
        args.width = width if args.width is None else args.width
    if args.compile_args is not None:
        backend, mode, dynamic, fullgraph = args.compile_args
        dynamic, fullgraph = dynamic.lower(), fullgraph.lower()
        is_known = mode in get_args(CompileMode) and dynamic in ("true", "false", "auto")
        if not is_known or fullgraph not in ("true", "false"):
            raise ConfigError(
                "--compile_args takes backend, mode, dynamic (true, false, auto) and fullgraph (true, false)"
            )
        args.compile_backend, args.compile_mode = backend, mode
        args.compile_dynamic, args.compile_fullgraph = dynamic, fullgraph == "true"


def _sources(args: argparse.Namespace) -> dict[str, Any]:
    """The input options, without those that have no effect with `--save_merged_model` or `--latent_path`."""
    merges = args.save_merged_model is not None
    plans = not merges and not args.interactive and args.latent_path is None
    return {
        "from_file": None if merges else args.from_file,
        "interactive": args.interactive and not merges,
        "latent_path": None if merges else args.latent_path,
        "vram_budget": args.vram_budget if plans else None,
    }


def _notes(config: GenerateConfig, given: set[str]) -> list[str]:
    """Log lines about options that have no effect."""
    without_effect = {
        **no_effect_notes(WEIGHT_RULES, config.dit, given),
        **no_effect_notes(COMPILE_RULES, config.dit.compile, given),
        **no_effect_notes(NABLA_RULES, config.dit.nabla, given),
        **no_effect_notes(TASK_RULES, config.task, given),
        **no_effect_notes(GENERATE_RULES, config, given),
    }
    return [*ignored_notes(_IGNORED, given), *without_effect.values()]


def _models(args: argparse.Namespace, task: Task) -> ModelPaths:
    return ModelPaths(
        dit=args.dit or task.dit_path,
        vae=args.vae or task.vae_path,
        text_encoder_qwen=args.text_encoder_qwen or local_name(task.text_encoder_qwen_path),
        text_encoder_clip=args.text_encoder_clip or local_name(task.text_encoder_clip_path),
    )


def _dit(args: argparse.Namespace, task: Task) -> DitConfig:
    nabla = read_options(NablaOptions, args).params(task)
    return read_options(
        DitConfig,
        args,
        fp8_fast=args.fp8_fast and args.fp8_base,
        int8_fast=args.int8_fast and args.int8_base,
        no_int8_rotation=args.no_int8_rotation and args.int8_fast and args.int8_base,
        nabla=nabla,
        attention=chosen_attention(args),
        magcache=read_options(MagCacheConfig, args) if args.magcache else None,
        compile=compile_config(args, for_training=False, has_nabla=nabla is not None),
    )


def check_model_paths(config: GenerateConfig) -> None:
    """Check that model paths exist, before the import of torch, which takes seconds.

    Raises:
        ModelFileError: lists all files and folders that do not exist.
    """
    paths = [("--vae", config.models.vae)] if config.lora.save_merged_model is None else []
    if config.latent_path is None:
        paths += [
            ("--dit", config.models.dit),
            *(("--lora_weight", path) for path in config.lora.lora_weight),
        ]
    check_paths([], paths)


def _output(args: argparse.Namespace) -> OutputConfig:
    is_folder = args.output is not None and args.output.endswith(("/", "\\"))
    path = None if args.output is None else Path(args.output)
    if path is not None:
        _check_length(path, is_folder=is_folder or args.from_file is not None or args.interactive)
    if path is not None and not is_folder and not path.is_dir():
        suffix = path.suffix.lower()
        makes_files = args.from_file is None and not args.interactive
        if makes_files and suffix and suffix not in OUTPUT_SUFFIXES and not suffix[1:].isdigit():
            raise ConfigError(
                f"--output {path}: {suffix} is not one of {', '.join(OUTPUT_SUFFIXES)} or a folder"
            )
    return read_options(OutputConfig, args, output=path, output_is_folder=is_folder)


def _check_length(path: Path, *, is_folder: bool) -> None:
    """Refuse an output name that is too long, before anything is sampled."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > MAX_NAME_BYTES:
        raise ConfigError(
            f"--output {path}: a name of {longest} bytes is too long; use at most {MAX_NAME_BYTES}"
        )
    stem = path.stem if path.suffix.lower() in OUTPUT_SUFFIXES else path.name
    if len(os.fsencode(stem)) + _ROOM > MAX_NAME_BYTES and not is_folder and not path.is_dir():
        raise ConfigError(
            f"--output {path}: the name is {len(os.fsencode(stem))} bytes long; use at most "
            f"{MAX_NAME_BYTES - _ROOM}, to leave room for suffixes"
        )


def _pattern_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for flag, patterns in (
        ("--include_patterns", args.include_patterns),
        ("--exclude_patterns", args.exclude_patterns),
    ):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{flag} {pattern}: invalid regular expression: {error}")
    return problems
