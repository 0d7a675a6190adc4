"""The GPU goals G1 to G9 on random weights of Pro's and Lite's sizes. Written without a GPU and not run on one yet.

    python bench_gpu.py [--only G1 G8 ...] [--rounds 5]
    python bench_gpu.py --rehearse          # every case at tiny size on the CPU: shows that the script runs

Each case is a process of its own. Where a goal is about memory the process may use no more than a card of 24,
16 or 12 GB leaves free (22.5, 14.5, 10.5 GiB), by torch.cuda.set_per_process_memory_fraction: a case that does
not fit ends with 'out of memory', which is its result. Times are CUDA events, medians over rounds after two
warm-up steps; the floor is bench_dit's: only the matrix products and attentions.
"""

import argparse
import ast
import statistics
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import common as C
import torch
from bench_dit import Floor
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kandinsky5.model.assembly import OFFLOADED_BYTES
from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.model.conditioning import TextBatch, VelocityModel
from kandinsky5.model.offload import host_placement, stream_weights
from kandinsky5.tasks import LITE_PARAMS, PRO_PARAMS, TINY_PARAMS
from modules.activation_offload import ActivationOffload, tensor_mover
from modules.fp8 import Fp8Linear, quantise_rows
from networks.lora_kandinsky import create_network, is_target_name

MODELS = {"pro": PRO_PARAMS, "lite": LITE_PARAMS, "tiny": TINY_PARAMS}
SHORT, SHORT_HD, LONG = (5, 64, 64), (5, 96, 96), (31, 64, 96)
"""Latent sizes: 17 frames at 512x512 and at 768x768 (11.5k tokens), 121 at 512x768."""
TEXT_TOKENS = 256
CARDS = {24: 22.5, 16: 14.5, 12: 10.5}
"""GB of a card: GiB of it that a process may use here."""


@dataclass(frozen=True)
class Case:
    """One measurement: a model, a clip, a way to keep memory, and what is run."""

    model: str = "pro"
    shape: tuple = SHORT
    blocks: int | None = None
    what: str = "step"
    fp8: str | None = None
    swap: int = 0
    kept_attention: bool = False
    offload: bool = False
    rank: int = 16
    cap_gib: float | None = None


def fill(dit, case, place):
    """Random weights where the model's own loading would put them, float8 where it would make them so."""
    for name, layer in list(dit.named_modules()):
        for key, parameter in list(layer.named_parameters(recurse=False)):
            device = place(f"{name}.{key}")
            values = torch.full(parameter.shape, 1.0 if "norm" in name and key == "weight" else 0.0)
            if parameter.ndim == 2:
                values = torch.randn(parameter.shape, device=device) * (0.5 / parameter.shape[1] ** 0.5)
            setattr(layer, key, nn.Parameter(values.to(device, torch.bfloat16), requires_grad=False))
        if case.fp8 and is_target_name(name):
            weight, scale = quantise_rows(layer.weight)
            use_fast = case.fp8 == "fast"
            small = Fp8Linear(weight, scale, layer.bias, compute_dtype=torch.bfloat16, use_fast=use_fast)
            dit.set_submodule(name, small)


def build(case, device):
    params = MODELS[case.model]
    if case.blocks:
        params = replace(params, num_visual_blocks=case.blocks, num_text_blocks=1)
    dit = build_meta_dit(params, torch.bfloat16)
    on_host = bool(case.fp8 or case.swap)
    fill(dit, case, host_placement(params, device, blocks_to_swap=case.swap, modulation_on_host=on_host))
    dit.reset_buffers(device)
    dit.requires_grad_(False)
    dit.gradient_checkpointing = True
    dit.kept_attention_blocks = params.num_visual_blocks if case.kept_attention else 0
    if case.offload:
        dit.activation_offload = ActivationOffload(tensor_mover(device), min_bytes=OFFLOADED_BYTES)
    network = create_network(
        dit, network_dim=case.rank, network_alpha=case.rank, network_dropout=None, network_args={}, seed=0
    ).to(device)
    if case.swap or on_host:
        stream_weights(dit, case.swap, device)
    return dit, network


def runner(case, device):
    """What is timed, as a function."""
    dit, network = build(case, device)
    params, gen = dit.dit_params, torch.Generator(device=device).manual_seed(0)
    noisy = torch.randn(1, params.in_visual_dim, *case.shape, device=device, generator=gen)
    embeds = torch.randn(1, TEXT_TOKENS, params.in_text_dim, device=device, generator=gen).bfloat16()
    pooled = torch.randn(1, params.in_text_dim2, device=device, generator=gen).bfloat16()
    text, sigma = TextBatch(embeds, pooled, None), torch.tensor([0.5], device=device)
    model = VelocityModel(dit, (1.0, 2.0, 2.0))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-5)

    @torch.no_grad()
    def forward():
        model(noisy, sigma, text)

    def step():
        model(noisy, sigma, text).float().square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    return forward if case.what == "forward" else step


def floor_runner(case, device):
    """The floor of the same case."""
    p = MODELS[case.model]
    cfg = C.DitConfig(
        p.model_dim, p.ff_dim, p.time_dim, p.axes_dims, 1, case.blocks or p.num_visual_blocks,
        in_text_dim=p.in_text_dim, in_text_dim2=p.in_text_dim2,
    )  # fmt: skip
    weights = C.make_weights(cfg, torch.bfloat16, device)
    floor = Floor(cfg, weights, C.tokens(case.shape, cfg), TEXT_TOKENS, torch.bfloat16, device)
    return floor.forward if case.what == "forward" else lambda: floor.step(2)


