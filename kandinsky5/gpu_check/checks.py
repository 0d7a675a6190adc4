"""Checks of single functions on a device: each returns what there is to say, or raises."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from modules.attention import KeyMask, attention
from modules.attention_backends import ATTENTION_BACKENDS, DEFAULT_BACKEND, check_attention_backend
from modules.block_sparse import block_sparse_attention, describe_block_sparse_path
from modules.block_swap import copy_engine
from modules.byte_sizes import size_text
from modules.child_process import CallFailed, ChildProcess
from modules.cudnn import check_conv3d
from modules.errors import ResourceError
from modules.fp8 import Fp8Linear, check_fp8_matmul
from modules.host_buffer import HostBuffer
from modules.int8 import Int8Linear, RotatedInt8Linear, check_int8_matmul
from modules.nf4 import Nf4Linear, check_nf4, quantise_nf4
from modules.optimizers import build_optimizer
from modules.quantised_linear import QuantisedLinear

_TIME_LIMIT = 120.0
"""Seconds for one check, the start of its process included; compiling is the longest."""
_COPIED_BYTES = 2**26


def _compare(got: Sequence[Tensor], exact: Sequence[Tensor], tolerance: float) -> str:
    """The largest relative error of several tensors; RuntimeError if it is too large."""
    with torch.no_grad():
        pairs = zip(got, exact, strict=True)
        error = max(float((a.float() - b.float()).norm() / b.float().norm()) for a, b in pairs)
    if not error <= tolerance:  # NaN too
        raise RuntimeError(f"wrong: relative error {error:.2g}, expected below {tolerance:g}")
    return f"error {error:.1e}"


def _random(device: torch.device, *shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device)


def _check_convolution(device: torch.device, dtype: torch.dtype) -> str:
    """One layer of a VAE."""
    check_conv3d(device, dtype)
    x, weight = _random(device, 1, 64, 5, 16, 16), _random(device, 64, 64, 3, 3, 3, seed=1) / 42
    exact = F.conv3d(x, weight, padding=1)
    half = x.to(dtype), weight.to(dtype)
    if device.type != "cuda":
        return _compare([F.conv3d(*half, padding=1)], [exact], 2e-2)
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    got = F.conv3d(*half, padding=1)
    workspace = torch.cuda.max_memory_allocated(device) - before - got.nbytes
    return (
        f"{_compare([got], [exact], 2e-2)}, {size_text(workspace)} of workspace for {size_text(got.nbytes)}"
    )


def _attend(device: torch.device, backend: str, *, backward: bool, keys: KeyMask | None = None) -> str:
    """Attention of heads as wide as Pro's, against torch's in float32."""
    inputs = [_random(device, 2, 256, 4, 128, seed=seed) for seed in range(3)]
    grad = _random(device, 2, 256, 4, 128, seed=3)
    results = []
    for dtype, used in ((torch.bfloat16, backend), (torch.float32, DEFAULT_BACKEND)):
        tensors = [tensor.to(dtype).requires_grad_(backward) for tensor in inputs]
        out = attention(tensors[0], tensors[1], tensors[2], keys=keys, backend=used)
        grads = torch.autograd.grad(out, tensors, grad.to(dtype)) if backward else ()
        results.append([out, *grads])
    return _compare(results[0], results[1], 5e-2)


def _check_sdpa(device: torch.device) -> str:
    lengths = torch.tensor([[256], [100]], device=device)
    masked = KeyMask(torch.arange(256, device=device) < lengths)
    plain, padded = (_attend(device, DEFAULT_BACKEND, backward=True, keys=keys) for keys in (None, masked))
    return f"{plain}; with captions of two lengths {padded}"


def _check_backend(name: str) -> Callable[[torch.device], str]:
    def check(device: torch.device) -> str:
        check_attention_backend(name, for_training=False)
        return _attend(device, name, backward=ATTENTION_BACKENDS[name].has_backward)

    return check


def _check_sparse_attention(device: torch.device) -> str:
    tokens, block = 1024, 64
    mask = (
        torch.rand(1, 4, tokens // block, tokens // block, generator=torch.Generator().manual_seed(4)) < 0.3
    )
    mask = (mask | torch.eye(tokens // block, dtype=torch.bool)).to(device)
    inputs = [_random(device, 1, tokens, 4, 128, seed=seed) for seed in range(3)]
    grad = _random(device, 1, tokens, 4, 128, seed=3)

    half = [tensor.bfloat16().requires_grad_() for tensor in inputs]
    got = block_sparse_attention(half[0], half[1], half[2], mask, block)
    grads = torch.autograd.grad(got, half, grad.bfloat16())

    wide = [tensor.requires_grad_() for tensor in inputs]
    elements = mask.repeat_interleave(block, 2).repeat_interleave(block, 3)
    heads = (tensor.transpose(1, 2) for tensor in wide)
    exact = F.scaled_dot_product_attention(*heads, attn_mask=elements).transpose(1, 2)
    exact_grads = torch.autograd.grad(exact, wide, grad)
    error = _compare([got, *grads], [exact, *exact_grads], 5e-2)
    return f"{error}, by {describe_block_sparse_path(device)}"


def _check_layer(layer_class: type[QuantisedLinear], *, use_fast: bool) -> Callable[[torch.device], str]:
    """A linear layer with one-byte weights, forward and backward, against its own weights in float32."""

    def check(device: torch.device) -> str:
        if use_fast:
            (check_fp8_matmul if layer_class is Fp8Linear else check_int8_matmul)(device)
        weight, bias = _random(device, 1024, 512), _random(device, 1024, seed=1)
        x, grad = _random(device, 200, 512, seed=2), _random(device, 200, 1024, seed=3)
        weight8, scale = layer_class.quantise(weight)
        layer = layer_class(weight8, scale, bias, compute_dtype=torch.bfloat16, use_fast=use_fast)
        half, wide = x.bfloat16().requires_grad_(), x.clone().requires_grad_()
        got = layer(half)
        exact = F.linear(wide, layer.widened(), bias)
        grads = [*torch.autograd.grad(got, half, grad.bfloat16()), *torch.autograd.grad(exact, wide, grad)]
        return _compare([got, grads[0]], [exact, grads[1]], 6e-2 if use_fast else 2e-2)

    return check


def _check_compile(device: torch.device) -> str:
    def formula(x: Tensor) -> Tensor:
        return F.gelu(x) * x.sigmoid() + 1

    x = _random(device, 4096, 16)
    return _compare([torch.compile(formula, fullgraph=True)(x)], [formula(x)], 1e-4)


def _check_page_locked(device: torch.device) -> str:
    """A copy as block swap makes it."""
    is_cuda = device.type == "cuda"
    source = torch.randint(
        0, 256, (_COPIED_BYTES,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    host = HostBuffer(_COPIED_BYTES, pin=is_cuda)
    host.fill(0, source)
    target = torch.zeros(_COPIED_BYTES, dtype=torch.uint8, device=device)
    engine = copy_engine(device, pinned=is_cuda, size=_COPIED_BYTES)
    seconds = []
    for _ in range(3):
        begin = time.perf_counter()
        engine.wait(engine.start(host, target))
        if is_cuda:
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - begin)
    if not torch.equal(target.cpu(), source):
        raise RuntimeError("wrong: the copy differs")
    return f"{_COPIED_BYTES / min(seconds) / 1e9:.1f} GB/s to the device"


def _check_adamw8bit(device: torch.device) -> str:
    """Three steps against AdamW's."""
    moves = []
    for name in ("AdamW8bit", "AdamW"):
        parameter = torch.nn.Parameter(_random(device, 256, 256))
        before = parameter.detach().clone()
        optimizer = build_optimizer(name, [{"params": [parameter]}], 1e-2, {"weight_decay": 0.0})
        for seed in range(3):
            parameter.grad = _random(device, 256, 256, seed=seed)
            optimizer.step()
        moves.append(parameter.detach() - before)
    return _compare(moves[:1], moves[1:], 1e-1)


