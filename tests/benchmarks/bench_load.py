"""Loading a DiT checkpoint in the real format: time and peak host memory, one process per way.

    python bench_load.py --gib 3 [--work DIR]

A file of Lite's widths with as many visual blocks as fill it is written first and removed afterwards. 'peak' is
the highest anonymous memory (what the system cannot drop) above the start, sampled every 2 ms. The project's
`load_dit` is measured; on a machine without a GPU "to the device" means that every tensor is read, checked,
cast and dropped, as it is when it moves to a GPU.

  read all               safetensors' load_file with private copies: the usual first half
  read all, then fp8     the same, then quantised tensor by tensor: the usual order
  bf16, kept             load_dit, weights kept in host memory
  bf16, to the device    load_dit, every weight moved away as it is read
  fp8, kept              load_dit with --fp8_base
  fp8, plain reads       the same with --disable_numpy_memmap
  int8, kept             load_dit with --int8_base
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import common as C
import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.model import checkpoints
from kandinsky5.model.checkpoints import build_meta_dit, load_dit
from kandinsky5.tasks import LITE_PARAMS
from modules.fp8 import quantise_rows
from modules.tensor_files import write_tensor_stream


def sized_params(gib):
    """Lite with the number of visual blocks whose bf16 file is nearest to `gib`."""
    size = lambda blocks: (
        2
        * sum(
            p.numel()
            for p in build_meta_dit(
                replace(LITE_PARAMS, num_visual_blocks=blocks), torch.bfloat16
            ).parameters()
        )
    )
    one, two = size(1), size(2)
    return replace(LITE_PARAMS, num_visual_blocks=max(1, round((gib * 2**30 - one) / (two - one)) + 1))


def write_checkpoint(path, params):
    layout = {
        key: (torch.bfloat16, tuple(t.shape))
        for key, t in build_meta_dit(params, torch.bfloat16).state_dict().items()
    }
    pool = torch.randn(2**22, generator=torch.Generator().manual_seed(0)).bfloat16()

    def read(key):
        shape = torch.Size(layout[key][1])
        return pool.repeat(-(-shape.numel() // len(pool)))[: shape.numel()].view(shape)

    write_tensor_stream(path, layout, read)


def read_all(path, _):
    return {k: t.clone() for k, t in load_file(path).items()}


def read_all_fp8(path, params):
    state = read_all(path, params)
    for key in [
        k for k, t in state.items() if t.ndim == 2 and "_transformer_blocks." in k and "modulation" not in k
    ]:
        state[key] = quantise_rows(state[key])
    return state


def loader(*, keeps=True, **words):
    def load(path, params):
        if not keeps:
            checkpoints.host_placement = lambda *_args, **_words: lambda _key: torch.device("meta")
            checkpoints._assert_materialised = lambda _: None
        weights = WeightsConfig(**words)
        return load_dit(path, params, weights, device=torch.device("cpu"), compute_dtype=torch.bfloat16)

    return load


WAYS = {
    "read all": read_all,
    "read all, then fp8": read_all_fp8,
    "bf16, kept": loader(),
    "bf16, to the device": loader(keeps=False),
    "fp8, kept": loader(fp8_base=True),
    "fp8, plain reads": loader(fp8_base=True, disable_numpy_memmap=True),
    "int8, kept": loader(int8_base=True),
}


def is_open(path):
    """Whether this process still has the file open or mapped."""
    links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
    return str(path) in links or str(path) in Path("/proc/self/maps").read_text(encoding="utf-8")


def child(way, path, blocks):
    params = replace(LITE_PARAMS, num_visual_blocks=blocks)
    start = time.perf_counter(), time.process_time()
    with C.AnonymousPeak() as peak:
        loaded = WAYS[way](path, params)
    wall, cpu = time.perf_counter() - start[0], time.process_time() - start[1]
    C.trim()
    held = C.anonymous_mib() - peak.start_mib
    C.tell({"wall": wall, "cpu": cpu, "peak": peak.mib, "held": held, "open": is_open(path.resolve())})
    del loaded


def measure(gib, ways, work=None):
    """Yield (way, result) for each way; results have shares of the file's size."""
    with tempfile.TemporaryDirectory(dir=work) as folder:
        path, params = Path(folder) / "lite.safetensors", sized_params(gib)
        write_checkpoint(path, params)
        size = path.stat().st_size / 2**20
        for way in ways:
            r = C.run_alone([Path(__file__), "--child", way, path, params.num_visual_blocks])
            yield way, r | {"size": size, "peak_share": r["peak"] / size, "held_share": r["held"] / size}


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--gib", type=float, default=3.0)
    p.add_argument("--work")
    p.add_argument("--only", nargs="*", choices=WAYS)
    p.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    args = p.parse_args()
    if args.child:
        return child(args.child[0], Path(args.child[1]), int(args.child[2]))
    for way, r in measure(args.gib, args.only or WAYS, args.work):
        if way == (args.only or list(WAYS))[0]:
            print(f"\n### loading {r['size']:.0f} MiB of bf16")
            print("| way | wall s | processor s | peak MiB | peak / file | held / file | file still open |")
            print("| --- | ---: | ---: | ---: | ---: | ---: | --- |")
        print(
            f"| {way} | {r['wall']:.1f} | {r['cpu']:.1f} | {r['peak']:.0f} | {r['peak_share']:.3f} "
            f"| {r['held_share']:.3f} | {'yes' if r['open'] else 'no'} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
