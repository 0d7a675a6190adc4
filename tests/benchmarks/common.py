"""Shared pieces of the benches: configs, synthetic weights and inputs, paired timing, memory.

Nothing here imports an upstream project. Timing is always interleaved (A, B, C, A, B, C, ...), so
that slow phases of a shared machine hit every contestant; what is reported is the median, and the
ratio is the median of the per-round ratios against the reference.
"""

from __future__ import annotations

import ctypes
import gc
import json
import math
import os
import pathlib
import random
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True)
class DitConfig:
    model_dim: int
    ff_dim: int
    time_dim: int
    axes_dims: tuple
    num_text_blocks: int
    num_visual_blocks: int
    in_visual_dim: int = 16
    out_visual_dim: int = 16
    in_text_dim: int = 3584
    in_text_dim2: int = 768
    patch_size: tuple = (1, 2, 2)
    visual_cond: bool = True

    @property
    def head_dim(self):
        return sum(self.axes_dims)

    @property
    def input_channels(self):
        return 2 * self.in_visual_dim + 1 if self.visual_cond else self.in_visual_dim

    def kwargs(self):
        return {k: getattr(self, k) for k in self.__dataclass_fields__}


PRO = DitConfig(4096, 16384, 1024, (32, 48, 48), 4, 60)
LITE = DitConfig(1792, 7168, 512, (16, 24, 24), 2, 32)
CONFIGS = {
    "pro": PRO,
    "lite": LITE,
    # Lite width with few blocks: per-block cost is the real one, the run stays short on a CPU.
    "lite2": replace(LITE, num_text_blocks=1, num_visual_blocks=2),
    "lite4": replace(LITE, num_text_blocks=1, num_visual_blocks=4),
    "lite8": replace(LITE, num_text_blocks=1, num_visual_blocks=8),
    "pro4": replace(PRO, num_text_blocks=1, num_visual_blocks=4),
    "tiny": DitConfig(256, 1024, 128, (16, 24, 24), 1, 2, in_text_dim=128, in_text_dim2=64),
}


def parse_shape(text):
    """'5x32x32' -> (frames, height, width) of the latent."""
    t, h, w = (int(v) for v in text.lower().split("x"))
    return t, h, w


