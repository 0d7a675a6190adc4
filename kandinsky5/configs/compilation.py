"""How transformer blocks are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NO_BACKEND = "no"
"""accelerate's word for not compiling."""

_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Inductor's, on CUDA devices."""


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

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether torch records CUDA graphs, which replay kernels at the addresses of the first run."""
        return self.compile_backend == "cudagraphs" or (
            self.compile_backend == "inductor" and self.compile_mode in _CUDA_GRAPH_MODES
        )
