"""DiT side by side on the same weights: forward, LoRA training step, peak memory, agreement.

    python bench_dit.py --config lite2 --shape 5x32x32 --text 256 --dtype bf16 --rounds 5
    python bench_dit.py --config lite --shape 31x64x96 --dtype bf16 --device cuda      # on a GPU

The reference is diffusers (change with --ref). Add --memory for one process per contestant with its
peak memory.
"""

import argparse
import json
import subprocess
import sys

import adapters
import common as C
import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--config", default="lite2", choices=C.CONFIGS)
    p.add_argument("--shape", default="5x32x32")
    p.add_argument("--text", type=int, default=256)
    p.add_argument("--dtype", default="bf16", choices=DTYPES)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--warmup", type=int, default=1)
    p.add_argument("--ref", default="diffusers")
    p.add_argument("--only", nargs="*", help="contestants to run (default: all that are available)")
    p.add_argument("--what", nargs="*", default=["forward", "step", "step_ckpt"])
    p.add_argument("--rank", type=int, default=16)
    p.add_argument("--compile", action="store_true", help="torch.compile every contestant's blocks")
    p.add_argument("--memory", action="store_true")
    p.add_argument("--child", help=argparse.SUPPRESS)
    return p.parse_args()


def lora_step(adapter, model, params, inp):
    for p in params:
        p.grad = None
    loss = F.mse_loss(adapter.forward(model, inp).float(), inp.target.float())
    loss.backward()
    return loss


