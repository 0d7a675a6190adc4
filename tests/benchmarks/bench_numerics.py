"""How far rounded numbers lie from exact ones: the DiT, its norms and linear layers, and a training curve.

    python bench_numerics.py                              # all parts, as tables
    python bench_numerics.py --part dit --config lite2 --shape 5x16x16
    python bench_numerics.py --part training --steps 200 --plot curves.png

Exact is a run of the same formulas in float64. Errors are ||got - exact|| / ||exact||. Nothing here is timed.
"As on a GPU" is the code for devices whose layer norm takes one dtype only, run here.
"""

import argparse
import contextlib
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import adapters
import common as C
import torch
import torch.nn.functional as F
from diffusers.models.transformers import transformer_kandinsky
from matplotlib.figure import Figure

from kandinsky5.configs.train import TimestepConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model import layers as our_layers
from kandinsky5.model.checkpoints import load_dit
from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.model.flow_matching import draw_noise, flow_matching_loss
from kandinsky5.tasks import TINY_PARAMS
from kandinsky5.tiny_models import dit_tensors
from kandinsky5.training.loss.timesteps import draw_sigmas
from modules import fused_ops
from modules.fp8 import Fp8Linear
from modules.int8 import Int8Linear, RotatedInt8Linear
from modules.quantised_linear import dequantise
from modules.tensor_files import write_tensors
from networks.lora_kandinsky import create_network

CPU = torch.device("cpu")
PARTS = ("dit", "norm", "linear", "training")
KINDS = {
    "fp8": (Fp8Linear, False),
    "fp8_fast": (Fp8Linear, True),
    "int8": (Int8Linear, False),
    "int8_fast": (RotatedInt8Linear, True),
    "int8_fast, not rotated": (Int8Linear, True),
}
RUNS = {
    "float32": (torch.float32, {}),
    "bfloat16": (torch.bfloat16, {}),
    "fp8_base": (torch.bfloat16, {"fp8_base": True}),
    "int8_base": (torch.bfloat16, {"int8_base": True}),
    "fp8_fast": (torch.bfloat16, {"fp8_base": True, "fp8_fast": True}),
    "int8_fast": (torch.bfloat16, {"int8_base": True, "int8_fast": True}),
    "int8_fast, not rotated": (
        torch.bfloat16,
        {"int8_base": True, "int8_fast": True, "no_int8_rotation": True},
    ),
    "nf4_base": (torch.bfloat16, {"nf4_base": True}),
}
COLOURS = dict(
    zip(RUNS, ["#000000", "#787878", "#1f77b4", "#d62728", "#17becf", "#ff7f0e", "#9467bd", "#2ca02c"])
)


def parse():
    p = argparse.ArgumentParser()
    p.add_argument("--part", choices=PARTS, nargs="*", default=PARTS)
    p.add_argument("--config", default="lite2", choices=C.CONFIGS, help="of the part dit")
    p.add_argument("--shape", default="5x16x16", help="latent of the part dit")
    p.add_argument("--text", type=int, default=64)
    p.add_argument("--inputs", type=int, default=4, help="of the part dit, each with its own noise level")
    p.add_argument("--tokens", type=int, default=256, help="of the parts norm and linear")
    p.add_argument(
        "--models", nargs="*", default=["lite", "pro"], choices=("lite", "pro"), help="of the part linear"
    )
    p.add_argument(
        "--rows", type=int, default=1 << 20, help="of the part linear: outputs taken of each layer"
    )
    p.add_argument("--steps", type=int, default=200, help="of the part training")
    p.add_argument("--runs", nargs="*", choices=RUNS, default=list(RUNS))
    p.add_argument("--plot", type=Path, metavar="PNG", help="draw the losses of the part training")
    return p.parse_args()


def error(got, exact):
    """Relative, over all elements; computed in float64."""
    return float((got.double() - exact).norm() / exact.norm())


