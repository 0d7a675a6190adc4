"""The options that hold weights in fewer bits, the same wherever a DiT or Qwen is loaded."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def add_dit_weight_options(add: Callable[..., Any], scaled_help: str) -> None:
    """Add float8 and int8 for the DiT through a group's `add_argument`."""
    add("--fp8_base", action="store_true", help="hold attention and feed-forward weights in float8")
    add("--fp8_scaled", action="store_true", help=scaled_help)
    add(
        "--fp8_fast",
        action="store_true",
        help="with --fp8_base: multiply in float8 too; compute capability 8.9 (Ada, Hopper) or later, "
        "not run on a GPU yet",
    )
    add(
        "--int8_base",
        action="store_true",
        help="hold attention and feed-forward weights in int8 instead, on any card",
    )
    add(
        "--int8_fast",
        action="store_true",
        help="with --int8_base: multiply in int8 too; compute capability 7.5 (Turing, Ampere) or later, "
        "not run on a GPU yet",
    )


def dit_weight_problems(args: argparse.Namespace) -> list[str]:
    """What contradicts itself among them."""
    is_fp8 = args.fp8_base or args.fp8_scaled
    checks = [
        (
            is_fp8 and args.int8_base,
            "--fp8_base and --int8_base both say how the same weights are held: give one of them",
        ),
        (args.fp8_fast and not is_fp8, "--fp8_fast needs --fp8_base"),
        (args.int8_fast and not args.int8_base, "--int8_fast needs --int8_base"),
    ]
    return [message for is_wrong, message in checks if is_wrong]


def add_qwen_weight_options(add: Callable[..., Any], remark: str = "") -> None:
    """Add float8 and 4 bits for Qwen through a group's `add_argument`; `remark` ends the help."""
    add(
        "--fp8_llm",
        "--fp8_vlm",
        action="store_true",
        help=f"hold Qwen's weights in float8: half the memory{remark}",
    )
    add(
        "--quantized_qwen",
        action="store_true",
        help=f"load Qwen in 4 bits (NF4) with bitsandbytes{remark}",
    )
