"""The DiT's formulas in float64, written out once more: what float32 and bf16 runs are compared with.

Source of the formulas: kandinskylab/kandinsky-5:kandinsky/models/{nn,dit}.py.
"""

import math

import torch
import torch.nn.functional as F

EPS = torch.finfo(torch.float32).eps


class Reference64:
    """Text to video of one clip; weights by the checkpoint's names."""

    def __init__(self, cfg, weights):
        self.cfg, self.w = cfg, {k: v.double() for k, v in weights.items()}

    def linear(self, x, name):
        return F.linear(x, self.w[f"{name}.weight"], self.w.get(f"{name}.bias"))

    def norm(self, x):
        return F.layer_norm(x, x.shape[-1:])

    def embed(self, x, name):
        norm = f"{name}.norm"
        y = self.linear(x, f"{name}.in_layer")
        return F.layer_norm(y, y.shape[-1:], self.w[f"{norm}.weight"], self.w[f"{norm}.bias"])

    def time(self, timestep):
        half = self.cfg.model_dim // 2
        angles = timestep.double() * self.frequencies(half)
        y = torch.cat([angles.cos(), angles.sin()])
        return self.linear(F.silu(self.linear(y, "time_embeddings.in_layer")), "time_embeddings.out_layer")

    def frequencies(self, count):
        # The float32 tables of the model are its parameters: their rounding is not an error.
        return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32) / count).double()

    def angles(self, shape, dims, scale):
        grid = torch.meshgrid(*(torch.arange(n) for n in shape), indexing="ij")
        parts = [g.flatten()[:, None] * self.frequencies(d // 2) / s for g, d, s in zip(grid, dims, scale)]
        return torch.cat(parts, dim=-1)[:, None]  # [N, 1, d/2]

    def heads(self, x, name, angles):
        y = self.linear(x, name).unflatten(-1, (-1, self.cfg.head_dim))
        norm = {"to_query": "query_norm", "to_key": "key_norm"}.get(name.rpartition(".")[2])
        if norm is None:
            return y
        y = y * torch.rsqrt(y.square().mean(-1, keepdim=True) + EPS)
        y = y * self.w[f"{name.rpartition('.')[0]}.{norm}.weight"]
        if angles is None:
            return y
        a, b = y.unflatten(-1, (-1, 2)).unbind(-1)
        c, s = angles.cos(), angles.sin()
        return torch.stack([a * c - b * s, a * s + b * c], dim=-1).flatten(-2)

    def attention(self, x, source, name, angles=None):
        q, k, v = (
            self.heads(t, f"{name}.{part}", angles)
            for t, part in ((x, "to_query"), (source, "to_key"), (source, "to_value"))
        )
        scores = torch.einsum("nhd,lhd->hnl", q, k) / math.sqrt(self.cfg.head_dim)
        mixed = torch.einsum("hnl,lhd->nhd", scores.softmax(-1), v)
        return self.linear(mixed.flatten(-2), f"{name}.out_layer")

    def block(self, x, name, kind, time, parts):
        chunks = self.linear(F.silu(time), f"{name}.{kind}_modulation.out_layer").chunk(3 * len(parts))
        for i, part in enumerate(parts):
            shift, scale, gate = chunks[3 * i : 3 * i + 3]
            x = x + gate * part(self.norm(x) * (1 + scale) + shift)
        return x

    def feed_forward(self, name):
        hidden = lambda y: F.gelu(self.linear(y, f"{name}.feed_forward.in_layer"))
        return lambda y: self.linear(hidden(y), f"{name}.feed_forward.out_layer")

    @torch.no_grad()
    def __call__(self, inp):
        """common.Inputs -> [F, H, W, channels], float64."""
        cfg = self.cfg
        time = self.time(inp.time) + self.embed(inp.pooled.double(), "pooled_text_embeddings")[0]
        text = self.embed(inp.text.double(), "text_embeddings")
        angles = self.angles(text.shape[:1], (cfg.head_dim,), (1.0,))
        for i in range(cfg.num_text_blocks):
            n = f"text_transformer_blocks.{i}"
            own = lambda y, n=n: self.attention(y, y, f"{n}.self_attention", angles)
            text = self.block(text, n, "text", time, (own, self.feed_forward(n)))
        (f, h, w, _), (_, ph, pw) = inp.x.shape, cfg.patch_size
        patches = inp.x.double().view(f, h // ph, ph, w // pw, pw, -1).permute(0, 1, 3, 2, 4, 5)
        grid = patches.shape[:3]
        x = self.linear(patches.flatten(3).flatten(0, 2), "visual_embeddings.in_layer")
        angles = self.angles(grid, cfg.axes_dims, inp.scale_factor)
        for i in range(cfg.num_visual_blocks):
            n = f"visual_transformer_blocks.{i}"
            own = lambda y, n=n: self.attention(y, y, f"{n}.self_attention", angles)
            cross = lambda y, n=n: self.attention(y, text, f"{n}.cross_attention")
            x = self.block(x, n, "visual", time, (own, cross, self.feed_forward(n)))
        shift, scale = self.linear(F.silu(time), "out_layer.modulation.out_layer").chunk(2)
        out = self.linear(self.norm(x) * (1 + scale) + shift, "out_layer.out_layer")
        out = out.view(*grid, -1, 1, ph, pw).permute(0, 4, 1, 5, 2, 6, 3)
        return out.reshape(f, h, w, -1)
