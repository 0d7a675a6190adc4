"""The `--compile` options, the same for training and generation."""

from __future__ import annotations

import argparse

from kandinsky5.cli.common import positive_int
from kandinsky5.configs.compilation import CompileConfig
from modules.errors import ConfigError

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs")
_SETTINGS = ("compile_backend", "compile_mode", "compile_dynamic", "compile_cache_size_limit")


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


def compile_config(args: argparse.Namespace) -> CompileConfig | None:
    """What was asked for; None without `--compile`.

    Raises:
        ConfigError: a setting without `--compile`, or float8 layers or sparse attention in an unbroken graph.
    """
    given = {name: vars(args)[name] for name in _SETTINGS if vars(args)[name] is not None}
    if args.compile_fullgraph:
        given["compile_fullgraph"] = True
    if not args.compile:
        if given:
            raise ConfigError([f"--{name} acts with --compile only: add --compile" for name in given])
        return None
    if args.compile_fullgraph and args.fp8_base:
        raise ConfigError("--compile_fullgraph: layers in float8 stay outside compiled graphs; leave it out")
    return CompileConfig(**given)
