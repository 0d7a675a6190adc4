"""Names of dtypes on the command line."""

from __future__ import annotations

import torch

DTYPE_WORDS = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "float": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}


def dtype_from_word(word: str) -> torch.dtype:
    """The dtype for one of `DTYPE_WORDS`; the option parsers have already refused every other word."""
    return DTYPE_WORDS[word]


def dtype_name(dtype: torch.dtype) -> str:
    """torch's name of a dtype, as used in cache keys: float16, bfloat16, float32, float8_e4m3fn."""
    return str(dtype).removeprefix("torch.")
