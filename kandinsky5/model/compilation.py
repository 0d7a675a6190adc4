"""Compiles the DiT's transformer blocks, each by itself."""

from __future__ import annotations

from typing import Any

import torch

from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.model.dit import DiffusionTransformer3D
from modules.errors import ConfigError
from modules.fp8 import Fp8Linear
from modules.logs import get_logger
from modules.nf4 import Nf4Linear

log = get_logger(__name__)

_DYNAMIC = {None: True, "true": True, "false": False, "auto": None}
_FLOAT8_CAPABILITY = (8, 9)


def float8_may_be_compiled(device: torch.device) -> bool:
    """Whether compiled code can convert float8 there: Triton needs compute capability 8.9 (Ada) for it."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= _FLOAT8_CAPABILITY


def check_compile_backend(config: CompileConfig | None) -> None:
    """Refuse an unknown torch.compile backend, before a model is loaded.

    Raises:
        ConfigError: lists the known names.
    """
    if config is None:
        return
    known = torch.compiler.list_backends(exclude_tags=())
    if config.compile_backend not in known:
        shown = ", ".join(torch.compiler.list_backends())
        raise ConfigError(f"torch has no compiler back end {config.compile_backend!r}; it has: {shown}")


def compile_blocks(dit: DiffusionTransformer3D, config: CompileConfig, device: torch.device) -> None:
    """Compile every text and visual block; call after LoRA and block swap are in place.

    What happens around a block stays eager: block swap, gradient checkpointing, activation offload. Inside,
    the sparse attention and NF4 layers stay eager; so do float8 layers on devices that cannot compile them.
    """
    if config.compile_cache_size_limit is not None:
        torch._dynamo.config.recompile_limit = config.compile_cache_size_limit
    stays_eager = Nf4Linear if float8_may_be_compiled(device) else (Nf4Linear, Fp8Linear)
    for module in dit.modules():
        if isinstance(module, stays_eager):
            eager = torch.compiler.disable(module.forward)
            module.forward = eager  # pyright: ignore[reportAttributeAccessIssue]
    settings: dict[str, Any] = {
        "backend": config.compile_backend,
        "dynamic": _DYNAMIC[config.compile_dynamic],
        "fullgraph": config.compile_fullgraph,
    }
    if config.compile_backend == "inductor":
        settings["mode"] = config.compile_mode
    blocks = [*dit.text_blocks(), *dit.visual_blocks()]
    for block in blocks:
        # The method, not the module: hooks of the module are not compiled.
        block.forward = torch.compile(block.forward, **settings)  # pyright: ignore[reportAttributeAccessIssue]
    log.info("compiling %d blocks on their first run, which takes a while", len(blocks))
