"""Selects the attention back end from the command line, for training and generation."""

from __future__ import annotations

import argparse

from modules.attention_backends import (
    ATTENTION_BACKENDS,
    DEFAULT_BACKEND,
    backend_of_mode,
    no_backward_problem,
)


def chosen_attention(args: argparse.Namespace) -> str:
    """Return the back end selected by a switch or `--attn_mode`; call `attention_problems` first."""
    chosen = _all_chosen(args)
    return chosen[0] if chosen else DEFAULT_BACKEND


def attention_problems(args: argparse.Namespace, *, for_training: bool) -> list[str]:
    """Report more than one back end, and a back end that cannot train."""
    chosen = _all_chosen(args)
    problems = []
    if len(chosen) > 1:
        problems.append(f"only one attention back end can be used, got --{' and --'.join(chosen)}")
    if for_training:
        without = [name for name in chosen if not ATTENTION_BACKENDS[name].has_backward]
        problems += map(no_backward_problem, without)
    return problems


def _all_chosen(args: argparse.Namespace) -> list[str]:
    given = vars(args)
    chosen = [name for name in ATTENTION_BACKENDS if given[name]]
    word = given.get("attn_mode")
    if word is not None and backend_of_mode(word) not in chosen:
        chosen.append(backend_of_mode(word))
    return chosen
