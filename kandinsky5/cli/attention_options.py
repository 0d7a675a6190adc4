"""The options that choose who computes attention, the same for training and generation."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from modules.attention_backends import (
    ATTENTION_BACKENDS,
    DEFAULT_BACKEND,
    backend_of_word,
    no_backward_problem,
)

ATTENTION_WORDS = tuple(word for backend in ATTENTION_BACKENDS.values() for word in backend.words)
"""Values of `--attn_mode`."""


def add_attention_options(add: Callable[..., Any]) -> None:
    """Add one switch per back end through a group's `add_argument`."""
    for name, backend in ATTENTION_BACKENDS.items():
        add(f"--{name}", action="store_true", help=backend.title)


def chosen_attention(args: argparse.Namespace) -> str:
    """The back end that was asked for, by its switch or `--attn_mode`; call `attention_problems` first."""
    chosen = _all_chosen(args)
    return chosen[0] if chosen else DEFAULT_BACKEND


def attention_problems(args: argparse.Namespace, *, for_training: bool) -> list[str]:
    """Several back ends at once, and one that cannot train."""
    chosen = _all_chosen(args)
    problems = []
    if len(chosen) > 1:
        problems.append(f"only one attention back end can be used, got --{' and --'.join(chosen)}")
    if for_training:
        problems += [
            no_backward_problem(name) for name in chosen if not ATTENTION_BACKENDS[name].has_backward
        ]
    return problems


def _all_chosen(args: argparse.Namespace) -> list[str]:
    given = vars(args)
    chosen = [name for name in ATTENTION_BACKENDS if given[name]]
    word = given.get("attn_mode")
    if word is not None and backend_of_word(word) not in chosen:
        chosen.append(backend_of_word(word))
    return chosen