def tokens(shape, cfg=LITE):
    return math.prod(s // p for s, p in zip(shape, cfg.patch_size))


def param_shapes(cfg):
    """Names and shapes of the published checkpoint's tensors (official == musubi == diffusers names)."""
    d, f, t, hd = cfg.model_dim, cfg.ff_dim, cfg.time_dim, cfg.head_dim
    out = {}

    def linear(name, o, i, bias=True):
        out[name + ".weight"] = (o, i)
        if bias:
            out[name + ".bias"] = (o,)

    def attention(name):
        for part in ("to_query", "to_key", "to_value", "out_layer"):
            linear(f"{name}.{part}", d, d)
        out[name + ".query_norm.weight"] = (hd,)
        out[name + ".key_norm.weight"] = (hd,)

    def feed_forward(name):
        linear(name + ".in_layer", f, d, False)
        linear(name + ".out_layer", d, f, False)

    patch = math.prod(cfg.patch_size)
    linear("time_embeddings.in_layer", t, d)
    linear("time_embeddings.out_layer", t, t)
    for name, i, o in (
        ("text_embeddings", cfg.in_text_dim, d),
        ("pooled_text_embeddings", cfg.in_text_dim2, t),
    ):
        linear(name + ".in_layer", o, i)
        out[name + ".norm.weight"] = (o,)
        out[name + ".norm.bias"] = (o,)
    linear("visual_embeddings.in_layer", d, patch * cfg.input_channels)
    for i in range(cfg.num_text_blocks):
        b = f"text_transformer_blocks.{i}"
        linear(b + ".text_modulation.out_layer", 6 * d, t)
        attention(b + ".self_attention")
        feed_forward(b + ".feed_forward")
    for i in range(cfg.num_visual_blocks):
        b = f"visual_transformer_blocks.{i}"
        linear(b + ".visual_modulation.out_layer", 9 * d, t)
        attention(b + ".self_attention")
        attention(b + ".cross_attention")
        feed_forward(b + ".feed_forward")
    linear("out_layer.modulation.out_layer", 2 * d, t)
    linear("out_layer.out_layer", patch * cfg.out_visual_dim, d)
    return out


def keep_fp32(name):
    """Parts that run in float32 in every implementation (timestep embedding and modulation)."""
    return "time_embeddings" in name or "modulation" in name


def make_weights(cfg, dtype, device="cpu", seed=0):
    gen = torch.Generator(device=device).manual_seed(seed)
    sd = {}
    for name, shape in param_shapes(cfg).items():
        if name.endswith("norm.weight"):
            w = torch.ones(shape, device=device)
        elif len(shape) == 1:
            w = torch.zeros(shape, device=device)
        else:
            w = torch.randn(shape, generator=gen, device=device) * (0.5 / math.sqrt(shape[1]))
        sd[name] = w if keep_fp32(name) else w.to(dtype)
    return sd


@dataclass
class Inputs:
    x: torch.Tensor  # frames, height, width, channels (model input, conditioning channels included)
    text: torch.Tensor  # tokens, in_text_dim
    pooled: torch.Tensor  # 1, in_text_dim2
    time: torch.Tensor  # 1, in [0, 1000]
    target: torch.Tensor  # frames, height, width, out_visual_dim
    scale_factor: tuple = (1.0, 2.0, 2.0)
    sparse: dict | None = None  # NABLA options, see bench_nabla.sparse_params


def make_inputs(cfg, shape, text_tokens, dtype, device="cpu", seed=1):
    gen = torch.Generator(device=device).manual_seed(seed)
    rnd = lambda *s: torch.randn(*s, generator=gen, device=device).to(dtype)
    return Inputs(
        x=rnd(*shape, cfg.input_channels),
        text=rnd(text_tokens, cfg.in_text_dim),
        pooled=rnd(1, cfg.in_text_dim2),
        time=torch.tensor([500.0], device=device),
        target=rnd(*shape, cfg.out_visual_dim),
    )


# ---- timing ------------------------------------------------------------------------------------


def sync(device):
    if str(device).startswith("cuda"):
        torch.cuda.synchronize()


# On a shared CPU set K5_CLOCK=cpu (and K5_THREADS=1): processor time, which neighbours hardly move.
CLOCK = time.process_time if os.environ.get("K5_CLOCK") == "cpu" else time.perf_counter
if os.environ.get("K5_THREADS"):
    torch.set_num_threads(int(os.environ["K5_THREADS"]))


def time_once(fn, device="cpu"):
    if str(device).startswith("cuda"):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        sync(device)
        start.record()
        fn()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3
    t0 = CLOCK()
    fn()
    return CLOCK() - t0


def interleave(fns, rounds=5, warmup=1, device="cpu", seed=0):
    """{name: callable} -> {name: [seconds per round]}, every round runs every callable once, shuffled."""
    rng = random.Random(seed)
    names = list(fns)
    for _ in range(warmup):
        for n in names:
            fns[n]()
    times = {n: [] for n in names}
    for _ in range(rounds):
        for n in rng.sample(names, len(names)):
            times[n].append(time_once(fns[n], device))
    return times


def ratio(times, name, ref):
    """Median of the per-round ratios name/ref: below 1 is faster than the reference."""
    return statistics.median(a / b for a, b in zip(times[name], times[ref]))


def report(title, times, ref, extra=None):
    print(f"\n### {title}   (reference: {ref})")
    print(f"| contestant | median s | min s | max s | x {ref} time |" + (" note |" if extra else ""))
    print("| --- | ---: | ---: | ---: | ---: |" + (" --- |" if extra else ""))
    for n, ts in times.items():
        row = f"| {n} | {statistics.median(ts):.4g} | {min(ts):.4g} | {max(ts):.4g} | {ratio(times, n, ref):.3f} |"
        print(row + (f" {extra.get(n, '')} |" if extra else ""), flush=True)


# ---- memory ------------------------------------------------------------------------------------


def trim():
    """Hand freed memory back to the system, so that what follows does not hide in it."""
    gc.collect()
    if sys.platform == "linux":
        ctypes.CDLL(None).malloc_trim(0)


def _status_mib(field):
    with pathlib.Path("/proc/self/status").open(encoding="utf-8") as f:
        return next(int(line.split()[1]) for line in f if line.startswith(field + ":")) / 1024


def rss_mib():
    """Resident memory of this process, after handing back what is free."""
    trim()
    return _status_mib("VmRSS")


def anonymous_mib():
    """Memory that the system cannot drop and read again from a file."""
    return _status_mib("RssAnon")


def reset_peak(device="cpu"):
    gc.collect()
    if str(device).startswith("cuda"):
        torch.cuda.reset_peak_memory_stats()
    else:
        with pathlib.Path("/proc/self/clear_refs").open("w", encoding="utf-8") as f:
            f.write("5")  # VmHWM starts anew


def peak_mib(device="cpu"):
    """Most memory since `reset_peak`: allocated on a GPU, resident on Linux."""
    if str(device).startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    return _status_mib("VmHWM")


class AnonymousPeak(threading.Thread):
    """Samples anonymous memory while a block runs; `mib` is the highest value above the start."""

    def __init__(self, every=0.002):
        super().__init__(daemon=True)
        self.every, self.is_running = every, True

    def __enter__(self):
        trim()
        self.start_mib = self.highest = anonymous_mib()
        self.start()
        return self

    def run(self):
        while self.is_running:
            self.highest = max(self.highest, anonymous_mib())
            time.sleep(self.every)

    def __exit__(self, *_):
        self.is_running = False
        self.join()

    @property
    def mib(self):
        return max(self.highest, anonymous_mib()) - self.start_mib


# ---- processes ---------------------------------------------------------------------------------


EXACT_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**16)}
"""For glibc: freed tensors go back to the system at once, so that resident memory is what is in use."""


def run_alone(argv, **environment):
    """Run a script in a process of its own; the dictionary that it hands to `tell`."""
    done = subprocess.run(
        [sys.executable, *map(str, argv)],
        capture_output=True,
        text=True,
        encoding="utf-8",
        env=os.environ | environment,
    )
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{' '.join(map(str, argv))} failed:\n{done.stdout}\n{done.stderr}")
    return json.loads(lines[-1].removeprefix("RESULT "))


def tell(result):
    print("RESULT " + json.dumps(result), flush=True)
