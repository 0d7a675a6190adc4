"""The least time a pass can take: its matrix products and attentions at the speed of a known card.

A multiply and an add are two operations. Nothing between the products is counted, so that no program reaches
the floor; how far above it a run is says how much there is to gain.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache

import torch

from kandinsky5.model.checkpoints import build_meta_dit
from kandinsky5.tasks import DitParams
from networks.lora_files import LayerSizes
from networks.lora_kandinsky import is_target_name, linear_layer_sizes

NABLA_DENSITY = 0.2
"""Share of block pairs that NABLA is assumed to keep: it depends on the clip, and a run's log tells it."""

_FLASH_BACKWARD = 2.5
"""A fused attention's backward in forwards: five products where the forward has two."""


@dataclass(frozen=True, slots=True)
class Card:
    """What a graphics card does at best, in operations per second; dense, without sparsity."""

    bf16: float
    fp8: float | None
    """None: no float8 units."""
    source: str


CARDS = {
    "NVIDIA H200": Card(790e12, 1580e12, "bf16 measured, fp8 taken as twice that"),
    "NVIDIA H100 80GB HBM3": Card(989e12, 1979e12, "datasheet"),
    "NVIDIA GeForce RTX 4090": Card(165e12, 330e12, "datasheet, float32 accumulation"),
    "NVIDIA GeForce RTX 3090": Card(71e12, None, "datasheet, float32 accumulation"),
}
"""By the name that CUDA tells; other cards of these families have other numbers."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """Operations of one pass or step."""

    linear: float
    """Products with the blocks' frozen weights, which float8 units may do."""
    other: float
    """Everything else: attention, LoRA, embeddings, modulation."""

    @property
    def total(self) -> float:
        return self.linear + self.other


def card_of(device: torch.device) -> Card | None:
    """The card behind a device; None for a CPU and for cards whose numbers are not known here."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    return CARDS.get(torch.cuda.get_device_name(device))


def floor_seconds(work: Work, card: Card, *, fp8_products: bool) -> float:
    """Seconds below which the card cannot do the work.

    Args:
        fp8_products: the blocks' linear layers multiply in float8.
    """
    linear_speed = card.fp8 if fp8_products and card.fp8 is not None else card.bf16
    return work.linear / linear_speed + work.other / card.bf16


def forward_work(
    params: DitParams, *, clips: int, video_tokens: int, text_tokens: int, density: float = 1.0
) -> Work:
    """One forward pass.

    Args:
        video_tokens, text_tokens: per clip.
        density: share of the self-attention of the video that is computed.
    """
    layers = _linear_work(params, video_tokens, text_tokens)
    blocks = sum(work for name, work in layers.items() if is_target_name(name))
    outside = sum(layers.values()) - blocks
    attention = _attention_work(params, video_tokens, text_tokens, density)
    return Work(linear=clips * blocks, other=clips * (outside + attention))


def training_work(
    params: DitParams,
    *,
    clips: int,
    video_tokens: int,
    text_tokens: int,
    lora_elements: Mapping[str, int],
    gradient_checkpointing: bool,
    kept_attention_blocks: int = 0,
    density: float = 1.0,
) -> Work:
    """Forward and backward of a LoRA step: the frozen weights get no gradient.

    Args:
        lora_elements: numbers in the adapter of each layer.
        kept_attention_blocks: visual blocks whose attention is not computed a second time.
    """
    forward = forward_work(
        params, clips=clips, video_tokens=video_tokens, text_tokens=text_tokens, density=density
    )
    attention = clips * _attention_work(params, video_tokens, text_tokens, density)
    visual = clips * _visual_attention_work(params, video_tokens, text_tokens, density)
    repeats = 1.0 if gradient_checkpointing else 0.0
    layers = _linear_work(params, video_tokens, text_tokens)
    # A block's last product is not needed again (see networks/fused_lora.py).
    last = clips * sum(work for name, work in layers.items() if name.endswith("feed_forward.out_layer"))
    kept = visual * kept_attention_blocks if gradient_checkpointing else 0.0
    seen = sum(count * _rows(name, video_tokens, text_tokens) for name, count in lora_elements.items())
    # Forward, again, and gradients for input and weights.
    lora = 2.0 * clips * seen * (3.0 + repeats)
    return Work(
        linear=forward.linear * (2.0 + repeats) - last * repeats,
        other=forward.other - attention + attention * (1.0 + repeats + _FLASH_BACKWARD) - kept + lora,
    )


def _linear_work(params: DitParams, video_tokens: int, text_tokens: int) -> dict[str, float]:
    """Operations of every linear layer for one clip, by its name."""
    return {
        name: 2.0 * out_features * in_features * _rows(name, video_tokens, text_tokens)
        for name, (out_features, in_features) in _layer_sizes(params).items()
    }


@cache
def _layer_sizes(params: DitParams) -> Mapping[str, LayerSizes]:
    """[out, in] of every linear layer; remembered, because `--vram_budget` asks for dozens of plans."""
    return linear_layer_sizes(build_meta_dit(params, torch.bfloat16))


def _rows(layer: str, video_tokens: int, text_tokens: int) -> int:
    """How many tokens of a clip pass through a layer."""
    if "modulation" in layer or layer.startswith(("time_embeddings", "pooled_text_embeddings")):
        return 1
    is_text = layer.startswith(("text_", "text_transformer_blocks"))
    if is_text or layer.endswith(("cross_attention.to_key", "cross_attention.to_value")):
        return text_tokens
    return video_tokens


def _visual_attention_work(params: DitParams, video_tokens: int, text_tokens: int, density: float) -> float:
    """Both attentions of one visual block, for one clip."""
    return 4.0 * video_tokens * params.model_dim * (video_tokens * density + text_tokens)


def _attention_work(params: DitParams, video_tokens: int, text_tokens: int, density: float) -> float:
    visual = params.num_visual_blocks * _visual_attention_work(params, video_tokens, text_tokens, density)
    return visual + params.num_text_blocks * 4.0 * text_tokens**2 * params.model_dim
