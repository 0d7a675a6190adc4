"""What a training run will hold, before anything is loaded: device and host memory and work, part by part.

The model is put together by the code that trains it, on the meta device from the checkpoint's header alone.
Sizes are added up by the rules of `offload.py` and `modules/block_swap.py` for what streams, and activations
are counted in a rehearsal (`memory_rehearsal.py`). A CUDA context, the workspaces of libraries and the
allocator's roundings are not in the numbers: `memory_budget.py` keeps a reserve for them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace

import torch

from dataset.cache.cached_dataset import BatchPlan, CachedDataset
from kandinsky5.configs.train import ModelConfig, TrainConfig
from kandinsky5.memory.activations import META, Activations, AnswerYes, Batch, step_activations
from kandinsky5.memory.optimizer import OptimizerMemory, optimizer_memory
from kandinsky5.memory.roofline import NABLA_DENSITY, Work, training_work
from kandinsky5.model import assembly
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import StreamedGroup, choose_page_locking, streamed_groups
from kandinsky5.tasks import DitParams
from modules.host_buffer import page_locked_buffer_size
from modules.staged_copies import STAGING_BUFFERS, staging_size
from networks.lora import LoRANetwork


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """Bytes by the name of the part, in three kinds of memory, and what of them travels."""

    device: Mapping[str, int] = field(default_factory=dict)
    pageable: Mapping[str, int] = field(default_factory=dict)
    """Host memory."""
    page_locked: Mapping[str, int] = field(default_factory=dict)
    """Host memory that the device reads by itself; as the host's allocator rounds it."""
    moved: Mapping[str, int] = field(default_factory=dict)
    """What crosses the bus; in a step with gradient checkpointing, weights and activations do so twice."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.pageable.values()) + sum(self.page_locked.values())

    @property
    def moved_bytes(self) -> int:
        return sum(self.moved.values())

    def __add__(self, other: Held) -> Held:
        return Held(
            device={**self.device, **other.device},
            pageable={**self.pageable, **other.pageable},
            page_locked={**self.page_locked, **other.page_locked},
            moved={**self.moved, **other.moved},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """One kind of training step."""

    batch: Batch
    held: Held
    """At its peak."""
    work: Work
    video_tokens: int
    """Of one clip."""

    @property
    def peak(self) -> int:
        return self.held.device_bytes


def hold_weights(
    dit: DiffusionTransformer3D,
    device: torch.device,
    *,
    blocks_to_swap: int,
    modulation_on_host: bool,
    ring_size: int,
    force_pin: bool = False,
) -> Held:
    """Where the frozen model lies once it is loaded and its weights stream.

    Args:
        dit: on the meta device, with the dtypes of the loaded model.
        device: for which it is planned; nothing is allocated.
    """
    is_streaming_modulation = modulation_on_host and device.type != "cpu"
    groups = streamed_groups(
        dit, blocks_to_swap, wants_modulation=is_streaming_modulation, ring_size=ring_size
    )
    streamed: set[int] = set()
    held = Held()
    for group, is_locked in zip(groups, choose_page_locking(groups, device, force=force_pin), strict=True):
        streamed.update(id(tensor) for tensor in group.tensors())
        held += _hold_group(group, device, is_page_locked=is_locked)
    resident: Counter[str] = Counter()
    for name, tensor in (*dit.named_parameters(), *dit.named_buffers()):
        if id(tensor) not in streamed:
            resident["modulation" if "modulation" in name else "weights"] += tensor.nbytes
    return Held(device=dict(resident)) + held


def _hold_group(group: StreamedGroup, device: torch.device, *, is_page_locked: bool) -> Held:
    """Host copies and buffers of weights that stream."""
    sizes = group.packed_sizes()
    largest = max(sizes)
    buffers = {f"buffers of {group.what}": largest * min(group.ring_size, len(sizes))}
    moved = {group.what: sum(sizes)}
    if is_page_locked:
        locked = {group.what: sum(map(page_locked_buffer_size, sizes))}
        return Held(device=buffers, page_locked=locked, moved=moved)
    held = Held(device=buffers, pageable=moved, moved=moved)
    if device.type != "cuda":
        return held
    staging = STAGING_BUFFERS * staging_size(largest)
    return held + Held(page_locked={f"staging of {group.what}": staging})


def batches_of(data: CachedDataset, text_tokens: int) -> list[Batch]:
    """Every kind of batch in the first epoch, the largest first; captions are taken as `text_tokens` long."""
    batches = {batch_of(data, plan, text_tokens) for plan in data.epoch_batches(1)}
    return sorted(batches, key=lambda batch: (batch_elements(batch), batch.latent_height), reverse=True)


def batch_of(data: CachedDataset, plan: BatchPlan, text_tokens: int) -> Batch:
    """The size of one batch of a dataset."""
    frames, height, width = data.items[plan.items[0]].shape
    return Batch(
        clips=len(plan.items),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        text_tokens=text_tokens,
    )


def largest_batch(data: CachedDataset, plans: Iterable[BatchPlan], text_tokens: int) -> Batch:
    """The size of the batch that needs most of several."""
    return max((batch_of(data, plan, text_tokens) for plan in plans), key=batch_elements)


def batch_elements(batch: Batch) -> tuple[int, int]:
    """Sorts batches by what they need: latent positions of all clips, then of one."""
    clip = batch.latent_frames * batch.latent_height * batch.latent_width
    return batch.clips * clip, clip


@dataclass(slots=True)
class _Assembled:
    """A model without data, its LoRA and what the optimizer will hold."""

    dit: DiffusionTransformer3D
    network: LoRANetwork
    optimizer: OptimizerMemory


class TrainingPlanner:
    """Plans of one run under any memory options; models are put together once per form of storage.

    Args:
        device: what the run computes on.
        num_processes: with several, gradients are exchanged through buckets of their size.
    """

    def __init__(
        self, config: TrainConfig, device: torch.device, dtype: torch.dtype, *, num_processes: int = 1
    ) -> None:
        self.config = config
        self.device = device
        self.dtype = dtype
        self._num_processes = num_processes
        self._assembled: dict[tuple[bool, ...], _Assembled] = {}
        self._optimizer: OptimizerMemory | None = None
        self._activations: dict[tuple[object, ...], Activations] = {}

    def plan(self, model: ModelConfig, batch: Batch) -> MemoryPlan:
        """A step with this batch under the memory options of `model`."""
        parts = self._assemble(model)
        held = hold_weights(
            parts.dit,
            self.device,
            blocks_to_swap=model.blocks_to_swap,
            modulation_on_host=model.modulation_on_host,
            ring_size=model.block_swap_ring_size,
            force_pin=model.use_pinned_memory_for_block_swap,
        )
        activations = self._rehearse(model, parts, batch)
        held += self._hold_lora(parts)
        # Weights move when the activations are gone.
        held += Held(device={"activations": max(activations.device, parts.optimizer.scratch)})
        if activations.host:
            is_locked = self.device.type == "cuda"
            away = {"activations": activations.host}
            held += Held(page_locked=away) if is_locked else Held(pageable=away)
            held += Held(moved={"activations": activations.moved})
        return MemoryPlan(
            batch=batch,
            held=held,
            work=self._work(model, parts, batch),
            video_tokens=batch.video_tokens(model.dit_params.patch_size),
        )

    @property
    def text_tokens(self) -> int:
        """Of the longest caption there can be, as which all are taken."""
        return self.config.model.task.qwen_max_length

    def _assemble(self, model: ModelConfig) -> _Assembled:
        key = model.storage_form
        if key not in self._assembled:
            plain = replace(model, base_weights=(), base_weights_multiplier=(), no_weight_check=True)
            with AnswerYes():
                dit = assembly.load_model(plain, META, self.dtype)
            # Attention of other libraries has the same inputs and outputs as torch's.
            dit.set_attention_backend("sdpa")
            dit.nabla_observer = None
            network = assembly.build_network(
                self.config.network, dit, 0, allow_partial=model.lora_allow_partial, device=META
            )
            # Dropout would draw masks; they are as small as the LoRA's inner activations.
            network.train(False)
            if self._optimizer is None:  # the same for every form of the frozen weights
                groups = network.parameter_groups(1.0)
                self._optimizer = optimizer_memory(self.config.optimizer, groups, self.device)
            self._assembled[key] = _Assembled(dit, network, self._optimizer)
        return self._assembled[key]

    def _hold_lora(self, parts: _Assembled) -> Held:
        lora = sum(parameter.nbytes for parameter in parts.network.parameters())
        device = {"LoRA": lora, "gradients": lora, "optimizer": parts.optimizer.on_device}
        if self.config.network.ema_decay is not None:
            device["average of the LoRA"] = lora
        if self._num_processes > 1 and not self.config.run.ddp_gradient_as_bucket_view:
            device["exchanged gradients"] = lora
        return Held(
            device=device, pageable={"optimizer": parts.optimizer.on_host} if parts.optimizer.on_host else {}
        )

    def _rehearse(self, model: ModelConfig, parts: _Assembled, batch: Batch) -> Activations:
        offloads = model.gradient_checkpointing_cpu_offload
        kept = model.gradient_checkpointing_keep_attention
        size = (batch.clips, batch.video_tokens(model.dit_params.patch_size), batch.text_tokens)
        key = (model.storage_form, model.gradient_checkpointing, kept, offloads, size)
        if key not in self._activations:
            dit = parts.dit
            dit.gradient_checkpointing, dit.kept_attention_blocks = model.gradient_checkpointing, kept
            self._activations[key] = step_activations(
                dit,
                parts.network,
                model.task,
                batch,
                velocity=lambda short: VelocityModel(
                    short, model.task.scale_factor, model.nabla, parts.network
                ),
                offload_min_bytes=assembly.OFFLOADED_BYTES if offloads else None,
                host_rounding=page_locked_buffer_size if self.device.type == "cuda" else int,
            )
        return self._activations[key]

    def _work(self, model: ModelConfig, parts: _Assembled, batch: Batch) -> Work:
        params: DitParams = model.dit_params
        return training_work(
            params,
            clips=batch.clips,
            video_tokens=batch.video_tokens(params.patch_size),
            text_tokens=batch.text_tokens,
            lora_elements={
                path: sum(parameter.numel() for parameter in adapter.parameters())
                for path, adapter in parts.network.adapters.items()
            },
            gradient_checkpointing=model.gradient_checkpointing,
            kept_attention_blocks=model.gradient_checkpointing_keep_attention,
            density=1.0 if model.nabla is None else NABLA_DENSITY,
        )
