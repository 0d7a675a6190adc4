"""Linear layers in float8: exactness, memory and dtypes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules.errors import ResourceError
from modules.fp8 import FAST_PRODUCT, Fp8Linear, check_fp8_matmul
from modules.quantised_linear import FastProduct, dequantise, normalise_scale
from tests.float8_products import needs_float8_products

CPU = torch.device("cpu")
OUT, IN, TOKENS = 48, 64, 40


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return float((actual.float() - expected).norm().detach() / expected.norm().detach())


@pytest.mark.parametrize("shape", [(), (1,), (OUT,), (OUT, 1), (OUT, 4), (OUT, 4, 1)])
@pytest.mark.parametrize("weight_dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_scales_of_every_checkpoint_layout_are_computed_with(
    shape: tuple[int, ...], weight_dtype: torch.dtype
) -> None:
    scale = torch.rand(shape, generator=torch.Generator().manual_seed(5)) + 0.01  # no bfloat16 numbers
    weight8 = draw(OUT, IN).to(weight_dtype)
    blocks = weight8.float().view(OUT, 4, IN // 4)
    by_block = scale.reshape(1, 1, 1) if scale.numel() == 1 else scale.reshape(OUT, -1, 1)
    weight = (blocks * by_block).view(OUT, IN)
    assert torch.equal(dequantise(weight8, scale, torch.float32), weight)
    x = draw(TOKENS, IN, seed=2).requires_grad_()
    for dtype, tolerance in ((torch.float32, 1e-6), (torch.bfloat16, 6e-3)):
        linear = Fp8Linear(weight8, normalise_scale(scale, OUT), None, compute_dtype=dtype)
        inputs = x.detach().to(dtype).requires_grad_()
        output = linear(inputs)
        output.sum().backward()
        assert output.dtype == dtype
        assert relative_error(output.detach(), inputs.detach().float() @ weight.t()) < tolerance
        assert relative_error(inputs.grad, torch.ones(TOKENS, OUT) @ weight) < tolerance  # type: ignore[arg-type]


def test_a_scale_that_fits_no_layout_is_refused() -> None:
    with pytest.raises(ValueError, match="does not fit 48 rows"):
        normalise_scale(torch.ones(7), OUT)


def test_the_fast_product_is_refused_without_float8_units() -> None:
    with pytest.raises(ResourceError, match="--fp8_fast"):
        check_fp8_matmul(torch.device("cpu"))


@needs_float8_products
def test_a_build_of_torch_with_products_scaled_by_row_is_accepted() -> None:
    FAST_PRODUCT.probe(CPU, Fp8Linear)


def test_a_build_of_torch_without_products_scaled_by_row_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A capability says what the card can do, not whether this build of torch does it."""
    given = []

    def refuse(*_: Tensor, scale_a: Tensor, scale_b: Tensor, bias: Tensor | None, **__: object) -> Tensor:
        given.append((scale_a.shape, scale_b.shape, bias is not None))
        raise RuntimeError("Rowwise scaling is not currently supported on your device\nmore")

    monkeypatch.setattr(torch, "_scaled_mm", refuse)
    with pytest.raises(ResourceError, match=r"supported on your device\. Leave --fp8_fast out"):
        FAST_PRODUCT.probe(CPU, Fp8Linear)
    assert given == [((40, 1), (1, 64), True)]


def test_a_card_with_float8_units_is_asked_for_a_product(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(FastProduct, "probe", lambda _, *given: asked.append(given))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (12, 0))
    check_fp8_matmul(torch.device("cuda"))
    assert asked == [(torch.device("cuda"), Fp8Linear)]
