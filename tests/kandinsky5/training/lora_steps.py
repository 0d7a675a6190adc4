"""LoRA steps and samples of a tiny DiT, for tests that compare ways to keep its memory."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from kandinsky5.model.conditioning import TextConditioning, VelocityModel, pad_text
from kandinsky5.model.dit import DiffusionTransformer3D
from modules.fp8 import Fp8Linear, quantise_rows
from networks.lora_kandinsky import create_network, is_target_name
from tests.tiny import tiny_dit

Base = Literal["fp32", "bf16", "fp8"]


class LoraModel:
    """A DiT of six visual blocks with a LoRA that acts, and gradient checkpointing on."""

    def __init__(self, base: Base = "fp32") -> None:
        self.dtype = torch.float32 if base == "fp32" else torch.bfloat16
        self.dit = tiny_dit(num_visual_blocks=6, compute_dtype=self.dtype)
        if base == "fp8":
            quantise(self.dit)
        self.network = create_network(
            self.dit, network_dim=4, network_alpha=4, network_dropout=None, network_args={}, seed=0
        )
        with torch.no_grad():
            for parameter in self.network.parameters():
                parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
        self.dit.gradient_checkpointing = True

    def predict(self) -> Tensor:
        generator = torch.Generator().manual_seed(0)
        caption = TextConditioning(
            torch.randn(5, 64, generator=generator), torch.randn(32, generator=generator)
        )
        noisy = torch.randn(1, 16, 2, 8, 8, generator=generator)
        text = pad_text([caption], device="cpu", dtype=self.dtype)
        return VelocityModel(self.dit, (1.0, 2.0, 2.0))(noisy, torch.tensor([0.4]), text)

    def step(self) -> list[Tensor]:
        """Output and LoRA gradients of a training step."""
        self.network.zero_grad()
        velocity = self.predict()
        velocity.float().square().mean().backward()
        gradients = [p.grad for p in self.network.parameters() if p.grad is not None]
        assert len(gradients) == len(list(self.network.parameters())) > 100
        return [velocity.detach(), *gradients]

    @torch.no_grad()
    def sample(self) -> list[Tensor]:
        """Outputs of two passes without gradients."""
        return [self.predict(), self.predict()]


def quantise(dit: DiffusionTransformer3D) -> None:
    """Put the block layers into float8."""
    for name, layer in list(dit.named_modules()):
        if isinstance(layer, nn.Linear) and is_target_name(name):
            weight, scale = quantise_rows(layer.weight.data)
            dit.set_submodule(name, Fp8Linear(weight, scale, layer.bias, compute_dtype=torch.bfloat16))


def equal(ours: list[Tensor], others: list[Tensor]) -> bool:
    """Whether all tensors are the same to the bit."""
    return all(torch.equal(a, b) for a, b in zip(ours, others, strict=True))
