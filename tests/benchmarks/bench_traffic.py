"""Noise-free counts of one visual block's forward (and of a LoRA step): operators dispatched, bytes moved
by everything that is not a matrix product or attention, and host synchronisations.

    python bench_traffic.py --config lite2 --shape 5x32x32 [--step]

Counted below the autograd layer with a dispatch mode, from two depths of the same model, so that only
the blocks count. Bytes are inputs + outputs of each operator that touches memory (views are free), in
units of r = one bf16 tensor of tokens x dim. On a GPU this is the memory-bound time; eager and fused
implementations differ by it. A host synchronisation is an operator that hands a value to Python.
"""

import argparse
from dataclasses import replace

import adapters
import common as C
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

MATRIX = (
    "mm",
    "addmm",
    "bmm",
    "baddbmm",
    "mkldnn_linear",
    "linear",
    "_scaled_dot_product",
    "convolution",
    "_scaled_mm",
)
HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Counter(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.ops = self.bytes = self.host = 0
        self.by_op = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in HOST:
            self.host += 1
        outs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
        ins = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        ptrs = {t.untyped_storage().data_ptr() for t in ins}
        inplace = func._schema.is_mutable
        if not inplace and outs and all(t.untyped_storage().data_ptr() in ptrs for t in outs):
            return out  # a view
        if name in ("detach", "alias", "empty_like", "empty", "empty_strided", "new_empty"):
            return out
        self.ops += 1
        if not name.startswith(MATRIX):
            # an expanded operand is read once from memory: count distinct elements
            size = lambda t: min(t.numel() * t.element_size(), t.untyped_storage().nbytes())
            n = sum(map(size, ins)) + (0 if inplace else sum(map(size, outs)))
            self.bytes += n
            self.by_op[name] = self.by_op.get(name, 0) + n
        return out


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--config", default="lite2")
    p.add_argument("--shape", default="5x32x32")
    p.add_argument("--text", type=int, default=64)
    p.add_argument("--device", default="cpu")
    p.add_argument("--step", action="store_true", help="LoRA forward + backward with block checkpointing")
    p.add_argument("--only", nargs="*")
    p.add_argument("--top", type=int, default=6)
    args = p.parse_args()
    shape, dtype = C.parse_shape(args.shape), torch.bfloat16
    base = C.CONFIGS[args.config]
    n = C.tokens(shape, base)
    r = 2 * n * base.model_dim
    print(
        f"\n### per visual block, {'LoRA step (checkpointed)' if args.step else 'forward'}: {args.config} width, {n} tokens, bf16, {args.device}"
    )
    print(
        "| contestant | operators | elementwise traffic, r | host syncs (whole model) | largest, r |\n| --- | ---: | ---: | ---: | --- |"
    )
    for a in adapters.contestants(args.only):
        seen = []
        for blocks in (1, 2):
            cfg = replace(base, num_visual_blocks=blocks, num_text_blocks=1)
            model = a.make(cfg, C.make_weights(cfg, dtype, args.device), dtype, args.device)
            inp = C.make_inputs(cfg, shape, args.text, dtype, args.device)
            c = Counter()
            if args.step:
                a.attach_lora(model)
                a.checkpointing(model, True)
                with c:
                    F.mse_loss(a.forward(model, inp).float(), inp.target.float()).backward()
            else:
                with torch.no_grad(), c:
                    a.forward(model, inp)
            seen.append(c)
        one, two = seen
        diff = {k: (two.by_op[k] - one.by_op.get(k, 0)) / r for k in two.by_op}
        top = ", ".join(f"{k} {v:.0f}" for k, v in sorted(diff.items(), key=lambda kv: -kv[1])[: args.top])
        print(
            f"| {a.name} | {two.ops - one.ops} | {(two.bytes - one.bytes) / r:.0f} | {two.host} | {top} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
