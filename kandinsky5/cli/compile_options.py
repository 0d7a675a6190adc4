"""The `--compile` options, the same for training and generation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
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


def compile_config(args: argparse.Namespace, *, for_training: bool, has_nabla: bool) -> CompileConfig | None:
    """The compile settings of a command line; None without `--compile` and `--dynamo_backend`.

    Raises:
        ConfigError: a setting without its switch, both switches, layers in an unbroken graph that must break
            it, or CUDA graphs where weights or activations move.
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
    problems = [*_fullgraph_problems(config, args, has_nabla=has_nabla)]
    problems += _cuda_graph_problems(config, args, for_training=for_training)
    if problems:
        raise ConfigError(problems)
    return config


def _fullgraph_problems(config: CompileConfig, args: argparse.Namespace, *, has_nabla: bool) -> Iterator[str]:
    if not config.compile_fullgraph:
        return
    if args.fp8_base or args.fp8_scaled:
        yield "--compile_fullgraph: layers in float8 stay outside compiled graphs; leave it out"
    if args.vram_budget is not None:
        yield "--compile_fullgraph: --vram_budget may add --fp8_base; leave one of them out"
    if has_nabla:
        yield "--compile_fullgraph: NABLA's attention stays outside compiled graphs; leave it out"


def _cuda_graph_problems(
    config: CompileConfig, args: argparse.Namespace, *, for_training: bool
) -> Iterator[str]:
    """CUDA graphs are refused wherever no GPU run has shown that addresses stay valid."""
    if not config.uses_cuda_graphs:
        return
    if for_training:
        where = "in training"
    elif args.blocks_to_swap > 0:
        where = "with --blocks_to_swap"
    elif args.vram_budget is not None:
        where = "with --vram_budget, which may add --blocks_to_swap"
    else:
        return
    words = "--compile" if args.compile else "--dynamo"
    is_backend = config.compile_backend == "cudagraphs"
    setting = "backend cudagraphs" if is_backend else f"mode {config.compile_mode}"
    yield (
        f"{words}_{setting} records CUDA graphs, which have not been tested {where}; "
        f"use {words}_backend inductor {words}_mode max-autotune-no-cudagraphs"
    )


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
