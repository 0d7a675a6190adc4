"""The VAE's middle block without its token-by-token mask.

diffusers expresses "a frame sees itself and earlier frames" as an S x S mask over all tokens of a window:
4 GB and more at 512 x 768. Attending frame by frame gives the same numbers and needs no mask.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from modules.attention import fused_attention


class FrameCausalMidBlock(nn.Module):
    """Takes the place of a `HunyuanVideoMidBlock3D`, whose submodules and parameter names it keeps."""

    def __init__(self, block: Any) -> None:
        super().__init__()
        self.attentions: nn.ModuleList = block.attentions
        self.resnets: nn.ModuleList = block.resnets

    def forward(self, hidden: Tensor) -> Tensor:
        """[B, C, F, H, W] -> the same shape."""
        hidden = self.resnets[0](hidden)
        for attention, resnet in zip(self.attentions, self.resnets[1:], strict=True):
            hidden = resnet(_frame_causal_attention(attention, hidden))
        return hidden


def _frame_causal_attention(attention: Any, hidden: Tensor) -> Tensor:
    """Single-head attention over space and earlier frames, plus the residual; [B, C, F, H, W]."""
    num_frames, height, width = hidden.shape[2:]
    area = height * width
    tokens = attention.group_norm(hidden.flatten(2)).transpose(1, 2)  # [B, F*H*W, C]
    query, key, value = (layer(tokens) for layer in (attention.to_q, attention.to_k, attention.to_v))
    frames = []
    for frame in range(num_frames):
        end = (frame + 1) * area
        frames.append(
            fused_attention(query[:, None, end - area : end], key[:, None, :end], value[:, None, :end])[:, 0]
        )
    mixed = attention.to_out[0](torch.cat(frames, dim=1))
    return hidden + mixed.transpose(1, 2).unflatten(2, (num_frames, height, width))