def child(case, rounds, device):
    is_cuda = device.type == "cuda"
    try:
        if is_cuda and case.cap_gib:
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, case.cap_gib * 2**30 / total), device)
        fns = {"ours": runner(case, device)}
        if case.blocks:
            fns["floor"] = floor_runner(case, device)
        for fn in fns.values():
            fn()
        C.reset_peak(str(device))
        times = C.interleave(fns, rounds, 1, str(device))
    except torch.OutOfMemoryError as error:
        return C.tell({"failed": f"out of memory: {str(error).splitlines()[0]}"})
    medians = {name: statistics.median(values) for name, values in times.items()}
    peak = torch.cuda.max_memory_reserved(device) / 2**30 if is_cuda else 0.0
    return C.tell({"seconds": medians, "peak": peak})


G = {
    "G1": [("Pro 121f 512x768 forward, to the floor", 1.40, Case(shape=LONG, blocks=4, what="forward"), "floor")],
    "G2": [
        ("the same, LoRA step, to the floor", 1.45, Case(shape=LONG, blocks=4), "floor"),
        ("attention kept, to not kept", 0.87, Case(shape=LONG, blocks=4, kept_attention=True), Case(shape=LONG, blocks=4)),
    ],
    "G3": [("Pro 17f 512x512 LoRA step, to the floor", 1.35, Case(blocks=4), "floor")],
    "G4": [
        ("Lite 17f 512x512 LoRA step, to the floor", 1.6, Case(model="lite", blocks=32), "floor"),
        ("Lite 121f 512x768 LoRA step, to the floor", 1.45, Case(model="lite", shape=LONG, blocks=32), "floor"),
    ],
    "G5": [("Pro 17f step, float8 products, to bf16", 0.78, Case(blocks=4, fp8="fast"), Case(blocks=4))],
    "G6": [("Pro 17f step, float8 weights, to bf16", 1.06, Case(blocks=4, fp8="weights"), Case(blocks=4))],
    "G7": [
        ("Pro float8, 50 of 60 swapped, 5k tokens, to resident", 1.15, Case(fp8="weights", swap=50), Case(fp8="weights")),
        (
            "the same, 11.5k tokens", 1.03,
            Case(fp8="weights", swap=50, shape=SHORT_HD), Case(fp8="weights", shape=SHORT_HD),
        ),
    ],
    "G8": [
        ("Pro float8, 17f 512x512, GiB on a 24 GB card", 22.0, Case(fp8="weights", cap_gib=CARDS[24]), "memory"),
        ("the same, 50 blocks swapped, on a 16 GB card", 14.5, Case(fp8="weights", swap=50, cap_gib=CARDS[16]), "memory"),
        ("the same, on a 12 GB card", 10.0, Case(fp8="weights", swap=50, cap_gib=CARDS[12]), "memory"),
    ],
    "G9": [
        ("Lite 121f, inputs of blocks offloaded, GiB", 11.0, Case(model="lite", shape=LONG, offload=True), "memory"),
        ("the same, to not offloaded", 1.05, Case(model="lite", shape=LONG, offload=True), Case(model="lite", shape=LONG)),
    ],
}  # fmt: skip


def tiny(case):
    return replace(
        case, model="tiny", shape=(2, 8, 8), blocks=4 if case.blocks else None,
        swap=min(case.swap, 2), fp8="weights" if case.fp8 else None,
    )  # fmt: skip


def measured(case, args):
    words = [word for key, value in asdict(case).items() for word in (f"--{key}", repr(value))]
    words += ["--device", "cpu"] if args.rehearse else []
    return C.run_alone([Path(__file__), "--child", "--rounds", args.rounds, *words])


def value_of(result, other):
    """The number that the goal is about, or why there is none."""
    for one in (result, other):
        if isinstance(one, dict) and "failed" in one:
            return one["failed"]
    if other == "memory":
        return f"{result['peak']:.3g}"
    reference = result["seconds"]["floor"] if other == "floor" else other["seconds"]["ours"]
    return f"{result['seconds']['ours'] / reference:.3g}"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", choices=G, default=list(G))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--rehearse", action="store_true")
    p.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    p.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    for key in asdict(Case()):
        p.add_argument(f"--{key}", type=ast.literal_eval, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(
            Case(**{key: getattr(args, key) for key in asdict(Case())}),
            args.rounds,
            torch.device(args.device),
        )
    if not (args.rehearse or torch.cuda.is_available()):
        raise SystemExit("no CUDA device; --rehearse runs every case at tiny size on the CPU")
    print(
        f"\n{'rehearsal on the CPU' if args.rehearse else torch.cuda.get_device_name()}, torch {torch.__version__}\n"
    )
    print("| # | what | goal at most | value | seconds |\n| --- | --- | ---: | ---: | ---: |")
    for number in args.only:
        for what, goal, case, other in G[number]:
            cases = [c for c in (case, other) if isinstance(c, Case)]
            results = [measured(tiny(c) if args.rehearse else c, args) for c in cases]
            value = value_of(results[0], other if isinstance(other, str) else results[1])
            seconds = results[0].get("seconds", {}).get("ours", float("nan"))
            print(f"| {number} | {what} | {goal:g} | {value} | {seconds:.3g} |", flush=True)


if __name__ == "__main__":
    main()
