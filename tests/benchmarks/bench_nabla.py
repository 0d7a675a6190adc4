"""NABLA: choosing the blocks, and attention over them, against three sorts and against dense attention.

python bench_nabla.py [--tokens 6144] [--heads 7] [--mask-tokens 30720] [--mask-heads 14] [--device cuda]
"""

import argparse
import math
import sys
from pathlib import Path

import common as C
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from kandinsky5.model.nabla import BLOCK, NablaPlan, select_blocks
from kandinsky5.tasks import NablaParams
from modules.block_sparse import block_sparse_attention, block_sparse_path


def three_sorts(query, key, p):
    """Sort the scores, undo it with a second sort, order the kept blocks with a third."""
    q, k = (t.unflatten(1, (-1, BLOCK)).mean(2).transpose(1, 2) for t in (query, key))
    weights = (q @ k.transpose(-1, -2) / math.sqrt(query.shape[-1])).float().softmax(-1)
    ascending, order = weights.sort(-1)
    kept = (ascending.cumsum(-1) >= 1 - p).int().gather(-1, order.argsort(-1))
    return kept.argsort(-1, descending=True)


def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--tokens", type=int, default=6144)
    p.add_argument("--heads", type=int, default=7)
    p.add_argument("--mask-tokens", type=int, default=30720)
    p.add_argument("--mask-heads", type=int, default=14)
    p.add_argument("--dim", type=int, default=64)
    p.add_argument("--device", default="cpu")
    p.add_argument("--rounds", type=int, default=3)
    args = p.parse_args()
    torch.manual_seed(0)
    blocks = args.mask_tokens // BLOCK
    query, key = torch.randn(2, 1, args.mask_tokens, args.mask_heads, args.dim, device=args.device).bfloat16()
    window = torch.zeros(blocks, blocks, dtype=torch.bool, device=args.device)
    plan = NablaPlan(NablaParams(P=0.9), window)
    fns = {
        "three sorts": lambda: three_sorts(query, key, 0.9),
        "select_blocks": lambda: select_blocks(query, key, plan),
    }
    title = f"block mask, {args.mask_tokens} tokens, {args.mask_heads} heads, bf16 {args.device}"
    C.report(title, C.interleave(fns, args.rounds, 1, args.device), "three sorts")

    blocks = args.tokens // BLOCK
    inputs = torch.randn(3, 1, args.tokens, args.heads, args.dim, device=args.device).bfloat16()
    query, key, value = (t.requires_grad_(True) for t in inputs.clone())
    scores = torch.rand(1, args.heads, blocks, blocks, device=args.device)

    def step(attend):
        out = attend()
        torch.autograd.grad(out.sum(), (query, key, value))

    def dense():
        return F.scaled_dot_product_attention(*(t.transpose(1, 2) for t in (query, key, value)))

    def sparse(density):
        mask = scores <= scores.quantile(density, dim=-1, keepdim=True)
        return lambda: block_sparse_attention(query, key, value, mask, BLOCK)

    fns = {"dense SDPA": lambda: step(dense)}
    for density in (1.0, 0.5, 0.2, 0.1):
        attend = sparse(density)
        fns[f"density {density:g}"] = lambda attend=attend: step(attend)
    path = block_sparse_path(torch.device(args.device))
    title = f"attention forward + backward ({path}), {args.tokens} tokens, {args.heads} x {args.dim}, bf16 {args.device}"
    C.report(title, C.interleave(fns, args.rounds, 1, args.device), "dense SDPA")


if __name__ == "__main__":
    main()
