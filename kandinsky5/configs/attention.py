"""Attention back end and block-sparse attention, for training and generation."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from kandinsky5.tasks import NablaParams, Task
from modules.attention_backends import ATTENTION_BACKENDS
from modules.errors import ConfigError
from modules.options import Option, float_between, option, positive_int

ATTENTION_OPTIONS = {
    name: Option(help=backend.title, default=False) for name, backend in ATTENTION_BACKENDS.items()
}
"""One option per back end."""
ATTENTION_MODE = {
    "attn_mode": Option(
        help="the same choice as one option",
        choices=tuple(word for backend in ATTENTION_BACKENDS.values() for word in backend.attn_modes),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class NablaOptions:
    """Block-sparse attention; None means the task's value."""

    force_nabla_attention: bool = option(False, "use block-sparse attention with any task")
    nabla_method: Literal["topcdf", "topk"] | None = option(None, "how blocks are chosen (default: topcdf)")
    nabla_P: float | None = option(
        None,
        "share of the attention that is kept; topk: a share below 1, or a number of blocks "
        "(default: the task's, else 0.9)",
        float_between(1e-6, 1e6),
    )
    nabla_wT: int | None = option(
        None, "window of blocks that are always kept: latent frames (default: 11)", positive_int
    )
    nabla_wH: int | None = option(None, "the same: rows of blocks (default: 3)", positive_int)
    nabla_wW: int | None = option(None, "the same: columns of blocks (default: 3)", positive_int)
    nabla_add_sta: bool | None = option(
        None,
        "always keep the window (default)",
        opposite=("no_nabla_add_sta", "do not always keep the window"),
    )

    def params(self, task: Task) -> NablaParams | None:
        """The task's block-sparse attention with the given values; None means full attention.

        Raises:
            ConfigError: `--nabla_P` is above 1 with topcdf, which takes a share.
        """
        base = task.nabla or (NablaParams() if self.force_nabla_attention else None)
        if base is None:
            return None
        values = {
            "method": self.nabla_method,
            "P": self.nabla_P,
            "wT": self.nabla_wT,
            "wH": self.nabla_wH,
            "wW": self.nabla_wW,
            "add_sta": self.nabla_add_sta,
        }
        params = replace(base, **{name: value for name, value in values.items() if value is not None})
        if params.method == "topcdf" and params.P > 1:
            raise ConfigError(f"--nabla_P {params.P:g}: with --nabla_method topcdf it is a share, at most 1")
        return params