class Floor:
    """Only the block matrix products and attentions of the model, on buffers made beforehand: what no
    implementation of the same arithmetic in the same dtype can beat on this machine with this torch."""

    def __init__(self, cfg, weights, n, text, dtype, device):
        self.cfg, self.w, self.n, self.text = cfg, weights, n, text
        mk = lambda rows, cols: torch.randn(rows, cols, device=device).to(dtype)
        d, f = cfg.model_dim, cfg.ff_dim
        self.x, self.h = {n: mk(n, d), text: mk(text, d)}, {n: mk(n, f), text: mk(text, f)}
        heads = lambda rows: torch.randn(1, d // cfg.head_dim, rows, cfg.head_dim, device=device).to(dtype)
        self.q = {n: heads(n), text: heads(text)}

    def parts(self):
        cfg, n, t = self.cfg, self.n, self.text
        for i in range(cfg.num_text_blocks):
            yield f"text_transformer_blocks.{i}.", t, False
        for i in range(cfg.num_visual_blocks):
            yield f"visual_transformer_blocks.{i}.", n, True

    def run(self, linear, attention):
        for b, rows, cross in self.parts():
            for s in ("self_attention", "cross_attention")[: 1 + cross]:
                for part in ("to_query", "to_key", "to_value", "out_layer"):
                    on_text = s == "cross_attention" and part in ("to_key", "to_value")
                    linear(self.x[self.text if on_text else rows], self.w[f"{b}{s}.{part}.weight"])
                attention(self.q[rows], self.q[self.text if s == "cross_attention" else rows])
            linear(self.x[rows], self.w[b + "feed_forward.in_layer.weight"])
            linear(self.h[rows], self.w[b + "feed_forward.out_layer.weight"])

    @torch.no_grad()
    def forward(self):
        self.run(F.linear, lambda q, k: F.scaled_dot_product_attention(q, k, k))

    def step(self, passes):
        """passes: forward passes per step (1, or 2 with checkpointing); one input-gradient pass."""

        def linear(x, w):
            with torch.no_grad():
                for _ in range(passes):
                    y = F.linear(x, w)
                y @ w

        def attention(q, k):
            q, k, v = (t.detach().requires_grad_() for t in (q, k, k))
            with torch.no_grad():
                for _ in range(passes - 1):
                    F.scaled_dot_product_attention(q, k, v)
            o = F.scaled_dot_product_attention(q, k, v)
            o.backward(q.detach())

        self.run(linear, attention)


def compile_blocks(model):
    for blocks in (model.text_transformer_blocks, model.visual_transformer_blocks):
        for b in blocks:
            b.compile()


def child(args):
    """One contestant alone in this process: peak memory of load, forward and step."""
    cfg, dtype = C.CONFIGS[args.config], DTYPES[args.dtype]
    a = adapters.contestants([args.child])[0]
    weights = C.make_weights(cfg, dtype, args.device)
    inp = C.make_inputs(cfg, C.parse_shape(args.shape), args.text, dtype, args.device)
    model = a.make(cfg, weights, dtype, args.device)
    del weights
    res, base = {}, C.rss_mib() if args.device == "cpu" else torch.cuda.memory_allocated() / 2**20
    C.reset_peak(args.device)
    with torch.no_grad():
        a.forward(model, inp)
    C.sync(args.device)
    res["forward"] = C.peak_mib(args.device) - base
    params = a.attach_lora(model, args.rank)
    for ckpt in (True, False):
        if not a.checkpointing(model, ckpt):
            continue
        C.reset_peak(args.device)
        lora_step(a, model, params, inp)
        C.sync(args.device)
        res["step_ckpt" if ckpt else "step"] = C.peak_mib(args.device) - base
    print("RESULT " + json.dumps({"base": base, **res}))


def main():
    args = parse()
    if args.child:
        return child(args)
    cfg, dtype, shape = C.CONFIGS[args.config], DTYPES[args.dtype], C.parse_shape(args.shape)
    head = f"{args.config} {args.shape} ({C.tokens(shape, cfg)} tokens, {args.text} text) {args.dtype} {args.device}"
    team = adapters.contestants(args.only)

    if args.memory:
        print(f"\n### peak memory above the loaded weights, MiB: {head}")
        print(
            "| contestant | loaded | forward | step, checkpointed | step, plain |\n| --- | ---: | ---: | ---: | ---: |"
        )
        for a in team:
            argv = [x for x in sys.argv if x != "--memory"] + ["--child", a.name]
            out = subprocess.run([sys.executable, *argv], capture_output=True, text=True)
            line = [x for x in out.stdout.splitlines() if x.startswith("RESULT ")]
            if not line:
                print(f"| {a.name} | failed: {out.stderr.strip().splitlines()[-1:]} | | | |")
                continue
            r = json.loads(line[0][7:])
            cell = lambda k: f"{r[k]:.0f}" if k in r else "-"
            print(
                f"| {a.name} | {cell('base')} | {cell('forward')} | {cell('step_ckpt')} | {cell('step')} |",
                flush=True,
            )
        return None

    weights = C.make_weights(cfg, dtype, args.device)
    inp = C.make_inputs(cfg, shape, args.text, dtype, args.device)
    models = {a.name: a.make(cfg, weights, dtype, args.device) for a in team}
    by_name = {a.name: a for a in team}
    if args.compile:
        for m in models.values():
            compile_blocks(m)

    with torch.no_grad():
        outs = {n: by_name[n].forward(m, inp).float() for n, m in models.items()}
    ref = args.ref if args.ref in models else next(iter(models))
    agree = {n: f"rel. diff {(o - outs[ref]).norm() / outs[ref].norm():.2e}" for n, o in outs.items()}

    @torch.no_grad()
    def fwd(name):
        by_name[name].forward(models[name], inp)

    floor = Floor(cfg, weights, C.tokens(shape, cfg), args.text, dtype, args.device)
    if "forward" in args.what:
        fns = {n: (lambda n=n: fwd(n)) for n in models} | {"matmul + attention floor": floor.forward}
        times = C.interleave(fns, args.rounds, args.warmup, args.device)
        C.report("forward: " + head, times, ref, agree)

    params = {n: by_name[n].attach_lora(m, args.rank) for n, m in models.items()}
    for kind in ("step", "step_ckpt"):
        if kind not in args.what:
            continue
        names = [
            n for n, m in models.items() if by_name[n].checkpointing(m, kind == "step_ckpt") or kind == "step"
        ]
        fns = {n: (lambda n=n: lora_step(by_name[n], models[n], params[n], inp)) for n in names}
        fns["matmul + attention floor"] = lambda: floor.step(2 if kind == "step_ckpt" else 1)
        times = C.interleave(fns, args.rounds, args.warmup, args.device)
        C.report(
            f"LoRA forward+backward ({'block checkpointing' if kind == 'step_ckpt' else 'no checkpointing'}): "
            + head,
            times,
            ref,
        )


if __name__ == "__main__":
    main()
