"""Finds the options of a command line that have no effect beside the others.

Only what differs from its default counts as given, so that the file of a run's options may hold them all.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

_Config = TypeVar("_Config")


@dataclass(frozen=True, slots=True)
class IdleRule(Generic[_Config]):
    """Options that do nothing under a condition."""

    options: tuple[str, ...]
    """Names without dashes; a word of `--network_args` is "network_args word"."""
    is_idle: Callable[[_Config], bool]
    why: str
    """The reason, and what to add or leave out."""


def idle_notes(rules: Sequence[IdleRule[_Config]], config: _Config, given: Collection[str]) -> dict[str, str]:
    """Option -> log line, for every option in `given` that has no effect; the first rule that holds tells."""
    notes: dict[str, str] = {}
    for rule in rules:
        idle = [name for name in rule.options if name in given and name not in notes]
        if idle and rule.is_idle(config):
            notes |= {name: f"--{name} has no effect: {rule.why}" for name in idle}
    return notes


def given_options(parser: argparse.ArgumentParser, args: argparse.Namespace) -> set[str]:
    """Names of the options whose values are not their defaults."""
    return {name for name, value in vars(args).items() if value != parser.get_default(name)}
