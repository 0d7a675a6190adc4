"""Which tests need float8 products of torch's own on a CPU: 2.10 has them with one scale per tensor only."""

from __future__ import annotations

import pytest
import torch


def _are_there() -> bool:
    square, scales = torch.zeros(16, 16).to(torch.float8_e4m3fn), torch.ones(16, 1)
    try:
        torch._scaled_mm(square, square.t(), scale_a=scales, scale_b=scales.t(), out_dtype=torch.bfloat16)
    except RuntimeError:
        return False
    return True


needs_float8_products = pytest.mark.skipif(
    not _are_there(), reason=f"torch {torch.__version__} has no float8 product with a scale per row on a CPU"
)
