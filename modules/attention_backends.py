"""Registry of attention backends: option names, requirements and call signatures.

A new one is an entry here: command lines, checks and the model read this table. No torch here: command lines
import it.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

from modules.errors import ResourceError

DEFAULT_BACKEND = "sdpa"


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionBackend:
    """One library that computes attention."""

    title: str
    """For help texts."""
    attn_modes: tuple[str, ...] = ()
    """Values of `--attn_mode` that mean this one."""
    module: str = ""
    """What is imported on first use; empty for torch's own."""
    install: str = ""
    """How to get the package."""
    attend: Callable[[Any], Callable[..., Any]] | None = None
    """Imported module -> function of query, key and value, each [B, N, heads, d]; returns the same shape."""
    has_backward: bool = True
    """Whether it can train."""

    @property
    def package(self) -> str:
        return self.module.split(".")[0]


def _flash_attention_3(module: Any) -> Callable[..., Any]:
    def attend(query: Any, key: Any, value: Any) -> Any:
        out = module.flash_attn_func(query, key, value)
        return out[0] if isinstance(out, tuple) else out  # older releases return the log-sum-exp too

    return attend


def _sage_attention(module: Any) -> Callable[..., Any]:
    return lambda q, k, v: module.sageattn(q, k, v, tensor_layout="NHD", is_causal=False)


ATTENTION_BACKENDS = {
    DEFAULT_BACKEND: AttentionBackend(title="torch's attention (default)", attn_modes=("torch", "sdpa")),
    "flash_attn": AttentionBackend(
        title="FlashAttention 2",
        attn_modes=("flash", "flash2"),
        module="flash_attn",
        install="pip install flash-attn",
        attend=lambda module: module.flash_attn_func,
    ),
    "flash3": AttentionBackend(
        title="FlashAttention 3",
        attn_modes=("flash3",),
        module="flash_attn_interface",
        install="FlashAttention 3, built from the flash-attention repository's hopper folder",
        attend=_flash_attention_3,
    ),
    "sage_attn": AttentionBackend(
        title="SageAttention, for generation only",
        attn_modes=("sageattn",),
        module="sageattention",
        install="pip install sageattention",
        attend=_sage_attention,
        has_backward=False,
    ),
    "xformers": AttentionBackend(
        title="xformers' memory-efficient attention",
        attn_modes=("xformers",),
        module="xformers.ops",
        install="pip install xformers",
        attend=lambda module: module.memory_efficient_attention,
    ),
}
"""Keyed by option name."""


def backend_of_mode(mode: str) -> str:
    """The back end that a value of `--attn_mode` means."""
    return next(name for name, backend in ATTENTION_BACKENDS.items() if mode in backend.attn_modes)


@cache
def load_attention(name: str) -> Callable[..., Any]:
    """Import a back end's package: (query, key, value), each [B, N, heads, d] -> [B, N, heads, d], no mask.

    Raises:
        ValueError: it is torch's own, which needs no package.
    """
    backend = ATTENTION_BACKENDS[name]
    if backend.attend is None:
        raise ValueError(f"{name} is torch's own attention")
    return backend.attend(importlib.import_module(backend.module))


def check_attention_backend(name: str, *, for_training: bool) -> None:
    """Check that a backend can be used on this machine, without importing it.

    Raises:
        ResourceError: its package is missing, or training requires a backward pass that it lacks.
    """
    backend = ATTENTION_BACKENDS[name]
    if for_training and not backend.has_backward:
        raise ResourceError(no_backward_problem(name))
    if backend.package and importlib.util.find_spec(backend.package) is None:
        raise ResourceError(
            f"--{name} requires the package {backend.package}: {backend.install}; or use --{DEFAULT_BACKEND}"
        )


def no_backward_problem(name: str) -> str:
    """Explanation for messages of why a backend cannot train."""
    return f"--{name} has no backward pass and cannot train; use --{DEFAULT_BACKEND}"
