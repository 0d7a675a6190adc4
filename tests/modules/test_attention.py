"""Every attention back end computes the same function, masks included.

The other libraries need a GPU: stand-ins with their signatures check how they are called.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from modules.attention import KeyMask, attention
from modules.attention_backends import ATTENTION_BACKENDS, check_attention_backend, load_attention
from modules.errors import ResourceError

SHAPE = (2, 6, 3, 64)  # [B, N, heads, d]
LENGTHS = (4, 7)


def true_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    assert q.ndim == 4
    assert q.shape[2:] == k.shape[2:] == v.shape[2:], "layout must be [B, N, heads, d]"
    assert q.dtype == k.dtype == v.dtype
    assert q.dtype in (torch.float16, torch.bfloat16)
    mixed = F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (q, k, v)), scale=scale)
    return mixed.transpose(1, 2)


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
) -> Tensor:
    assert not causal
    assert dropout_p == 0.0
    return true_attention(q, k, v, softmax_scale)


def flash3_func(
    q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None = None, causal: bool = False
) -> tuple[Tensor, Tensor]:
    assert not causal
    return true_attention(q, k, v, softmax_scale), torch.zeros(1)


def sageattn(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tensor_layout: str = "HND",
    is_causal: bool = False,
    sm_scale: float | None = None,
) -> Tensor:
    assert tensor_layout == "NHD"
    assert not is_causal
    return true_attention(q, k, v, sm_scale)


def memory_efficient_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_bias: object = None,
    p: float = 0.0,
    scale: float | None = None,
) -> Tensor:
    assert attn_bias is None
    assert p == 0.0
    return true_attention(query, key, value, scale)


STAND_INS = {
    "flash_attn": ("flash_attn", {"flash_attn_func": flash_attn_func}),
    "flash3": ("flash_attn_interface", {"flash_attn_func": flash3_func}),
    "sage_attn": ("sageattention", {"sageattn": sageattn}),
    "xformers": ("xformers.ops", {"memory_efficient_attention": memory_efficient_attention}),
}


@pytest.fixture(params=STAND_INS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    name, functions = STAND_INS[request.param]
    stand_in = ModuleType(name)
    for function_name, function in functions.items():
        setattr(stand_in, function_name, function)
    if "." in name:
        monkeypatch.setitem(sys.modules, name.split(".")[0], ModuleType(name.split(".")[0]))
    monkeypatch.setitem(sys.modules, name, stand_in)
    load_attention.cache_clear()
    yield request.param
    load_attention.cache_clear()


def case(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(SHAPE, generator=generator).to(dtype)
    key, value = torch.randn(2, 2, 7, 3, 64, generator=generator).to(dtype)
    mask = torch.arange(7) < torch.tensor(LENGTHS)[:, None]
    return query, key, value, mask


def test_every_back_end_equals_sdpa_with_unequal_captions(backend: str) -> None:
    query, key, value, mask = case(torch.bfloat16)
    keys = KeyMask.for_backend(mask, backend)
    assert keys.lengths == LENGTHS
    expected = attention(query, key, value, keys=KeyMask(mask))
    torch.testing.assert_close(attention(query, key, value, keys=keys, backend=backend), expected)
    torch.testing.assert_close(attention(query, key, value, backend=backend), attention(query, key, value))


def test_padding_has_no_influence() -> None:
    query, key, value, mask = case(torch.float32)
    spoilt = torch.where(mask[:, :, None, None], value, 1e6)
    assert torch.equal(
        attention(query, key, value, keys=KeyMask(mask)), attention(query, key, spoilt, keys=KeyMask(mask))
    )


def test_float32_is_refused_by_half_precision_back_ends(backend: str) -> None:
    query, key, value, _ = case(torch.float32)
    with pytest.raises(ValueError, match="use --sdpa"):
        attention(query, key, value, backend=backend)


@pytest.mark.parametrize("name", sorted(ATTENTION_BACKENDS.keys() - {"sdpa"}))
def test_a_missing_package_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, ATTENTION_BACKENDS[name].package, None)
    with pytest.raises(ResourceError, match=f"--{name} requires the package"):
        check_attention_backend(name, for_training=False)


def test_every_back_end_of_a_library_has_a_stand_in_here() -> None:
    assert STAND_INS.keys() == ATTENTION_BACKENDS.keys() - {"sdpa"}


def test_sage_attention_cannot_train() -> None:
    with pytest.raises(ResourceError, match="no backward"):
        check_attention_backend("sage_attn", for_training=True)
    check_attention_backend("sdpa", for_training=True)
