"""How transformer blocks are compiled."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from modules.options import Option, option, option_made_into, positive_int

CompileMode = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]
NO_BACKEND = "no"
"""accelerate's value for not compiling."""
_CUDA_GRAPH_MODES = ("reduce-overhead", "max-autotune")
"""Inductor modes that record CUDA graphs."""


def compile_option() -> Any:
    """`--compile`; the field holds a `CompileConfig`, or None if blocks are not compiled."""
    declared = Option(help="compile every transformer block", default=False, group="compilation")
    return option_made_into(declared, default=None)


@dataclass(frozen=True, kw_only=True, slots=True)
class CompileConfig:
    """The `--compile_*` options, with the values of torch.compile."""

    compile_backend: str = option("inductor", "torch.compile's back end (default: inductor)")
    compile_mode: CompileMode = option("default", "mode of the inductor back end (default: default)")
    compile_dynamic: Literal["true", "false", "auto"] | None = option(
        None,
        "compile for variable lengths; auto: from the second length on (default: true)",
    )
    compile_fullgraph: bool = option(False, "raise an error at a graph break")
    compile_cache_size_limit: int | None = option(
        None, "maximum number of compiled graphs per kind of block (default: torch's limit)", positive_int
    )

    @property
    def uses_cuda_graphs(self) -> bool:
        """Whether torch records CUDA graphs, which replay kernels at the addresses of the first run."""
        return self.compile_backend == "cudagraphs" or (
            self.compile_backend == "inductor" and self.compile_mode in _CUDA_GRAPH_MODES
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class DynamoOptions:
    """accelerate's names for the same settings, which musubi-tuner's training scripts accept."""

    dynamo_backend: str = option(
        NO_BACKEND, "as --compile --compile_backend TEXT (default: no)", str.lower, metavar="TEXT"
    )
    dynamo_mode: CompileMode | None = option(None, "as --compile_mode")
    dynamo_fullgraph: bool = option(False, "as --compile_fullgraph")
    dynamo_dynamic: bool = option(False, "as --compile_dynamic true")
