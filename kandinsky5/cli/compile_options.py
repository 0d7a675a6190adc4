"""The `--compile` options, the same for training and generation."""

from __future__ import annotations

import argparse
from typing import Any

from kandinsky5.cli.common import positive_int
from kandinsky5.configs.compilation import NO_BACKEND, CompileConfig
from modules.errors import ConfigError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_SETTINGS = ("compile_backend", "compile_mode", "compile_dynamic", "compile_cache_size_limit")
_ACCELERATE_SETTINGS = ("dynamo_mode", "dynamo_fullgraph", "dynamo_dynamic")


def add_compile_options(parser: argparse.ArgumentParser) -> None:
    """Add the group `compilation`."""
    group = parser.add_argument_group("compilation")
    add = group.add_argument
    add("--compile", action="store_true", help="compile every transformer block")
    add("--compile_backend", metavar="WORD", help="torch.compile's back end (default: inductor)")
    add("--compile_mode", choices=COMPILE_MODES, help="how hard inductor tries (default: default)")
    add(
        "--compile_dynamic",
        choices=("true", "false", "auto"),
        help="whether lengths may change without compiling anew; auto: from the second on (default: true)",
    )
    add("--compile_fullgraph", action="store_true", help="refuse graph breaks")
    add("--compile_cache_size_limit", type=positive_int, metavar="N", help="graphs kept (default: torch's)")


def add_accelerate_compile_options(parser: argparse.ArgumentParser) -> None:
    """Add accelerate's names for the same choices, which training scripts of this family take."""
    group = parser.add_argument_group("compilation, in accelerate's words")
    add = group.add_argument
    add(
        "--dynamo_backend",
        type=str.lower,
        default=NO_BACKEND,
        metavar="WORD",
        help="as --compile --compile_backend WORD (default: no)",
    )
    add("--dynamo_mode", choices=COMPILE_MODES, help="as --compile_mode")
    add("--dynamo_fullgraph", action="store_true", help="as --compile_fullgraph")
    add("--dynamo_dynamic", action="store_true", help="as --compile_dynamic true")


def compile_config(args: argparse.Namespace) -> CompileConfig | None:
    """What was asked for; None without `--compile` and `--dynamo_backend`.

    Raises:
        ConfigError: a setting without its switch, both switches, or float8 layers in an unbroken graph.
    """
    given = {name: vars(args)[name] for name in _SETTINGS if vars(args)[name] is not None}
    if args.compile_fullgraph:
        given["compile_fullgraph"] = True
    accelerates = _in_accelerates_words(args)
    if accelerates and (args.compile or given):
        raise ConfigError("--dynamo_backend means --compile --compile_backend: give only one of the two")
    if not args.compile and given:
        raise ConfigError([f"--{name} acts with --compile only: add --compile" for name in given])
    if not args.compile and not accelerates:
        return None
    config = CompileConfig(**(accelerates or given))
    if config.compile_fullgraph and (args.fp8_base or args.fp8_scaled):
        raise ConfigError("--compile_fullgraph: layers in float8 stay outside compiled graphs; leave it out")
    if config.compile_fullgraph and args.vram_budget is not None:
        raise ConfigError("--compile_fullgraph: --vram_budget may add --fp8_base; leave one of them out")
    return config


def _in_accelerates_words(args: argparse.Namespace) -> dict[str, Any]:
    """The settings that `--dynamo_*` stand for; empty if they ask for nothing."""
    asked = vars(args)
    backend = asked.get("dynamo_backend", NO_BACKEND)
    settings = [name for name in _ACCELERATE_SETTINGS if asked.get(name)]
    if backend == NO_BACKEND:
        if settings:
            raise ConfigError([f"--{name} acts with --dynamo_backend only" for name in settings])
        return {}
    meaning: dict[str, Any] = {"compile_backend": backend, "compile_fullgraph": asked["dynamo_fullgraph"]}
    if asked["dynamo_mode"] is not None:
        meaning["compile_mode"] = asked["dynamo_mode"]
    if asked["dynamo_dynamic"]:
        meaning["compile_dynamic"] = "true"
    return meaning
