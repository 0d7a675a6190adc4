"""The parts of the DiT: embeddings, modulation, rotary positions, attention and feed-forward blocks.

Source of all formulas: kandinskylab/kandinsky-5:kandinsky/models/{nn,dit}.py. Where that code rounds to
bfloat16 these parts round to the dtype of the activations, so that a float32 run is float32 throughout.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from kandinsky5.model.nabla import NablaPlan, nabla_attention
from modules.attention import KeyMask, attention
from modules.attention_backends import DEFAULT_BACKEND
from modules.fused_ops import (
    GELU,
    ModulatedLayerNorm,
    gated_sum,
    layer_norm,
    modulated_layer_norm,
    project,
    rms_norm_rotate,
)

RMS_NORM_EPS = torch.finfo(torch.float32).eps
"""The default eps of nn.RMSNorm for float32 input; 1e-6 is wrong for small activations."""

MAX_TEXT_POSITIONS = 1024
MAX_VISUAL_POSITIONS = 128
"""Lengths of the rotary tables of the official model, text and each visual axis."""


def rotary_frequencies(count: int) -> Tensor:
    """exp(-ln(10000) * i / count) for i below count, float32 on the CPU whatever the default device is."""
    return torch.exp(-math.log(10000) * torch.arange(count, dtype=torch.float32, device="cpu") / count)


class Modulation(NamedTuple):
    """The modulation of one branch of a block by the timestep."""

    norm: ModulatedLayerNorm
    """Of what enters the branch; its bias is the shift, its weight 1 + scale, float32."""
    gate: Tensor
    """[B, D] in the compute dtype."""


class TimeEmbeddings(nn.Module):
    """Sinusoid and MLP of the timestep, in float32."""

    frequencies: Tensor

    def __init__(self, model_dim: int, time_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(model_dim, time_dim)
        self.out_layer = nn.Linear(time_dim, time_dim)
        self.register_buffer("frequencies", rotary_frequencies(model_dim // 2), persistent=False)

    def sinusoid(self, timestep: Tensor) -> Tensor:
        """timestep [B] -> [B, D], cosines first."""
        angles = torch.outer(timestep.float(), self.frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=-1)

    def forward(self, timestep: Tensor) -> Tensor:
        """timestep [B], 1000 * sigma -> [B, E] float32."""
        hidden = F.silu(linear_float32(self.sinusoid(timestep), self.in_layer))
        return linear_float32(hidden, self.out_layer)


def linear_float32(hidden: Tensor, linear: nn.Linear) -> Tensor:
    """A Linear computed in float32 on its input's device, from weights stored in any dtype on any device."""
    weight, bias = (
        tensor.to(hidden.device, non_blocking=True).float() for tensor in (linear.weight, linear.bias)
    )
    return F.linear(hidden, weight, bias)


