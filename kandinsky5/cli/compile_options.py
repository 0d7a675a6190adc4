"""Reads the `--compile_*` and `--dynamo_*` options into one config, for training and generation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from kandinsky5.configs.compilation import NO_BACKEND, CompileConfig
from modules.errors import ConfigError
from modules.options import read_options


def compile_config(args: argparse.Namespace, *, for_training: bool, has_nabla: bool) -> CompileConfig | None:
    """The compile settings of a command line; None without `--compile` and `--dynamo_backend`.

    Raises:
        ConfigError: both switches are given, `--compile_fullgraph` with layers that need a graph break, or
            CUDA graphs where weights or activations move.
    """
    asked = vars(args)
    backend = asked.get("dynamo_backend", NO_BACKEND)
    uses_dynamo = backend != NO_BACKEND
    if uses_dynamo and (args.compile or args.compile_backend not in ("inductor", backend)):
        raise ConfigError("--dynamo_backend means --compile --compile_backend: give only one of them")
    if not args.compile and not uses_dynamo:
        return None
    config = read_options(
        CompileConfig,
        args,
        compile_backend=backend if uses_dynamo else args.compile_backend,
        compile_mode=asked.get("dynamo_mode") or args.compile_mode,
        compile_dynamic="true" if asked.get("dynamo_dynamic") else args.compile_dynamic,
        compile_fullgraph=bool(asked.get("dynamo_fullgraph")) or args.compile_fullgraph,
    )
    problems = [*_fullgraph_problems(config, args, has_nabla=has_nabla)]
    problems += _cuda_graph_problems(config, args, for_training=for_training)
    if problems:
        raise ConfigError(problems)
    return config


def _fullgraph_problems(config: CompileConfig, args: argparse.Namespace, *, has_nabla: bool) -> Iterator[str]:
    if not config.compile_fullgraph:
        return
    if args.fp8_base:
        yield "--compile_fullgraph: float8 layers stay outside compiled graphs; omit --compile_fullgraph"
    if args.nf4_base:
        yield "--compile_fullgraph: NF4 layers stay outside compiled graphs; omit --compile_fullgraph"
    if args.vram_budget is not None:
        yield "--compile_fullgraph: --vram_budget may add --fp8_base or --nf4_base; omit one of them"
    if has_nabla:
        yield "--compile_fullgraph: NABLA's attention stays outside compiled graphs; omit --compile_fullgraph"


def _cuda_graph_problems(
    config: CompileConfig, args: argparse.Namespace, *, for_training: bool
) -> Iterator[str]:
    """Report CUDA graphs in settings where no GPU run has shown that memory addresses stay valid."""
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
    family = "--compile" if args.compile else "--dynamo"
    is_backend = config.compile_backend == "cudagraphs"
    setting = "backend cudagraphs" if is_backend else f"mode {config.compile_mode}"
    yield (
        f"{family}_{setting} records CUDA graphs, which have not been tested {where}; "
        f"use {family}_backend inductor {family}_mode max-autotune-no-cudagraphs"
    )
