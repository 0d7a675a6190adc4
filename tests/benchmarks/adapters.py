"""How each DiT is built and called. One class per contestant, all with the same methods.

ours       the project's.
diffusers  the installed diffusers package: the reference.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

LORA_TARGETS = ("to_query", "to_key", "to_value", "out_layer", "in_layer")


class Adapter:
    name = "?"

    def available(self):
        return True

    def build(self, cfg):
        """A module with the config's architecture; weights are assigned afterwards."""
        raise NotImplementedError

    def load(self, model, weights):
        missing, unexpected = model.load_state_dict(weights, strict=False, assign=True)
        assert not missing and not unexpected, (self.name, list(missing)[:4], list(unexpected)[:4])

    def finish(self, model, dtype, device):
        """After the weights are in: buffers to the device, dtype-dependent settings."""
        return model.to(device).requires_grad_(False)

    def forward(self, model, inp):
        """Inputs -> prediction of shape frames, height, width, channels."""
        raise NotImplementedError

    def checkpointing(self, model, on):
        """Turn block gradient checkpointing on or off. Return False where there is none."""
        return False

    def attach_lora(self, model, rank=16):
        """LoRA on attention and feed-forward linears of every block; returns the trainable parameters."""
        return attach_plain_lora(model, rank)

    # -- shared -----------------------------------------------------------------------------------
    def make(self, cfg, weights, dtype, device="cpu"):
        with torch.device("meta"):
            model = self.build(cfg)
        self.load(model, weights)
        rebuild_meta_buffers(model, lambda: self.build(cfg))
        return self.finish(model, dtype, device)


def rebuild_meta_buffers(model, build):
    """Non-persistent buffers (rotary tables) are left on meta by a meta build: recompute them."""
    wanted = [n for n, b in model.named_buffers() if b.is_meta]
    plain = [
        (m, k)
        for _, m in model.named_modules()
        for k, v in vars(m).items()
        if isinstance(v, torch.Tensor) and v.is_meta
    ]
    if not wanted and not plain:
        return
    # Building for real costs a moment of memory; parameters are dropped at once.
    fresh = build_without_params(build)
    for n in wanted:
        owner, _, key = n.rpartition(".")
        src = fresh.get_submodule(owner)
        model.get_submodule(owner).register_buffer(key, getattr(src, key), persistent=False)
    for name, module in model.named_modules():
        src = fresh.get_submodule(name)
        for k, v in list(vars(module).items()):
            if isinstance(v, torch.Tensor) and v.is_meta:
                setattr(module, k, getattr(src, k))


def build_without_params(build):
    """Build on the CPU but put every parameter on meta as it is registered."""
    original = nn.Module.register_parameter

    def register(self, name, param):
        if param is not None:
            param = nn.Parameter(param.data.to("meta"), requires_grad=False)
        original(self, name, param)

    nn.Module.register_parameter = register
    try:
        return build()
    finally:
        nn.Module.register_parameter = original


def rope_positions(inp, patch=(1, 2, 2)):
    t, h, w = inp.x.shape[:3]
    dev = inp.x.device
    pos = [torch.arange(n // p, device=dev) for n, p in zip((t, h, w), patch)]
    return pos, torch.arange(inp.text.shape[-2], device=dev)


class OursPlainLora(Adapter):
    """The project's DiT with the same plain LoRA layers as the others."""

    name = "ours, plain LoRA layers"

    def build(self, cfg):
        from kandinsky5.model.dit import DiffusionTransformer3D

        return DiffusionTransformer3D(**cfg.kwargs())

    def finish(self, model, dtype, device):
        model.compute_dtype = dtype
        return super().finish(model, dtype, device)

    def forward(self, model, inp):
        return model(
            inp.x[None], inp.text[None], inp.pooled, inp.time, scale_factor=inp.scale_factor, nabla=inp.sparse
        )[0]

    def checkpointing(self, model, on):
        model.gradient_checkpointing = on
        return True


class Ours(OursPlainLora):
    """The project's DiT with the project's LoRA layers."""

    name = "ours"

    def attach_lora(self, model, rank=16):
        from networks.lora_kandinsky import create_network

        network = create_network(
            model, network_dim=rank, network_alpha=rank, network_dropout=None, network_args={}, seed=0
        )
        device = next(model.parameters()).device
        model.network = (network.to(device),)  # kept alive, in a tuple so that it is no submodule
        return list(network.parameters())


class Diffusers(Adapter):
    name = "diffusers"

    def available(self):
        try:
            from diffusers import Kandinsky5Transformer3DModel  # noqa: F401
        except ImportError:
            return False
        return True

    def build(self, cfg):
        from diffusers import Kandinsky5Transformer3DModel

        return Kandinsky5Transformer3DModel(**cfg.kwargs())

    def forward(self, model, inp):
        pos, tpos = rope_positions(inp)
        return model(
            hidden_states=inp.x[None],
            encoder_hidden_states=inp.text[None],
            timestep=inp.time,
            pooled_projections=inp.pooled,
            visual_rope_pos=pos,
            text_rope_pos=tpos,
            scale_factor=inp.scale_factor,
            sparse_params=inp.sparse,
            return_dict=False,
        )[0]

    def checkpointing(self, model, on):
        (model.enable_gradient_checkpointing if on else model.disable_gradient_checkpointing)()
        model.train(on)
        return True


REGISTRY = {c.name: c for c in (Ours, OursPlainLora, Diffusers)}


def contestants(names=None):
    picked = []
    for n in names or REGISTRY:
        a = REGISTRY[n]()
        if a.available():
            picked.append(a)
        else:
            print(f"# {n}: not available, skipped")
    return picked


# ---- a neutral LoRA, the same for every contestant ----------------------------------------------


class LoraLinear(nn.Module):
    def __init__(self, base, rank, dtype=torch.float32):
        super().__init__()
        self.base, self.scale = base, 1.0
        dev = base.weight.device
        self.down = nn.Parameter(
            torch.randn(rank, base.in_features, device=dev, dtype=dtype) / base.in_features**0.5
        )
        self.up = nn.Parameter(torch.zeros(base.out_features, rank, device=dev, dtype=dtype))

    def forward(self, x):
        low = nn.functional.linear(x, self.down.to(x.dtype))
        return self.base(x) + nn.functional.linear(low, self.up.to(x.dtype)) * self.scale


def attach_plain_lora(model, rank=16):
    """LoRA on attention and feed-forward linears of every block; returns the trainable parameters."""
    params = []
    for name, module in list(model.named_modules()):
        if "transformer_blocks" not in name or "modulation" in name:
            continue
        for child, sub in list(module.named_children()):
            if isinstance(sub, nn.Linear) and child in LORA_TARGETS:
                lora = LoraLinear(sub, rank)
                setattr(module, child, lora)
                params += [lora.down, lora.up]
    return params
