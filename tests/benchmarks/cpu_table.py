"""All CPU goals with value and distance, in one run of a few minutes.

    python cpu_table.py [--only C1 C4 ...] [--rounds 5] [--gib 3]

Times are processor seconds of one thread, whatever else the machine does; rounds are interleaved, ratios are
medians of per-round ratios. Every measurement runs in a process of its own. The distance is value / goal - 1:
negative is better than the goal.
"""

import argparse
import os
import platform
import time
from argparse import Namespace
from pathlib import Path

os.environ |= {"K5_CLOCK": "cpu", "K5_THREADS": "1", "PYTHONWARNINGS": "ignore"}

import adapters
import bench_dit
import bench_fp8
import bench_load
import bench_traffic
import common as C
import torch
from reference64 import Reference64

OURS, THEIRS = "ours", "diffusers"


def dit_args(args, **changes):
    words = ["--config", "lite2", "--shape", "5x32x32", "--text", "256", "--rounds", str(args.rounds)]
    return Namespace(**(vars(bench_dit.parse(words)) | changes))


def c1(args):
    times = bench_dit.Team(dit_args(args), adapters.contestants([OURS, THEIRS])).forward()
    yield "forward, to the floor", 1.10, C.ratio(times, OURS, bench_dit.FLOOR)
    yield "forward, to diffusers", 0.88, C.ratio(times, OURS, THEIRS)


def c2(args):
    times = bench_dit.Team(dit_args(args), adapters.contestants([OURS, THEIRS])).step("step_ckpt")
    yield "LoRA step with checkpointing, to the floor", 1.12, C.ratio(times, OURS, bench_dit.FLOOR)
    yield "LoRA step with checkpointing, to diffusers", 0.90, C.ratio(times, OURS, THEIRS)


def traffic(is_step):
    args = Namespace(config="lite2", shape="5x32x32", text=64, device="cpu", step=is_step)
    return bench_traffic.count_blocks(adapters.contestants([OURS])[0], args)


def c4(_):
    yield "elementwise traffic of a block, forward, r", 60, traffic(False)["r"]
    yield "elementwise traffic of a block, LoRA step, r", 330, traffic(True)["r"]


def c5(_):
    yield "operators of a block, forward", 50, traffic(False)["operators"]
    yield "operators of a block, LoRA step", 280, traffic(True)["operators"]


def c6(_):
    ours = adapters.contestants([OURS])[0]
    yield "host synchronisations, forward + backward + optimizer", 0, bench_traffic.count_host_reads(ours)


def c7(args):
    one = dit_args(args, config="lite4")
    ours, theirs = (bench_dit.memory(one, name) for name in (OURS, THEIRS))
    for kind, name, goal in (("step_ckpt", "with", 0.75), ("step", "without", 0.70)):
        what = f"peak memory of a LoRA step {name} checkpointing, to diffusers"
        yield what, goal, ours[kind] / theirs[kind]


def c8(_):
    error = {}
    cfg = C.CONFIGS["tiny"]
    for dtype in (torch.float32, torch.bfloat16):
        weights = C.make_weights(cfg, dtype)
        exact = Reference64(cfg, weights)
        inputs = [C.make_inputs(cfg, (3, 8, 12), 20, dtype, seed=seed) for seed in range(8)]
        want = torch.stack([exact(inp) for inp in inputs])
        for a in adapters.contestants([OURS, THEIRS]):
            model = a.make(cfg, weights, dtype)
            with torch.no_grad():
                got = torch.stack([a.forward(model, inp).double().view_as(want[0]) for inp in inputs])
            error[a.name, dtype] = ((got - want).norm() / want.norm()).item()
    yield "float32 forward, relative error to float64", 2e-6, error[OURS, torch.float32]
    bf16 = error[OURS, torch.bfloat16] / error[THEIRS, torch.bfloat16]
    yield "bf16 forward, error to float64 over diffusers' error", 1.0, bf16


def c9(args):
    for tokens, goal in ((256, 0.65), (1024, 0.86)):
        case = bench_fp8.Case(4096, 4096, tokens, "cpu")
        times = case.forward(2 * args.rounds)
        what = f"float8 linear, {tokens} tokens, forward, to float32 dequantisation"
        yield what, goal, C.ratio(times, bench_fp8.OURS, bench_fp8.OTHERS)
    yield "bytes kept for the backward pass per float8 weight", 1, case.kept_bytes()[bench_fp8.OURS]
    yield "bytes of scales over bytes of float8 weights", 0.001, case.scale_share()


def c10(args):
    results = dict(bench_load.measure(args.gib, ("fp8, kept", "bf16, to the device")))
    yield "loading as float8: peak anonymous memory / file", 0.58, results["fp8, kept"]["peak_share"]
    what = "loading as bf16 to a device: peak anonymous host memory / file"
    yield what, 0.02, results["bf16, to the device"]["peak_share"]


PARTS = {f.__name__.upper(): f for f in (c1, c2, c4, c5, c6, c7, c8, c9, c10)}


def distance(value, goal):
    if goal == 0:
        return "met" if value == 0 else "missed"
    return f"{100 * (value / goal - 1):+.1f} %"


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="*", choices=PARTS, default=list(PARTS))
    p.add_argument("--rounds", type=int, default=5)
    p.add_argument("--gib", type=float, default=3.0, help="size of the checkpoint that is loaded")
    p.add_argument("--child", choices=PARTS, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return C.tell({"rows": list(PARTS[args.child](args))})
    start = time.time()
    print(
        f"\n{time.strftime('%Y-%m-%d')}, {os.cpu_count()}-core {platform.machine()}, torch {torch.__version__}, bf16\n"
    )
    print("| # | what | goal at most | value | distance |\n| --- | --- | ---: | ---: | ---: |")
    for part in args.only:
        words = ["--child", part, "--rounds", args.rounds, "--gib", args.gib]
        for what, goal, value in C.run_alone([Path(__file__), *words])["rows"]:
            print(f"| {part} | {what} | {goal:g} | {value:.4g} | {distance(value, goal)} |", flush=True)
    print(f"\n{(time.time() - start) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
