"""Ways to compute a LoRA linear: forward + backward time and bytes kept for backward.

  python bench_lora.py --dim 1792 --tokens 2048 --rank 16 [--device cuda]

base            frozen linear alone (the floor)
wrapper         base(x) + up(down(x)) * scale, float32 LoRA under autocast (the usual module)
ours            this project's LoRALinear
... x3          query, key and value from one input: three wrappers; three layers; `project`
"""

import argparse
import sys
from pathlib import Path

import common as C
import torch
import torch.nn.functional as F
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from modules.fused_ops import project
from networks.lora import inject


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dim", type=int, default=1792)
    p.add_argument("--tokens", type=int, default=2048)
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=7)
    args = p.parse_args()
    d, r, n, dev, bf = args.dim, args.rank, args.tokens, args.device, torch.bfloat16
    gen = torch.Generator(device=dev).manual_seed(0)
    mk = lambda *s: torch.randn(*s, device=dev, generator=gen).div_(s[-1] ** 0.5)
    x, grad = mk(n, d).to(bf).requires_grad_(), mk(n, d).to(bf)
    model = nn.ModuleDict({name: nn.Linear(d, d, device=dev, dtype=bf) for name in ("q", "k", "v")})
    bases = list(model.values())
    network = inject(model, list(model), rank=r, alpha=r / 2, seed=0).to(dev)
    for parameter in network.parameters():
        parameter.data = mk(*parameter.shape)
    down, up = (mk(*s).requires_grad_() for s in ((r, d), (d, r)))

    def wrapper(base):
        with torch.autocast(dev.split(":")[0], bf):
            return base(x) + F.linear(F.linear(x, down), up) * 0.5

    fns = {
        "base": lambda: bases[0](x),
        "wrapper": lambda: wrapper(bases[0]),
        "ours": lambda: model["q"](x),
        "base x3": lambda: sum(base(x) for base in bases),
        "wrapper x3": lambda: sum(wrapper(base) for base in bases),
        "ours x3": lambda: sum(layer(x) for layer in model.values()),
        "ours, project": lambda: sum(project(x, list(model.values()))),
    }

    def step(f):
        for t in (x, down, up, *network.parameters()):
            t.grad = None
        f().backward(grad)

    kept = {}
    for name, f in fns.items():
        seen = {}

        def note(t):
            seen[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            f()
        size = sum(t.untyped_storage().nbytes() for t in seen.values() if t.ndim > 1 and t.shape[0] == n)
        kept[name] = f"keeps {size / 2**20:.1f} MiB"
    times = C.interleave({k: (lambda f=f: step(f)) for k, f in fns.items()}, args.rounds, 1, dev)
    C.report(f"LoRA linear forward+backward {d}x{d}, rank {r}, {n} tokens, {dev}", times, "base", kept)


if __name__ == "__main__":
    main()
