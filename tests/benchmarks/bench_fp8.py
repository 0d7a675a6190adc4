"""One-byte weights: this project's layer against bf16 and against other ways to widen float8.

  python bench_fp8.py --dim 4096 --tokens 1024 [--device cuda] [--compile]

bf16                the floor: an ordinary linear
fp32 dequantise     weight -> float32, times a float32 scale per 16 neighbours, linear under autocast: what
                    other Kandinsky trainers install, written anew here
Fp8Linear           this project's layer
Fp8Linear, fast     the same multiplying in float8 (`--fp8_fast`; GPUs of compute capability 8.9 and later)
int8, int8 fast     with --int8: the same in int8; "rotated" with the rotation that `--int8_fast` adds
"""

import argparse
import sys
from pathlib import Path

import common as C
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.fp8 import FP8_DTYPE, FP8_MAX, Fp8Linear, quantise_rows
from modules.int8 import Int8Linear, RotatedInt8Linear

OTHERS, OURS = "fp32 dequantise", "Fp8Linear"
NEIGHBOURS = 16


def quantise_neighbours(w):
    o, i = w.shape
    v = w.float().view(o, i // NEIGHBOURS, NEIGHBOURS)
    s = v.abs().amax(-1, keepdim=True).clamp_min(1e-8) / FP8_MAX
    return (v / s).to(FP8_DTYPE).view(o, i), s


class Case:
    """The layers on one weight and one input."""

    def __init__(self, dim, out, tokens, device):
        gen = torch.Generator(device=device).manual_seed(0)
        w = torch.randn(out, dim, device=device, generator=gen) / dim**0.5
        x = torch.randn(tokens, dim, device=device, generator=gen).bfloat16()
        self.x, self.weight = x.requires_grad_(), w.bfloat16()
        self.device = device
        q16, s16 = quantise_neighbours(w)
        q, s = quantise_rows(self.weight)
        self.ours = Fp8Linear(q, s, None, compute_dtype=torch.bfloat16)
        self.fns = {
            "bf16": lambda: F.linear(self.x, self.weight),
            OTHERS: lambda: self.fp32(q16, s16),
            OURS: lambda: self.ours(self.x),
        }
        if device.startswith("cuda") and torch.cuda.get_device_capability() >= (8, 9):
            fast = Fp8Linear(q, s, None, compute_dtype=torch.bfloat16, use_fast=True)
            self.fns["Fp8Linear, fast"] = lambda: fast(self.x)

    def add_int8(self):
        for name, kind, fast in (
            ("int8", Int8Linear, False),
            ("int8 fast", Int8Linear, True),
            ("int8 fast, rotated", RotatedInt8Linear, True),
        ):
            settings = {"compute_dtype": torch.bfloat16, "use_fast": fast}
            layer = kind(*kind.quantise(self.weight), None, **settings)
            self.fns[name] = lambda layer=layer: layer(self.x)

    def fp32(self, q, s):
        with torch.autocast(self.device.split(":")[0], torch.bfloat16):
            full = (q.to(torch.float32).view(len(q), s.shape[1], -1) * s).view(q.shape)
            return F.linear(self.x, full).to(self.x.dtype)

    def errors(self):
        want = self.fns["bf16"]().float()
        return {n: f"rel. err {(f().float() - want).norm() / want.norm():.2e}" for n, f in self.fns.items()}

    @torch.no_grad()
    def forward(self, rounds):
        return C.interleave(self.fns, rounds, 1, self.device)

    def with_gradient(self, rounds):
        def both(f):
            self.x.grad = None
            f().sum().backward()

        return C.interleave({n: (lambda f=f: both(f)) for n, f in self.fns.items()}, rounds, 1, self.device)

    def kept_bytes(self):
        """Bytes per weight element that stay alive for the backward pass, the stored weight included."""
        kept = {}
        for n, f in self.fns.items():
            seen = {}

            def note(t):
                seen[t.untyped_storage().data_ptr()] = t
                return t

            with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
                f()
            size = sum(
                t.untyped_storage().nbytes() for t in seen.values() if t.numel() >= self.weight.numel()
            )
            kept[n] = size / self.weight.numel()
        return kept

    def scale_share(self):
        """Bytes of scales over bytes of weights."""
        size = lambda t: t.numel() * t.element_size()
        return size(self.ours.scale_weight) / size(self.ours.weight)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, default=4096)
    p.add_argument("--out", type=int)
    p.add_argument("--tokens", type=int, default=1024)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=7)
    p.add_argument("--compile", action="store_true")
    p.add_argument("--int8", action="store_true", help="the layers in int8 too")
    args = p.parse_args()
    case = Case(args.dim, args.out or args.dim, args.tokens, args.device)
    if args.int8:
        case.add_int8()
    if args.compile:
        case.fns |= {f"{n} (compiled)": torch.compile(f) for n, f in list(case.fns.items()) if n != "bf16"}
    head = f"{args.dim}->{args.out or args.dim}, {args.tokens} tokens, {args.device}"
    C.report(f"linear forward {head}", case.forward(args.rounds), OTHERS, case.errors())
    C.report(f"linear forward + input gradient {head}", case.with_gradient(args.rounds), OTHERS)
    kept = "; ".join(f"{n} {v:.0f}" for n, v in case.kept_bytes().items() if "compiled" not in n)
    print(f"\nbytes kept for backward per weight: {kept}")
    print(f"scales of Fp8Linear over its weights: {100 * case.scale_share():.3f} %")


if __name__ == "__main__":
    main()
