"""Noise-free counts of one visual block's forward (and of a LoRA step): operators dispatched, bytes moved
by everything that is not a matrix product or attention, and host synchronisations.

    python bench_traffic.py --config lite2 --shape 5x32x32 [--step] [--held int8_fast --only ours]

Counted below the autograd layer with a dispatch mode, from two depths of the same model, so that only
the blocks count. Bytes are inputs + outputs of each operator that touches memory (views are free), in
units of r = one bf16 tensor of tokens x dim. On a GPU this is the memory-bound time; eager and fused
implementations differ by it. A host synchronisation is an operator that hands a value to Python.
"""

import argparse
from dataclasses import replace

import adapters
import bench_numerics
import common as C
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from networks.lora_kandinsky import is_target_name

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
    "_int_mm",
)
HOST = ("_local_scalar_dense", "nonzero", "is_nonzero", "equal")


class Counter(TorchDispatchMode):
    def __init__(self, own=()):
        super().__init__()
        self.own = own  # storages whose reading is no synchronisation
        self.ops = self.bytes = self.host = 0
        self.by_op = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[-1]
        if name in HOST and args[0].untyped_storage().data_ptr() not in self.own:
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


def hold(model, layer_class, use_fast):
    """Store the layers of this project's blocks in one byte per weight."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, torch.nn.Linear) and is_target_name(name):
            settings = {"compute_dtype": torch.bfloat16, "use_fast": use_fast}
            small = layer_class(*layer_class.quantise(layer.weight.data), layer.bias, **settings)
            model.set_submodule(name, small)


def count_blocks(a, args):
    """Counts of the second visual block: what a model with two has above one with one; and the whole model's."""
    dtype, base, shape = torch.bfloat16, C.CONFIGS[args.config], C.parse_shape(args.shape)
    r = 2 * C.tokens(shape, base) * base.model_dim
    seen = []
    for blocks in (1, 2):
        cfg = replace(base, num_visual_blocks=blocks, num_text_blocks=1)
        model = a.make(cfg, C.make_weights(cfg, dtype, args.device), dtype, args.device)
        if args.held:
            hold(model, *bench_numerics.KINDS[args.held])
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
    by_op = {k: (two.by_op[k] - one.by_op.get(k, 0)) / r for k in two.by_op}
    return {
        "operators": two.ops - one.ops,
        "r": (two.bytes - one.bytes) / r,
        "host": two.host,
        "by_op": dict(sorted(by_op.items(), key=lambda kv: -kv[1])),
    }


def count_host_reads(a, device="cpu", optimizer=torch.optim.AdamW):
    """Host synchronisations of forward, backward, gradient norm and optimizer step of a small model.

    An optimizer's own step counters lie in host memory and are read there: they do not count.
    """
    cfg, dtype = C.CONFIGS["tiny"], torch.bfloat16
    model = a.make(cfg, C.make_weights(cfg, dtype, device), dtype, device)
    params = a.attach_lora(model)
    a.checkpointing(model, True)
    inp = C.make_inputs(cfg, (2, 16, 16), 20, dtype, device)
    opt = optimizer(params, lr=1e-4)

    def gradients():
        F.mse_loss(a.forward(model, inp).float(), inp.target.float()).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)

    gradients()
    opt.step()  # the state now exists
    counters = {state["step"].untyped_storage().data_ptr() for state in opt.state.values()}
    opt.zero_grad()
    with Counter(own=counters) as c:
        gradients()
        opt.step()
    return c.host


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--config", default="lite2")
    p.add_argument("--shape", default="5x32x32")
    p.add_argument("--text", type=int, default=64)
    p.add_argument("--device", default="cpu")
    p.add_argument("--step", action="store_true", help="LoRA forward + backward with block checkpointing")
    p.add_argument("--held", choices=bench_numerics.KINDS, help="how the layers of `ours` are stored")
    p.add_argument("--only", nargs="*")
    p.add_argument("--top", type=int, default=6)
    args = p.parse_args()
    n = C.tokens(C.parse_shape(args.shape), C.CONFIGS[args.config])
    kind = "LoRA step (checkpointed)" if args.step else "forward"
    print(f"\n### per visual block, {kind}: {args.config} width, {n} tokens, bf16, {args.device}")
    print("| contestant | operators | elementwise traffic, r | host syncs (whole model) | largest, r |")
    print("| --- | ---: | ---: | ---: | --- |")
    for a in adapters.contestants(args.only):
        c = count_blocks(a, args)
        top = ", ".join(f"{k} {v:.0f}" for k, v in list(c["by_op"].items())[: args.top])
        print(f"| {a.name} | {c['operators']} | {c['r']:.0f} | {c['host']} | {top} |", flush=True)


if __name__ == "__main__":
    main()