class TextEmbeddings(nn.Module):
    """Linear and LayerNorm from an encoder's width to the model's."""

    def __init__(self, text_dim: int, out_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(text_dim, out_dim)
        self.norm = nn.LayerNorm(out_dim)

    def forward(self, text_embed: Tensor) -> Tensor:
        """[..., text_dim] -> [..., out_dim]."""
        norm = self.norm
        return layer_norm(self.in_layer(text_embed), norm.weight, norm.bias, norm.eps)


class VisualEmbeddings(nn.Module):
    """Splits latents into patches and projects each to a token."""

    def __init__(self, channels: int, model_dim: int, patch_size: tuple[int, int, int]) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.in_layer = nn.Linear(math.prod(patch_size) * channels, model_dim)

    def forward(self, x: Tensor) -> Tensor:
        """[B, F, H, W, channels] -> [B, f, h, w, D]; inside a patch the channel runs fastest."""
        pt, ph, pw = self.patch_size
        patches = rearrange(x, "b (f pt) (h ph) (w pw) c -> b f h w (pt ph pw c)", pt=pt, ph=ph, pw=pw)
        return self.in_layer(patches)


class ModulationLayer(nn.Module):
    """Shifts, scales and gates from the time embedding; computed in float32, stored in the file's dtype."""

    def __init__(self, time_dim: int, model_dim: int, num_params: int) -> None:
        super().__init__()
        self.num_params = num_params
        self.out_layer = nn.Linear(time_dim, num_params * model_dim)
        self.given: Tensor | None = None
        """The result for the present pass, where it was computed ahead (see `modulation_table`)."""

    def params(self, activated_time: Tensor) -> Tensor:
        """silu(time_embed) [B, E] float32 -> [B, num_params, D] float32."""
        return self(activated_time) if self.given is None else self.given

    def forward(self, activated_time: Tensor) -> Tensor:
        """Compute `params`."""
        return linear_float32(activated_time, self.out_layer).unflatten(-1, (self.num_params, -1))

    def branches(self, activated_time: Tensor, dtype: torch.dtype) -> tuple[Modulation, ...]:
        """One modulation per branch of a block; the gates are in `dtype`."""
        params = self.params(activated_time).unflatten(1, (-1, 3))  # [B, branches, shift | scale | gate, D]
        shift = params[:, :, 0]
        weight = 1 + params[:, :, 1]
        gate = params[:, :, 2].to(dtype)
        norms = map(ModulatedLayerNorm, weight.unbind(1), shift.unbind(1))
        return tuple(map(Modulation, norms, gate.unbind(1)))


class RotaryAngles(nn.Module):
    """The rotation of each channel pair at each position."""

    frequencies: Tensor

    def __init__(self, axes_dims: tuple[int, ...], max_positions: int) -> None:
        super().__init__()
        self.axes_dims = axes_dims
        self.max_positions = max_positions
        self.register_buffer("frequencies", self._frequencies(), persistent=False)

    def _frequencies(self) -> Tensor:
        return torch.cat([rotary_frequencies(dim // 2) for dim in self.axes_dims])

    def forward(self, shape: tuple[int, ...], scale_factor: tuple[float, ...]) -> Tensor:
        """Grid sizes and divisors, one per axis -> [*shape, 1, d/2, 2] cosines and sines, for all heads.

        Raises:
            ValueError: a side is longer than the model's tables.
        """
        if max(shape) > self.max_positions:
            raise ValueError(
                f"grid {shape} is longer than the model's {self.max_positions} positions per axis"
            )
        per_axis = self.frequencies.split([dim // 2 for dim in self.axes_dims])
        angles = []
        for axis, (size, divisor, frequencies) in enumerate(zip(shape, scale_factor, per_axis, strict=True)):
            positions = torch.arange(size, dtype=torch.float32, device=frequencies.device)
            axis_angles = torch.outer(positions, frequencies) / divisor
            grid = [1] * len(shape)
            grid[axis] = size
            angles.append(axis_angles.view(*grid, -1).expand(*shape, -1))
        joined = torch.cat(angles, dim=-1)[..., None, :]
        return torch.stack([joined.cos(), joined.sin()], dim=-1)


class Attention(nn.Module):
    """Multi-head attention with normalised queries and keys."""

    def __init__(self, model_dim: int, head_dim: int) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.backend = DEFAULT_BACKEND
        self.to_query = nn.Linear(model_dim, model_dim)
        self.to_key = nn.Linear(model_dim, model_dim)
        self.to_value = nn.Linear(model_dim, model_dim)
        self.query_norm = nn.RMSNorm(head_dim)
        self.key_norm = nn.RMSNorm(head_dim)
        self.out_layer = nn.Linear(model_dim, model_dim)

    def forward(
        self,
        tokens: Tensor,
        norm: ModulatedLayerNorm,
        source: Tensor | None = None,
        *,
        rotary: Tensor | None = None,
        keys: KeyMask | None = None,
        nabla: NablaPlan | None = None,
    ) -> Tensor:
        """Attend from norm(tokens), [B, N, D], to source [B, L, D].

        Args:
            source: as it is; None in self-attention, to norm(tokens).
            rotary: [N, 1, d/2, 2] cosines and sines, for queries and keys; None rotates nothing.
            keys: which tokens of the source are real; None where all are.
            nabla: block-sparse attention; tokens are then in fractal order.
        Returns:
            [B, N, D].
        """
        if source is None:
            projected = project(tokens, (self.to_query, self.to_key, self.to_value), norm)
        else:
            projected = project(tokens, (self.to_query,), norm)
            projected += project(source, (self.to_key, self.to_value))
        query, key, value = (hidden.unflatten(-1, (-1, self.head_dim)) for hidden in projected)
        query = rms_norm_rotate(query, self.query_norm.weight, RMS_NORM_EPS, rotary)
        key = rms_norm_rotate(key, self.key_norm.weight, RMS_NORM_EPS, rotary)
        if nabla is None:
            mixed = attention(query, key, value, keys=keys, backend=self.backend)
        else:
            # torch's decorator hides the signature.
            mixed = nabla_attention(query, key, value, nabla, self)  # pyright: ignore[reportCallIssue]
        return self.out_layer(mixed.flatten(-2))


class FeedForward(nn.Module):
    """Layer norm, Linear, exact GELU, Linear; no biases."""

    def __init__(self, model_dim: int, ff_dim: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(model_dim, ff_dim, bias=False)
        self.out_layer = nn.Linear(ff_dim, model_dim, bias=False)

    def forward(self, tokens: Tensor, norm: ModulatedLayerNorm) -> Tensor:
        """[B, N, D] -> [B, N, D]."""
        (hidden,) = project(tokens, (self.in_layer,), norm)
        return project(hidden, (self.out_layer,), GELU)[0]


class TextBlock(nn.Module):
    """Refines the text tokens: self-attention and feed-forward."""

    def __init__(self, model_dim: int, ff_dim: int, time_dim: int, head_dim: int) -> None:
        super().__init__()
        self.text_modulation = ModulationLayer(time_dim, model_dim, 6)
        self.self_attention = Attention(model_dim, head_dim)
        self.feed_forward = FeedForward(model_dim, ff_dim)

    def modulations(self, activated_time: Tensor, dtype: torch.dtype) -> tuple[Modulation, ...]:
        """silu(time_embed) [B, E] -> the modulation of self-attention and of the feed-forward branch."""
        return self.text_modulation.branches(activated_time, dtype)

    def forward(
        self, text: Tensor, modulations: tuple[Modulation, ...], rotary: Tensor, text_mask: KeyMask | None
    ) -> Tensor:
        """text [B, L, D], text_mask or None where all tokens are real -> [B, L, D]."""
        self_mod, ff_mod = modulations
        attended = self.self_attention(text, self_mod.norm, rotary=rotary, keys=text_mask)
        text = gated_sum(text, attended, self_mod.gate)
        return gated_sum(text, self.feed_forward(text, ff_mod.norm), ff_mod.gate)


class VisualBlock(nn.Module):
    """Refines the video tokens: self-attention, attention to the text, feed-forward."""

    def __init__(self, model_dim: int, ff_dim: int, time_dim: int, head_dim: int) -> None:
        super().__init__()
        self.visual_modulation = ModulationLayer(time_dim, model_dim, 9)
        self.self_attention = Attention(model_dim, head_dim)
        self.cross_attention = Attention(model_dim, head_dim)
        self.feed_forward = FeedForward(model_dim, ff_dim)

    def modulations(self, activated_time: Tensor, dtype: torch.dtype) -> tuple[Modulation, ...]:
        """silu(time_embed) [B, E] -> the modulation of self-attention, cross-attention and feed-forward."""
        return self.visual_modulation.branches(activated_time, dtype)

    def forward(
        self,
        visual: Tensor,
        text: Tensor,
        modulations: tuple[Modulation, ...],
        rotary: Tensor,
        text_mask: KeyMask | None,
        nabla: NablaPlan | None,
    ) -> Tensor:
        """visual [B, N, D], text [B, L, D], text_mask or None where all tokens are real -> [B, N, D]."""
        self_mod, cross_mod, ff_mod = modulations
        attended = self.self_attention(visual, self_mod.norm, rotary=rotary, nabla=nabla)
        visual = gated_sum(visual, attended, self_mod.gate)
        attended = self.cross_attention(visual, cross_mod.norm, text, keys=text_mask)
        visual = gated_sum(visual, attended, cross_mod.gate)
        return gated_sum(visual, self.feed_forward(visual, ff_mod.norm), ff_mod.gate)


class OutLayer(nn.Module):
    """Turns tokens back into velocity patches."""

    def __init__(
        self, model_dim: int, time_dim: int, out_channels: int, patch_size: tuple[int, int, int]
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.modulation = ModulationLayer(time_dim, model_dim, 2)
        self.out_layer = nn.Linear(model_dim, math.prod(patch_size) * out_channels)

    def forward(self, visual: Tensor, activated_time: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """visual [B, N, D] in row-major order of grid (f, h, w) -> [B, F, H, W, out_channels].

        Inside a patch the channel runs slowest, unlike in the input.
        """
        shift, scale = self.modulation.params(activated_time).unbind(1)
        patches = self.out_layer(modulated_layer_norm(visual, 1 + scale, shift))
        f, h, w = grid
        pt, ph, pw = self.patch_size
        return rearrange(
            patches,
            "b (f h w) (c pt ph pw) -> b (f pt) (h ph) (w pw) c",
            f=f, h=h, w=w, pt=pt, ph=ph, pw=pw,
        )  # fmt: skip
