"""DiT side by side on the same weights: forward, LoRA training step, peak memory, agreement.

    python bench_dit.py --config lite2 --shape 5x32x32 --text 256 --dtype bf16 --rounds 5
    python bench_dit.py --config lite --shape 31x64x96 --dtype bf16 --device cuda      # on a GPU

The reference is diffusers (change with --ref). Add --memory for one process per contestant with its
peak memory.
"""

import argparse
from pathlib import Path

import adapters
import common as C
import torch
import torch.nn.functional as F

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def parse(argv=None):
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
    return p.parse_args(argv)


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
    """One contestant alone in this process: peak memory of forward and step above the loaded weights."""
    cfg, dtype, device = C.CONFIGS[args.config], DTYPES[args.dtype], args.device
    a = adapters.contestants([args.child])[0]
    inp = C.make_inputs(cfg, C.parse_shape(args.shape), args.text, dtype, device)
    model = a.make(cfg, C.make_weights(cfg, dtype, device), dtype, device)
    params = a.attach_lora(model, args.rank)
    small = C.make_inputs(cfg, (1, 2, 2), 4, dtype, device)
    a.checkpointing(model, False)
    lora_step(a, model, params, small)  # libraries set themselves up
    for p in params:
        p.grad = None
    base = C.rss_mib() if device == "cpu" else torch.cuda.memory_allocated() / 2**20
    result = {"base": base}

    def measure(name, run):
        C.trim()
        C.reset_peak(device)
        run()
        C.sync(device)
        result[name] = C.peak_mib(device) - base
        for p in params:
            p.grad = None

    @torch.no_grad()
    def forward():
        a.forward(model, inp)

    measure("forward", forward)
    for name, on in (("step_ckpt", True), ("step", False)):
        a.checkpointing(model, on)
        measure(name, lambda: lora_step(a, model, params, inp))
    C.tell(result)


def memory(args, name):
    """Peak memory of one contestant, MiB, measured in a process of its own."""
    words = ["--config", args.config, "--shape", args.shape, "--text", args.text, "--dtype", args.dtype]
    words += ["--device", args.device, "--rank", args.rank, "--child", name]
    return C.run_alone([Path(__file__), *words], **C.EXACT_MEMORY)


FLOOR = "matmul + attention floor"


class Team:
    """All contestants on the same weights and inputs."""

    def __init__(self, args, team):
        self.args, self.by_name = args, {a.name: a for a in team}
        cfg, dtype, device = C.CONFIGS[args.config], DTYPES[args.dtype], args.device
        shape = C.parse_shape(args.shape)
        weights = C.make_weights(cfg, dtype, device)
        self.inp = C.make_inputs(cfg, shape, args.text, dtype, device)
        self.models = {a.name: a.make(cfg, weights, dtype, device) for a in team}
        if args.compile:
            for m in self.models.values():
                compile_blocks(m)
        self.ref = args.ref if args.ref in self.models else next(iter(self.models))
        self.floor = Floor(cfg, weights, C.tokens(shape, cfg), args.text, dtype, device)
        self.params = None

    @torch.no_grad()
    def predict(self, name):
        return self.by_name[name].forward(self.models[name], self.inp)

    def agreement(self):
        """How far each contestant's output is from the reference's; before LoRAs are attached."""
        outs = {n: self.predict(n).float() for n in self.models}
        want = outs[self.ref]
        return {n: f"rel. diff {(o - want).norm() / want.norm():.2e}" for n, o in outs.items()}

    def forward(self):
        fns = {n: (lambda n=n: self.predict(n)) for n in self.models} | {FLOOR: self.floor.forward}
        return C.interleave(fns, self.args.rounds, self.args.warmup, self.args.device)

    def step(self, kind):
        """Times of a LoRA step; kind is "step" or "step_ckpt"."""
        is_checkpointed = kind == "step_ckpt"
        if self.params is None:
            self.params = {n: self.by_name[n].attach_lora(m, self.args.rank) for n, m in self.models.items()}
        fns = {}
        for n, m in self.models.items():
            if self.by_name[n].checkpointing(m, is_checkpointed) or not is_checkpointed:
                fns[n] = lambda n=n: lora_step(self.by_name[n], self.models[n], self.params[n], self.inp)
        fns[FLOOR] = lambda: self.floor.step(2 if is_checkpointed else 1)
        return C.interleave(fns, self.args.rounds, self.args.warmup, self.args.device)


def main():
    args = parse()
    if args.child:
        return child(args)
    cfg, shape = C.CONFIGS[args.config], C.parse_shape(args.shape)
    head = f"{args.config} {args.shape} ({C.tokens(shape, cfg)} tokens, {args.text} text) {args.dtype} {args.device}"
    team = adapters.contestants(args.only)

    if args.memory:
        print(f"\n### peak memory above the loaded weights, MiB: {head}")
        print(
            "| contestant | loaded | forward | step, checkpointed | step, plain |\n| --- | ---: | ---: | ---: | ---: |"
        )
        for a in team:
            r = memory(args, a.name)
            print(
                f"| {a.name} | {r['base']:.0f} | {r['forward']:.0f} | {r['step_ckpt']:.0f} | {r['step']:.0f} |",
                flush=True,
            )
        return None

    team = Team(args, team)
    if "forward" in args.what:
        C.report("forward: " + head, team.forward(), team.ref, team.agreement())
    for kind, title in (("step", "no checkpointing"), ("step_ckpt", "block checkpointing")):
        if kind in args.what:
            C.report(f"LoRA forward+backward ({title}): {head}", team.step(kind), team.ref)


if __name__ == "__main__":
    main()