def _check_nf4(device: torch.device) -> str:
    """A linear layer with NF4 weights, forward and backward, against its own weights in float32."""
    check_nf4(device)
    x, grad = _random(device, 200, 512, seed=2), _random(device, 200, 1024, seed=3)
    layer = Nf4Linear(quantise_nf4(_random(device, 1024, 512)), None, compute_dtype=torch.bfloat16)
    half, wide = x.bfloat16().requires_grad_(), x.clone().requires_grad_()
    got, exact = layer(half), F.linear(wide, layer.widened())
    grads = [*torch.autograd.grad(got, half, grad.bfloat16()), *torch.autograd.grad(exact, wide, grad)]
    return _compare([got, grads[0]], [exact, grads[1]], 2e-2)


CHECKS: Mapping[str, Callable[[torch.device], str]] = {
    "attention": _check_sdpa,
    "convolution, float16 (--vae_dtype)": lambda device: _check_convolution(device, torch.float16),
    "convolution, bfloat16": lambda device: _check_convolution(device, torch.bfloat16),
    "--fp8_base": _check_layer(Fp8Linear, use_fast=False),
    "--fp8_fast": _check_layer(Fp8Linear, use_fast=True),
    "--int8_base": _check_layer(Int8Linear, use_fast=False),
    "--int8_fast": _check_layer(RotatedInt8Linear, use_fast=True),
    "--nf4_base": _check_nf4,
    "page-locked memory (--blocks_to_swap)": _check_page_locked,
    "--optimizer_type AdamW8bit": _check_adamw8bit,
    "--compile (triton)": _check_compile,
    "--nabla (flex_attention)": _check_sparse_attention,
    **{f"--{name}": _check_backend(name) for name in ATTENTION_BACKENDS if name != DEFAULT_BACKEND},
}
"""By what they are about, in the words of the command line."""


def run_check(name: str, device: str) -> str:
    """One of `CHECKS`: that it works and how well, or why the program does not use it here.

    Raises:
        RuntimeError: it fails or computes something wrong; other errors of the libraries pass too.
    """
    try:
        return f"works: {CHECKS[name](torch.device(device))}"
    except ResourceError as error:
        return f"no: {error}"


def run_checks(
    names: Sequence[str], device: torch.device, run: Callable[[str, str], str] = run_check
) -> Iterator[tuple[str, str, str]]:
    """(name, result, seconds) of every check, one after another, whatever becomes of it.

    Args:
        run: makes one check, in the process that is started for it.
    """
    child = ChildProcess(run)
    try:
        for name in names:
            begin = time.perf_counter()
            try:
                result = child.call(name, str(device), timeout=_TIME_LIMIT)
            except CallFailed as error:
                result = f"FAILS: {error}"
                child.close()  # an error of CUDA stays with its process
                child = ChildProcess(run)
            yield name, result, f"{time.perf_counter() - begin:.1f}"
    finally:
        child.close()
