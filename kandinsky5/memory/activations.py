"""Estimates the activations and the operations of a pass by running the real model on the meta device.

Nothing here depends on what a block computes. A model of two and of three visual blocks (three and four with
offload) is run by the code that trains and samples, and the numbers of the whole depth follow, because all
blocks are alike: one more block adds the difference of the two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dataset.geometry import pixel_frame_count, pixel_size, size_label
from kandinsky5.model.conditioning import FrameConditioning, TextBatch, VelocityModel, condition_frames
from kandinsky5.model.dit import BlockResidual, DiffusionTransformer3D
from kandinsky5.model.flow_matching import flow_matching_loss
from kandinsky5.tasks import Task
from modules.activation_offload import ActivationOffload
from modules.flops import FlopCounter
from modules.live_bytes import LiveBytes
from networks.lora import LoRANetwork

META = torch.device("meta")


@dataclass(frozen=True, kw_only=True, slots=True)
class BatchShape:
    """The sizes of one forward pass."""

    clips: int
    latent_frames: int
    latent_height: int
    latent_width: int
    text_tokens: int
    """Of the longest caption."""

    @property
    def pixel_frames(self) -> int:
        return pixel_frame_count(self.latent_frames)

    @property
    def size(self) -> str:
        """Width x height x frames in pixels, as the training log names buckets."""
        return size_label(*pixel_size(self.latent_height, self.latent_width), self.pixel_frames)

    def video_tokens(self, patch_size: tuple[int, int, int]) -> int:
        """Tokens of one clip."""
        frames, height, width = patch_size
        return (self.latent_frames // frames) * (self.latent_height // height) * (self.latent_width // width)


@dataclass(frozen=True, slots=True)
class Activations:
    """The memory of a pass beside weights, gradients of the LoRA and optimizer, and its operations."""

    device: int
    """Bytes at the peak."""
    flops: int
    """Of products and attention; a multiply and an add are two."""
    self_attention_flops: int
    """The share of dense self-attention, which NABLA computes in part."""
    host: int = 0
    """Bytes of block inputs offloaded to pinned host memory."""
    moved: int = 0
    """The same without the rounding of the allocator: the bytes that travel there and back."""


class EqualOnMeta(TorchDispatchMode):
    """Within it meta tensors compare equal: loading compares the scales of float8 weights."""

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten.equal.default and args[0].is_meta:
            return True
        return func(*args, **(kwargs or {}))


class HostLedger:
    """A `TensorMover` that moves nothing and counts the bytes that would be in host memory."""

    def __init__(self, rounded: Callable[[int], int] = int) -> None:
        self._rounded = rounded
        self.bytes = 0
        """As rounded by the host's allocator."""
        self.moved = 0
        """Of the tensors alone."""

    def to_host(self, tensor: Tensor) -> Tensor:
        self.moved += tensor.nbytes
        self.bytes += self._rounded(tensor.nbytes)
        return torch.empty(1, dtype=tensor.dtype, device=META).expand(tensor.shape)

    def to_device(self, host: Tensor, device: torch.device) -> Tensor:
        return torch.empty(host.shape, dtype=host.dtype, device=device)

    def wait(self, ticket: Tensor) -> Tensor:
        return ticket


def step_activations(
    dit: DiffusionTransformer3D,
    network: LoRANetwork,
    task: Task,
    batch: BatchShape,
    *,
    velocity: Callable[[DiffusionTransformer3D], VelocityModel],
    offload_min_bytes: int | None = None,
    host_rounding: Callable[[int], int] = int,
) -> Activations:
    """Activations of one training step, forward and backward.

    Args:
        dit: whole, on the meta device, with its checkpointing settings.
        network: the LoRA in it, on the meta device too.
        velocity: builds the velocity model as training does.
        offload_min_bytes: block inputs of at least this size go to host memory; None keeps them all.
        host_rounding: bytes of a tensor -> bytes that the host's allocator takes for it.
    """
    depth = dit.dit_params.num_visual_blocks
    kept = dit.kept_attention_blocks

    def run(blocks: int, kept_blocks: int) -> Activations:
        ledger = HostLedger(host_rounding)
        with _shortened(dit, blocks, kept_blocks):
            if offload_min_bytes is not None:
                dit.activation_offload = ActivationOffload(ledger, min_bytes=offload_min_bytes)
            with FlopCounter() as flops:
                peak = peak_of_step(velocity(dit), network, task, batch)
        return Activations(peak, flops.total, flops.self_attention, ledger.bytes, ledger.moved)

    # With offload the first block's input stays, the last one's returns when it is needed, and only with a
    # third block is there one that returns ahead.
    few = 2 if offload_min_bytes is None else 3
    if depth <= few + 1:
        return run(depth, kept)
    if kept == depth:
        shorter, longer = run(few, few), run(few + 1, few + 1)
        return _extended(shorter, shorter, longer, depth - few)
    shorter, longer = run(few, 0), run(few + 1, 0)
    plain = _extended(shorter, shorter, longer, depth - few)
    if not kept:
        return plain
    return _extended(plain, longer, run(few + 1, 1), kept)


