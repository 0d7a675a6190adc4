"""How transformer blocks are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_BACKEND = "no"
"""accelerate's word for not compiling."""


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """The `--compile_*` options; torch.compile's own words."""

    compile_backend: str = "inductor"
    compile_mode: str = "default"
    """Acts with the inductor back end."""
    compile_dynamic: Literal["true", "false", "auto"] | None = None
    """None: lengths are dynamic from the start, so that no bucket or caption length compiles anew."""
    compile_fullgraph: bool = False
    compile_cache_size_limit: int | None = None
    """Graphs kept per block kind; None: torch's own limit."""
