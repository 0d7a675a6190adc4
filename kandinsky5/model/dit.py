"""The Kandinsky 5 diffusion transformer; submodule names equal the keys of the published checkpoints."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint, noop_context_fn

from kandinsky5.model.layers import (
    MAX_TEXT_POSITIONS,
    MAX_VISUAL_POSITIONS,
    Attention,
    ModulationLayer,
    OutLayer,
    RotaryAngles,
    TextBlock,
    TextEmbeddings,
    TimeEmbeddings,
    VisualBlock,
    VisualEmbeddings,
)
from kandinsky5.model.nabla import MaskObserver, from_fractal, make_plan, to_fractal
from kandinsky5.tasks import DitParams, NablaParams
from modules.activation_offload import ActivationOffload
from modules.attention import KeyMask, keep_attention_outputs
from modules.attention_backends import DEFAULT_BACKEND
from modules.block_swap import BlockSwap

NUM_TIMESTEPS = 1000
"""The model receives timestep = NUM_TIMESTEPS * sigma."""


def is_float32_island(key: str) -> bool:
    """Whether a parameter is computed in float32 and so is kept in the dtype of its file."""
    return "modulation" in key or "norm" in key or key.startswith("time_embeddings.")


@dataclass(slots=True)
class BlockResidual:
    """What the visual blocks added in an earlier pass, for passes that skip them (MagCache)."""

    skip: bool = False
    residual: Tensor | None = None


class DiffusionTransformer3D(nn.Module):
    """Predicts the velocity of noisy latents, given a timestep and a caption.

    The arguments carry the official names (see `DitParams`). Parameters that are not float32 islands are
    expected in `compute_dtype` (or quantised), the dtype of all activations between layers.
    """

    def __init__(
        self,
        *,
        in_visual_dim: int = 16,
        out_visual_dim: int = 16,
        in_text_dim: int = 3584,
        in_text_dim2: int = 768,
        time_dim: int = 512,
        patch_size: tuple[int, int, int] = (1, 2, 2),
        model_dim: int = 2048,
        ff_dim: int = 5120,
        num_text_blocks: int = 2,
        num_visual_blocks: int = 32,
        axes_dims: tuple[int, int, int] = (16, 24, 24),
        visual_cond: bool = False,
        instruct_type: str | None = None,
        compute_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dit_params = DitParams(
            in_visual_dim=in_visual_dim,
            out_visual_dim=out_visual_dim,
            in_text_dim=in_text_dim,
            in_text_dim2=in_text_dim2,
            time_dim=time_dim,
            patch_size=_triple(patch_size),
            model_dim=model_dim,
            ff_dim=ff_dim,
            num_text_blocks=num_text_blocks,
            num_visual_blocks=num_visual_blocks,
            axes_dims=_triple(axes_dims),
            visual_cond=visual_cond,
            instruct_type=instruct_type,
        )
        self.compute_dtype = compute_dtype
        self.attention_backend = DEFAULT_BACKEND
        self.gradient_checkpointing = False
        self.kept_attention_blocks = 0
        self.activation_offload: ActivationOffload | None = None
        self.weight_streams: list[BlockSwap] = []
        """Streams weights from host memory, in place (see `kandinsky5.model.offload`)."""
        self.nabla_observer: MaskObserver | None = None
        head_dim = sum(axes_dims)
        block_sizes = (model_dim, ff_dim, time_dim, head_dim)
        patch = self.dit_params.patch_size

        self.time_embeddings = TimeEmbeddings(model_dim, time_dim)
        self.text_embeddings = TextEmbeddings(in_text_dim, model_dim)
        self.pooled_text_embeddings = TextEmbeddings(in_text_dim2, time_dim)
        self.visual_embeddings = VisualEmbeddings(self.dit_params.in_channels, model_dim, patch)
        self.text_rotary = RotaryAngles((head_dim,), MAX_TEXT_POSITIONS)
        self.visual_rotary = RotaryAngles(self.dit_params.axes_dims, MAX_VISUAL_POSITIONS)
        self.text_transformer_blocks = nn.ModuleList(TextBlock(*block_sizes) for _ in range(num_text_blocks))
        self.visual_transformer_blocks = nn.ModuleList(
            VisualBlock(*block_sizes) for _ in range(num_visual_blocks)
        )
        self.out_layer = OutLayer(model_dim, time_dim, out_visual_dim, patch)

    def set_attention_backend(self, backend: str) -> None:
        """Choose the library that computes attention (`check_attention_backend` first)."""
        self.attention_backend = backend
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = backend

    def text_blocks(self) -> list[TextBlock]:
        """The text blocks in order."""
        return [block for block in self.text_transformer_blocks if isinstance(block, TextBlock)]

    def visual_blocks(self) -> list[VisualBlock]:
        """The visual blocks in order."""
        return [block for block in self.visual_transformer_blocks if isinstance(block, VisualBlock)]

    def modulation_layers(self) -> list[ModulationLayer]:
        """Every modulation layer in the order in which a forward pass runs them."""
        return [module for module in self.modules() if isinstance(module, ModulationLayer)]

    def reset_buffers(self, device: torch.device | str) -> None:
        """Recompute the float32 tables, which checkpoints do not contain, on `device`."""
        for module in self.modules():
            for name, buffer in module.named_buffers(recurse=False):
                setattr(module, name, buffer.to(device))

    def embed_time(self, timestep: Tensor, pooled_text_embed: Tensor) -> Tensor:
        """timestep [B], pooled_text_embed [B, dim2] -> time embedding [B, E], float32."""
        pooled = self.pooled_text_embeddings(pooled_text_embed.to(self.compute_dtype))
        return self.time_embeddings(timestep) + pooled.float()

    def refine_text(self, text_embed: Tensor, activated_time: Tensor, text_mask: KeyMask | None) -> Tensor:
        """text_embed [B, L, dim], silu(time_embed) [B, E] -> refined text tokens [B, L, D]."""
        text = self.text_embeddings(text_embed.to(self.compute_dtype))
        rotary = self.text_rotary((text.shape[1],), (1.0,))
        for block in self.text_blocks():
            text = self._run(
                block, text, block.modulations(activated_time, self.compute_dtype), rotary, text_mask
            )
        return text

    def forward(
        self,
        x: Tensor,
        text_embed: Tensor,
        pooled_text_embed: Tensor,
        timestep: Tensor,
        *,
        scale_factor: tuple[float, float, float] = (1.0, 1.0, 1.0),
        text_mask: Tensor | None = None,
        nabla: NablaParams | None = None,
        residual: BlockResidual | None = None,
    ) -> Tensor:
        """Predict the velocity.

        Args:
            x: [B, F, H, W, channels], channels last; 2 * 16 + 1 channels for models with condition channels.
            text_embed: [B, L, in_text_dim], padded to the right.
            pooled_text_embed: [B, in_text_dim2].
            timestep: [B], 1000 * sigma, float32.
            scale_factor: divisors of the rotary angles along time, height and width; they belong to the task.
            text_mask: [B, L] bool, true for real tokens; None when all are.
            nabla: block-sparse self-attention; H and W must then be multiples of 16.
            residual: replaces or records what the visual blocks add, see `BlockResidual`.
        Returns:
            [B, F, H, W, out_visual_dim] in the compute dtype.
        Raises:
            ValueError: the latents are longer than the model's position tables, or unfit for NABLA.
        """
        activated_time = F.silu(self.embed_time(timestep, pooled_text_embed))
        keys = None if text_mask is None else KeyMask.for_backend(text_mask, self.attention_backend)
        text = self.refine_text(text_embed, activated_time, keys)
        patches = self.visual_embeddings(x.to(self.compute_dtype))  # [B, f, h, w, D]
        grid = (patches.shape[1], patches.shape[2], patches.shape[3])
        rotary = self.visual_rotary(grid, scale_factor)  # [f, h, w, 1, d/2, 2]
        if nabla is None:
            plan = None
            visual, rotary = patches.flatten(1, 3), rotary.flatten(0, 2)
        else:
            plan = make_plan(grid, nabla, x.device, self.nabla_observer)
            visual = to_fractal(patches)
            rotary = to_fractal(rotary.flatten(-3)).view(visual.shape[1], *rotary.shape[-3:])
        rotary = rotary.clone()  # compiled blocks would be tied to the shape of what a view looks into

        if residual is not None and residual.skip and residual.residual is not None:
            visual = visual + residual.residual
        else:
            before = visual
            for index, block in enumerate(self.visual_blocks()):
                visual = self._run(
                    block,
                    visual,
                    text,
                    block.modulations(activated_time, self.compute_dtype),
                    rotary,
                    keys,
                    plan,
                    keeps_attention=index < self.kept_attention_blocks,
                )
            if residual is not None:
                residual.residual = visual - before
        if plan is not None:
            visual = from_fractal(visual, grid)
        return self.out_layer(visual, activated_time, grid)

    def _run(self, block: nn.Module, *inputs: object, keeps_attention: bool = False) -> Tensor:
        """One block, recomputed in the backward when gradient checkpointing is on."""
        if not (self.gradient_checkpointing and torch.is_grad_enabled()):
            return block(*inputs)
        offload = nullcontext() if self.activation_offload is None else self.activation_offload.hooks()
        contexts = keep_attention_outputs if keeps_attention else noop_context_fn
        with offload:
            # No random numbers are drawn inside that the recompute would have to repeat.
            return checkpoint(
                block, *inputs, use_reentrant=False, preserve_rng_state=False, context_fn=contexts
            )


def _triple(values: tuple[int, int, int]) -> tuple[int, int, int]:
    """A tuple even when the sizes come from JSON as a list."""
    first, second, third = values
    return first, second, third
