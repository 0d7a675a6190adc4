"""int8 weights: the grid, the integer product, and where it is refused."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from modules import int8
from modules.errors import ResourceError
from modules.int8 import FAST_PRODUCT, Int8Linear, check_int8_matmul, quantise_rows
from modules.quantised_linear import FastProduct

CPU = torch.device("cpu")
OUT, IN = 48, 64


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_weights_on_the_grid_are_kept_to_the_bit() -> None:
    weight8 = torch.randint(-126, 127, (OUT, IN), generator=torch.Generator().manual_seed(0))
    weight8[:, 0] = 127
    scale = torch.logspace(-3, 3, OUT).bfloat16().float()
    found8, found_scale = quantise_rows(weight8.float() * scale[:, None])
    assert torch.equal(found8.long(), weight8)
    assert torch.equal(found_scale, scale)


def test_rounding_is_symmetric() -> None:
    weight = draw(OUT, IN)
    up, down = quantise_rows(weight), quantise_rows(-weight)
    assert torch.equal(up[0], -down[0])
    assert int(up[0].min()) >= -127


@pytest.mark.parametrize("tokens", [0, 1, 16, 17, 31, 32, 70])
def test_integer_products_of_any_number_of_tokens_are_exact(
    monkeypatch: pytest.MonkeyPatch, tokens: int
) -> None:
    """On CUDA the product wants more than 16 tokens: fewer are filled up with zeros."""
    plain = torch._int_mm

    def strict(left: Tensor, right: Tensor) -> Tensor:
        assert left.shape[0] > 16
        assert left.shape[1] % 8 == right.shape[1] % 8 == 0
        return plain(left, right)

    monkeypatch.setattr(torch, "_int_mm", strict)
    generator = torch.Generator().manual_seed(0)
    x8 = torch.randint(-127, 128, (tokens, IN), generator=generator, dtype=torch.int8)
    w8 = torch.randint(-127, 128, (OUT, IN), generator=generator, dtype=torch.int8)
    assert torch.equal(int8._integer_product(x8, w8).long(), x8.long() @ w8.long().t())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("chunk", [2**23, 40 * IN], ids=["whole", "pieces"])
def test_the_fast_product_equals_its_formula(
    monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype, chunk: int
) -> None:
    monkeypatch.setattr(int8, "CHUNK_ELEMENTS", chunk)
    weight8, scale = quantise_rows(draw(OUT, IN) / 8)
    bias = draw(OUT, seed=1).to(dtype)
    x = (draw(75, IN, seed=2) * torch.logspace(-2, 2, 75)[:, None]).to(dtype)
    x[3] = 0
    output = Int8Linear(weight8, scale, bias, compute_dtype=dtype, use_fast=True)(x)
    token_scale = int8.round_up_to_bfloat16((x.float().abs().amax(1, keepdim=True) / 127).clamp(min=2**-100))
    x8 = (x.float() / token_scale).round()
    assert x8.abs().max() <= 127
    exact = (x8.double() @ weight8.double().t()) * token_scale * scale + bias
    error = (output.double() - exact).norm(dim=1) / exact.norm(dim=1)
    assert error.max() < {torch.float32: 1e-6, torch.bfloat16: 6e-3, torch.float16: 1e-3}[dtype]


def test_a_token_that_is_not_finite_stays_so() -> None:
    weight8, scale = quantise_rows(draw(OUT, IN))
    linear = Int8Linear(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=True)
    x = draw(40, IN).bfloat16()
    x[3, 5], x[4, 6] = float("nan"), float("inf")
    output = linear(x)
    assert not output[3:5].isfinite().any()
    assert output[5:].isfinite().all()


def test_the_fast_product_is_refused_without_int8_units(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ResourceError, match="--int8_fast needs a CUDA device with int8 units, not cpu"):
        check_int8_matmul(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "Tesla V100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 0))
    with pytest.raises(ResourceError, match=r"Tesla V100 has 7\.0\. Leave --int8_fast out"):
        check_int8_matmul(torch.device("cuda"))
    asked = []
    monkeypatch.setattr(FastProduct, "probe", lambda _, *given: asked.append(given))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: (7, 5))
    check_int8_matmul(torch.device("cuda"))
    assert asked == [(torch.device("cuda"), Int8Linear)]


@pytest.mark.parametrize("factor", [0.5, float("nan")])
def test_a_product_that_is_wrong_is_refused(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    FAST_PRODUCT.probe(CPU, Int8Linear)
    plain = int8.finish
    monkeypatch.setattr(int8, "finish", lambda output, *given: plain(output * factor, *given))
    with pytest.raises(ResourceError, match="is wrong, relative error"):
        FAST_PRODUCT.probe(CPU, Int8Linear)


@pytest.mark.parametrize("words", ["CUDA error: no kernel image is available", ""])
def test_a_product_that_fails_is_refused(monkeypatch: pytest.MonkeyPatch, words: str) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise RuntimeError(words)

    monkeypatch.setattr(torch, "_int_mm", fail)
    with pytest.raises(ResourceError, match=f"{words or 'RuntimeError'}. Leave --int8_fast out"):
        FAST_PRODUCT.probe(CPU, Int8Linear)


def test_a_full_device_says_nothing_about_products(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("patched")

    monkeypatch.setattr(torch, "_int_mm", fail)
    with pytest.raises(torch.OutOfMemoryError):
        FAST_PRODUCT.probe(CPU, Int8Linear)