def table(title, columns, rows):
    print(f"\n### {title}\n| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for row in rows:
        print(f"| {' | '.join(str(cell) for cell in row)} |", flush=True)


# ---- the DiT -----------------------------------------------------------------------------------


class TorchWithDtypes:
    """Stands in for torch inside a module, with some dtypes exchanged."""

    def __init__(self, **dtypes):
        self._dtypes = dtypes

    def __getattr__(self, name):
        return self._dtypes.get(name, getattr(torch, name))


@contextlib.contextmanager
def exchanged(modules, wide_float=None, **dtypes):
    """Within the block the modules' own dtypes are others, and `tensor.float()` gives `wide_float`."""
    plain_float, default = torch.Tensor.float, torch.get_default_dtype()
    fused_ops._constants.cache_clear()
    for module in modules:
        module.torch = TorchWithDtypes(**dtypes)
    if wide_float is not None:
        torch.Tensor.float = lambda tensor: tensor.to(wide_float)
        torch.set_default_dtype(wide_float)
    try:
        yield
    finally:
        torch.Tensor.float = plain_float
        torch.set_default_dtype(default)
        fused_ops._constants.cache_clear()
        for module in modules:
            module.torch = torch


def in_float64():
    """What either implementation does in a fixed dtype, it does in float64."""
    modules = (our_layers, fused_ops, transformer_kandinsky)
    return exchanged(modules, torch.float64, float32=torch.float64, bfloat16=torch.float64)


@contextlib.contextmanager
def as_on_gpu():
    """Within the block narrow activations are normed as on a GPU."""
    plain = fused_ops.kernel_rounds_once
    fused_ops.kernel_rounds_once = lambda x: x.dtype == torch.float32
    try:
        yield
    finally:
        fused_ops.kernel_rounds_once = plain


def run_dit(adapter, cfg, weights, several_inputs, dtype):
    """Velocities [inputs, ...]; weights as they are given."""
    model = adapter.make(cfg, weights, dtype)
    for module in model.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = torch.finfo(torch.float32).eps  # else it follows the dtype of the run
    velocities = []
    for inputs in several_inputs:
        given = {name: getattr(inputs, name).to(dtype) for name in ("x", "text", "pooled")}
        time = inputs.time.to(torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            velocities.append(adapter.forward(model, replace(inputs, **given, time=time)))
    return torch.stack(velocities)


def bench_dit(args):
    cfg, shape = C.CONFIGS[args.config], C.parse_shape(args.shape)
    ours, theirs = adapters.Ours(), adapters.Diffusers()
    # Numbers that every dtype holds, at several noise levels.
    inputs = [C.make_inputs(cfg, shape, args.text, torch.bfloat16, seed=i) for i in range(args.inputs)]
    inputs = [
        replace(each, time=torch.tensor([1000 * (i + 0.5) / args.inputs])) for i, each in enumerate(inputs)
    ]
    rows = []
    for stored in (torch.float32, torch.bfloat16):
        weights = C.make_weights(cfg, stored)
        wide = {name: tensor.double() for name, tensor in weights.items()}
        with in_float64():
            exact = run_dit(ours, cfg, wide, inputs, torch.float64)
            check = run_dit(theirs, cfg, wide, inputs, torch.float64)
        del wide
        runs = {"ours": run_dit(ours, cfg, weights, inputs, stored)}
        runs["diffusers"] = run_dit(theirs, cfg, weights, inputs, stored)
        if stored == torch.bfloat16:
            with as_on_gpu():
                runs["ours, norms as on a GPU"] = run_dit(ours, cfg, weights, inputs, stored)
        if stored == torch.float32:
            with exchanged((transformer_kandinsky,), bfloat16=torch.float32):
                runs["diffusers, rotated queries and keys left in float32"] = run_dit(
                    theirs, cfg, weights, inputs, stored
                )
        name = str(stored).removeprefix("torch.")
        for who, out in runs.items():
            each = [error(got, want) for got, want in zip(out, exact)]
            rows.append((name, who, f"{error(out, exact):.2e}", f"{min(each):.2e} to {max(each):.2e}"))
        rows.append(("float64", f"diffusers to ours, {name} weights", f"{error(check, exact):.1e}", ""))
    head = (
        f"{args.config} {args.shape} ({C.tokens(shape, cfg)} tokens, {args.text} text), {args.inputs} inputs"
    )
    table(f"velocity of the DiT: {head}", ("computed in", "by", "error", "of single inputs"), rows)


# ---- one modulated norm ------------------------------------------------------------------------


def bench_norm(args):
    width = C.LITE.model_dim
    gen = torch.Generator().manual_seed(0)
    x, grad = torch.randn(2, 1, args.tokens, width, generator=gen).bfloat16()
    scale, shift = torch.randn(2, 1, width, generator=gen) * 0.5
    with in_float64():
        exact = norm_results(x.double(), 1 + scale.double(), shift.double(), grad.double())
    narrow = [values.bfloat16() for values in (1 + scale, shift)]
    paths = {
        "weights rounded to bfloat16 first": (contextlib.nullcontext, *narrow),
        "as on a GPU: float32 in chunks": (as_on_gpu, 1 + scale, shift),
        "as on a CPU: torch's kernel for float32 weights": (contextlib.nullcontext, 1 + scale, shift),
    }
    rows = []
    for name, (path, *weights) in paths.items():
        with path():
            results = norm_results(x, *weights, grad)
        means = [value.double().mean(dim=1) for value in (results[0], exact[0])]
        found = (error(results[0], exact[0]), error(*means), error(results[1], exact[1]))
        rows.append((name, *(f"{value:.2e}" for value in found)))
    columns = ("computed by", "output", "means of channels", "input gradient")
    table(f"error of one modulated norm, width {width}, {args.tokens} bfloat16 tokens", columns, rows)


def norm_results(x, weight, bias, grad):
    """Value and input gradient."""
    x = x.clone().requires_grad_()
    value = fused_ops.modulated_layer_norm(x, weight, bias)
    value.backward(grad)
    return value.detach(), x.grad


# ---- one linear layer --------------------------------------------------------------------------


def layer_sizes(model):
    """[out, in] of the layers in the blocks."""
    return (
        (model.model_dim, model.model_dim),
        (model.ff_dim, model.model_dim),
        (model.model_dim, model.ff_dim),
    )


def with_loud_channels(x):
    """The input as it is; one channel in 64 at 20 times, as in trained transformers; one channel at 100 times."""
    many, one = x.clone(), x.clone()
    many[:, ::64] *= 20
    one[:, 5] *= 100
    return x, many, one


def bench_linear(args):
    rows = []
    for out_features, in_features in (size for name in args.models for size in layer_sizes(C.CONFIGS[name])):
        gen = torch.Generator().manual_seed(0)
        rows_taken = min(out_features, args.rows)
        weight = torch.randn(rows_taken, in_features, generator=gen).bfloat16()
        inputs = with_loud_channels(torch.randn(args.tokens, in_features, generator=gen).bfloat16())
        grad = torch.randn(args.tokens, rows_taken, generator=gen).bfloat16()
        name = f"{in_features} -> {out_features}"
        exact = [v.double() @ weight.double().t() for v in inputs]
        exact_grad = grad.double() @ weight.double()
        plain = [error(F.linear(v, weight), e) for v, e in zip(inputs, exact)]
        cells = [f"{value:.2e}" for value in (*plain, error(grad @ weight, exact_grad))]
        rows.append((name, "bfloat16", "0", *cells, "2"))
        for kind, (layer_class, use_fast) in KINDS.items():
            weight8, scale = layer_class.quantise(weight)
            layer = layer_class(weight8, scale, None, compute_dtype=torch.bfloat16, use_fast=use_fast)
            assert layer.use_fast == use_fast
            found = [error(dequantise(weight8, scale, torch.float32, layer.rotation), weight.double())]
            found += [error(layer(v), e) for v, e in zip(inputs, exact)]
            x = inputs[0].clone().requires_grad_()
            layer(x).backward(grad)
            found.append(error(x.grad, exact_grad))
            held = sum(p.numel() * p.element_size() for p in layer.parameters()) / weight.numel()
            rows.append((name, kind, *(f"{value:.2e}" for value in found), f"{held:.4f}"))
        print(f"# {name}: done", file=sys.stderr, flush=True)
    columns = (
        "layer",
        "held as",
        "weight",
        "output",
        "1 in 64 at 20x",
        "one at 100x",
        "input gradient",
        "bytes a weight",
    )
    table(
        f"error of one linear layer, normal weights, bfloat16 activations, {args.tokens} tokens",
        columns,
        rows,
    )


# ---- training ----------------------------------------------------------------------------------

NUM_CLIPS, BATCH, SHAPE, SEED = 16, 4, (16, 3, 8, 8), 1


def make_clips():
    """Latents [NUM_CLIPS, 16, F, H, W] of a few smooth waves each, so that there is something to learn."""
    gen = torch.Generator().manual_seed(SEED)
    axes = torch.meshgrid(*(torch.linspace(0, 1, size) for size in SHAPE[1:]), indexing="ij")
    clips = torch.zeros(NUM_CLIPS, *SHAPE)
    for _ in range(3):
        waves = torch.randn(NUM_CLIPS, SHAPE[0], 4, generator=gen)
        phase = sum(waves[..., i, None, None, None] * axis * 4 for i, axis in enumerate(axes))
        clips += torch.cos(phase + 3 * waves[..., 3, None, None, None])
    clips /= clips.std()
    captions = [
        TextConditioning(
            torch.randn(6, TINY_PARAMS.in_text_dim, generator=gen),
            torch.randn(TINY_PARAMS.in_text_dim2, generator=gen),
        )
        for _ in range(NUM_CLIPS)
    ]
    return clips, captions


def train_once(path, dtype, held, steps):
    """Losses of every step, and the loss on fixed noise before and after."""
    dit = load_dit(path, TINY_PARAMS, WeightsConfig(**held), device=CPU, compute_dtype=dtype)
    network = create_network(
        dit, network_dim=16, network_alpha=16, network_dropout=None, network_args={}, seed=SEED
    )
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=0.0)
    clips, captions = make_clips()
    timesteps = TimestepConfig(timestep_sampling="shift", discrete_flow_shift=5.0)
    model = VelocityModel(dit, (1.0, 2.0, 2.0))

    def loss(numbers, step):
        text = pad_text([captions[i] for i in numbers], device=CPU, dtype=dtype)
        keys = [f"clip{i}" for i in numbers]
        sigma = draw_sigmas(timesteps, SEED, step, keys, SHAPE[2:], None)
        noise = draw_noise(SEED, step, keys, SHAPE)
        return flow_matching_loss(lambda noisy, s: model(noisy, s, text), clips[numbers], noise, sigma).mean()

    @torch.no_grad()
    def validate():
        """Over all clips, with the noise and levels of steps that training does not reach."""
        return sum(float(loss(list(range(NUM_CLIPS)), 10**6 + i)) for i in range(4)) / 4

    before, losses = validate(), []
    for step in range(steps):
        order = torch.randperm(
            NUM_CLIPS, generator=torch.Generator().manual_seed(step // (NUM_CLIPS // BATCH))
        )
        start = step % (NUM_CLIPS // BATCH) * BATCH
        optimizer.zero_grad()
        value = loss(order[start : start + BATCH].tolist(), step)
        value.backward()
        torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        losses.append(value.item())
    return losses, before, validate()


def bench_training(args):
    curves, rows = {}, []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tiny.safetensors"
        write_tensors(path, dit_tensors(TINY_PARAMS))
        for name in args.runs:
            dtype, held = RUNS[name]
            losses, before, after = train_once(path, dtype, held, args.steps)
            curves[name] = losses
            first = curves[args.runs[0]]
            apart = sum(abs(a - b) for a, b in zip(losses, first)) / len(losses)
            last = losses[-20:]
            rows.append((
                name, f"{before:.4f}", f"{after:.4f}", f"{sum(losses[:20]) / len(losses[:20]):.4f}",
                f"{sum(last) / len(last):.4f}", f"{apart:.4f}",
            ))  # fmt: skip
            print(f"# {name}: done", file=sys.stderr, flush=True)
    columns = (
        "weights and products", "fixed noise, before", "after", "first 20 steps", "last 20 steps",
        f"mean distance of a step to {args.runs[0]}",
    )  # fmt: skip
    table(f"{args.steps} LoRA steps of the tiny DiT, rank 16, the same draws in every run", columns, rows)
    if args.plot:
        draw(curves, args.plot)


def draw(curves, path):
    """The losses and, because they coincide, their distance to the first run; means of 10 steps each."""
    means = {
        name: [sum(part) / len(part) for part in (losses[i : i + 10] for i in range(0, len(losses), 10))]
        for name, losses in curves.items()
    }
    first = next(iter(means))
    apart = {
        name: [a - b for a, b in zip(values, means[first])] for name, values in means.items() if name != first
    }
    figure = Figure(figsize=(9, 6), dpi=100, layout="constrained")
    panels = (("loss", means), (f"less {first}", apart))
    for axes, (title, lines) in zip(figure.subplots(len(panels)), panels):
        for name, values in lines.items():
            axes.plot([10 * i + 5 for i in range(len(values))], values, color=COLOURS[name], label=name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.legend()
    figure.savefig(path)
    print(f"\nwrote {path}")


def main():
    args = parse()
    print(
        f"# torch {torch.__version__}, {torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    )
    for part in args.part:
        {"dit": bench_dit, "norm": bench_norm, "linear": bench_linear, "training": bench_training}[part](args)


if __name__ == "__main__":
    main()