def sampling_activations(
    dit: DiffusionTransformer3D,
    task: Task,
    batch: BatchShape,
    *,
    velocity: Callable[[DiffusionTransformer3D], VelocityModel],
    passes: int = 1,
    keeps_residuals: bool = False,
) -> Activations:
    """Activations of the forward passes of one sampling step, whose peak does not grow with the depth.

    Args:
        passes: two with guidance: the first one's velocity waits for the second's.
        keeps_residuals: every pass keeps what its blocks added, for steps that skip them.
    """

    def run(blocks: int) -> Activations:
        with _shortened(dit, blocks, 0), torch.no_grad(), FlopCounter() as flops, LiveBytes() as counted:
            inputs = make_inputs(dit, task, batch)
            residuals = [BlockResidual() if keeps_residuals else None for _ in range(passes)]
            done = [velocity(dit)(*inputs, residual) for residual in residuals]
            del done
        return Activations(counted.peak, flops.total, flops.self_attention)

    depth = dit.dit_params.num_visual_blocks
    if depth <= 2:
        return run(depth)
    two, three = run(2), run(3)
    return replace(_extended(two, two, three, depth - 2), device=two.device)


def _extended(start: Activations, less: Activations, more: Activations, steps: int) -> Activations:
    """start + steps * (more - less), number by number."""
    return Activations(**{
        field.name: getattr(start, field.name)
        + steps * (getattr(more, field.name) - getattr(less, field.name))
        for field in fields(Activations)
    })


@contextmanager
def _shortened(dit: DiffusionTransformer3D, blocks: int, kept: int) -> Iterator[None]:
    """Within the block the model has only its first visual blocks."""
    whole, before = dit.visual_transformer_blocks, (dit.kept_attention_blocks, dit.activation_offload)
    dit.visual_transformer_blocks = nn.ModuleList(list(whole)[:blocks])
    dit.kept_attention_blocks, dit.activation_offload = kept, None
    try:
        yield
    finally:
        dit.visual_transformer_blocks = whole
        dit.kept_attention_blocks, dit.activation_offload = before


def peak_of_step(model: VelocityModel, network: LoRANetwork, task: Task, batch: BatchShape) -> int:
    """Bytes at the peak of forward and backward; without gradients that stay with the LoRA."""
    with LiveBytes() as counted:
        handles = [
            parameter.register_post_accumulate_grad_hook(lambda p: counted.forget(p.grad))
            for parameter in network.parameters()
        ]
        latents, sigma, text, frames = make_inputs(model.dit, task, batch)
        losses = flow_matching_loss(
            lambda noisy, levels: model(noisy, levels, text, frames),
            latents,
            torch.empty_like(latents),
            sigma,
            None if frames is None else frames.predicted_frames(),
        )
        losses.sum().backward()
    for handle in handles:
        handle.remove()
    for parameter in network.parameters():
        parameter.grad = None
    return counted.peak


def make_inputs(
    dit: DiffusionTransformer3D, task: Task, batch: BatchShape
) -> tuple[Tensor, Tensor, TextBatch, FrameConditioning | None]:
    """Latents, sigmas, captions and conditioning frames of a batch, on the meta device."""
    device = next(dit.parameters()).device
    params = dit.dit_params
    shape = (batch.clips, params.in_visual_dim, batch.latent_frames, batch.latent_height, batch.latent_width)
    latents = torch.empty(shape, device=device)
    tokens = (batch.clips, batch.text_tokens)
    text = TextBatch(
        torch.empty(*tokens, params.in_text_dim, dtype=dit.compute_dtype, device=device),
        torch.empty(batch.clips, params.in_text_dim2, dtype=dit.compute_dtype, device=device),
        torch.empty(tokens, dtype=torch.bool, device=device) if batch.clips > 1 else None,
    )
    frames = None
    if task.is_i2v and batch.latent_frames > 1:
        images = torch.empty(*shape[:2], 2, *shape[3:], device=device)
        frames = condition_frames(images, batch.latent_frames)
    return latents, torch.empty(batch.clips, device=device), text, frames
