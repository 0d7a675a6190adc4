"""The command lines of the two cache scripts: argv -> one checked config. No code outside this module sees a
Namespace.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Mapping, Sequence

from kandinsky5.cli.common import missing_file, missing_path, raise_all
from kandinsky5.cli.without_effect import (
    CACHE_LATENTS_RULES,
    CACHE_TEXT_RULES,
    given_options,
    ignored_notes,
    no_effect_notes,
)
from kandinsky5.configs.caching import (
    KEEP_CACHE,
    CacheLatentsConfig,
    CacheRunConfig,
    CacheTextConfig,
    DebugConfig,
)
from kandinsky5.configs.text_encoders import QwenOptions
from kandinsky5.configs.vae import VAE_CHUNK_SIZE, TilingOptions
from modules.command_line import Parser
from modules.logs import get_logger
from modules.options import (
    Option,
    add_options,
    ignored_option,
    missing_options,
    options_of,
    positive_int,
    read_options,
)

log = get_logger(__name__)

_LATENT_SECTIONS = {
    "dataset and run": options_of(CacheRunConfig),
    "VAE": {**options_of(CacheLatentsConfig), **options_of(TilingOptions)},
    "preview": options_of(DebugConfig),
    "": {
        **KEEP_CACHE,
        **VAE_CHUNK_SIZE,
        "console_back": ignored_option("characters are printed without colours", default=None),
    },
}
_TEXT_SECTIONS = {
    "dataset and run": {
        **options_of(CacheRunConfig),
        "num_workers": ignored_option(
            "captions are read before encoding starts", default=None, read=positive_int
        ),
    },
    "text encoders": {**options_of(CacheTextConfig), **options_of(QwenOptions)},
    "": KEEP_CACHE,
}
"""Heading in the help -> options."""
_ENCODERS = ("text_encoder_qwen", "text_encoder_clip")
"""Not required for --check, which counts tokens if they are given."""


def parse_cache_latents(argv: Sequence[str] | None = None) -> CacheLatentsConfig:
    """Read the command line of `kandinsky5_cache_latents.py`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = Parser("kandinsky5_cache_latents.py", "Encode the images and videos of a dataset for training.")
    add_options(parser, _LATENT_SECTIONS)
    args = parser.parse_args(argv)
    problems = _shared_problems(_LATENT_SECTIONS, args)
    encodes = args.debug_mode is None and not args.check and args.preview is None
    if encodes and args.vae is None:
        problems.append("--vae is required (unless --check, --preview or --debug_mode is given)")
    if args.debug_mode is not None and (args.check or args.preview is not None):
        problems.append("--debug_mode and --check or --preview contradict each other: give one of them")
    if encodes:
        problems += missing_path("--vae", args.vae)
    if args.debug_mode == "image":
        problems.append(
            "--debug_mode image opens windows, which is not supported; use --debug_mode video, which "
            "writes files, or --debug_mode console, which prints characters"
        )
    raise_all(problems)
    debug = None if args.debug_mode is None else read_options(DebugConfig, args, mode=args.debug_mode)
    config = read_options(
        CacheLatentsConfig,
        args,
        run=_run_config(args),
        tile_px=read_options(TilingOptions, args).tile_px,
        debug=debug,
    )
    given = given_options(parser, args)
    for note in (
        *ignored_notes(_all(_LATENT_SECTIONS), given),
        *no_effect_notes(CACHE_LATENTS_RULES, config, given).values(),
    ):
        log.info("%s", note)
    return config


def parse_cache_text(argv: Sequence[str] | None = None) -> CacheTextConfig:
    """Read the command line of `kandinsky5_cache_text_encoder_outputs.py`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = Parser(
        "kandinsky5_cache_text_encoder_outputs.py", "Encode the captions of a dataset for training."
    )
    add_options(parser, _TEXT_SECTIONS)
    args = parser.parse_args(argv)
    problems = _shared_problems(_TEXT_SECTIONS, args, optional=_ENCODERS if args.check else ())
    problems += missing_file("--prompt_templates", args.prompt_templates)
    raise_all(problems)
    config = read_options(
        CacheTextConfig,
        args,
        run=_run_config(args),
        quantization=read_options(QwenOptions, args).quantization,
        **{name: vars(args)[name] or "" for name in _ENCODERS},
    )
    given = given_options(parser, args)
    for note in (
        *ignored_notes(_all(_TEXT_SECTIONS), given),
        *no_effect_notes(CACHE_TEXT_RULES, config, given).values(),
    ):
        log.info("%s", note)
    return config


def _all(sections: Mapping[str, Mapping[str, Option]]) -> dict[str, Option]:
    return {name: declared for options in sections.values() for name, declared in options.items()}


def _shared_problems(
    sections: Mapping[str, Mapping[str, Option]], args: argparse.Namespace, *, optional: Sequence[str] = ()
) -> list[str]:
    options = {name: declared for name, declared in _all(sections).items() if name not in optional}
    problems = missing_options(options, args)
    problems += missing_file("--dataset_config", args.dataset_config)
    if args.keep_cache and args.prune:
        problems.append("--keep_cache and --prune contradict each other: give only one of them")
    return problems


def _run_config(args: argparse.Namespace) -> CacheRunConfig:
    workers = args.num_workers or max(1, (os.cpu_count() or 2) - 1)
    return read_options(CacheRunConfig, args, num_workers=workers)
