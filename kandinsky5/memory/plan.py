"""Plans the memory and the operations of a run, part by part, before anything is loaded.

The model is assembled by the code that trains or samples with it, on the meta device from the checkpoint's
header alone. Sizes are added up by the rules of `kandinsky5.model.offload` and `modules.block_swap` for
weights that stream; activations are counted by a run on the meta device (`kandinsky5.memory.activations`).
A CUDA context, the workspaces of libraries and the allocator's roundings are not in the numbers:
`kandinsky5.memory.budget` keeps a reserve for them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Generic, TypeVar

import torch

from dataset.cache.cached_dataset import BatchPlan, CachedDataset
from kandinsky5.configs.train import ModelConfig, TrainConfig
from kandinsky5.configs.weights import WeightsConfig
from kandinsky5.memory.activations import META, Activations, BatchShape, EqualOnMeta, step_activations
from kandinsky5.memory.optimizer import OptimizerMemory, optimizer_memory
from kandinsky5.model import assembly
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import StreamedGroup, choose_page_locking, streamed_groups
from kandinsky5.tasks import DitParams, Task
from modules.host_buffer import page_locked_buffer_size
from modules.staged_copies import STAGING_BUFFERS, staging_size
from modules.weight_files import WeightSource
from networks.lora import LoRANetwork

Options = TypeVar("Options", bound=WeightsConfig)
Job = TypeVar("Job")

NABLA_DENSITY = 0.2
"""The assumed share of block pairs that NABLA keeps. It depends on the clip; the log of a run reports it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryUsage:
    """Bytes by the name of the part, in three kinds of memory, and the bytes that are transferred."""

    device: Mapping[str, int] = field(default_factory=dict)
    pageable: Mapping[str, int] = field(default_factory=dict)
    """Host memory."""
    pinned: Mapping[str, int] = field(default_factory=dict)
    """Pinned host memory, as rounded by the host's allocator."""
    moved: Mapping[str, int] = field(default_factory=dict)
    """Transfers to the device; in a step with gradient checkpointing, weights and activations make two."""

    @property
    def device_bytes(self) -> int:
        return sum(self.device.values())

    @property
    def host_bytes(self) -> int:
        return sum(self.pageable.values()) + sum(self.pinned.values())

    @property
    def moved_bytes(self) -> int:
        return sum(self.moved.values())

    def __add__(self, other: MemoryUsage) -> MemoryUsage:
        return MemoryUsage(
            device={**self.device, **other.device},
            pageable={**self.pageable, **other.pageable},
            pinned={**self.pinned, **other.pinned},
            moved={**self.moved, **other.moved},
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryPlan:
    """One kind of training step, or one clip that is generated."""

    shape: BatchShape
    usage: MemoryUsage
    """At the peak of the DiT's stage."""
    flops: float
    """Operations of the step, or of all passes of the clip."""
    video_tokens: int
    """Of one clip."""
    passes: int = 1
    """Forward passes of a clip."""
    decoding: MemoryUsage = field(default_factory=MemoryUsage)
    """Of the VAE, after the DiT has been freed."""

    @property
    def peak(self) -> int:
        """Bytes on the device in the DiT's stage."""
        return self.usage.device_bytes

    @property
    def label(self) -> str:
        return f"{self.shape.clips} x {self.shape.size}"


def weights_usage(
    dit: DiffusionTransformer3D,
    device: torch.device,
    *,
    blocks_to_swap: int,
    modulation_on_host: bool,
    ring_size: int,
    force_pin: bool = False,
) -> MemoryUsage:
    """Memory of the frozen model after loading, with streamed weights.

    Args:
        dit: on the meta device, with the dtypes of the loaded model.
        device: for which it is planned; nothing is allocated.
    """
    is_streaming_modulation = modulation_on_host and device.type != "cpu"
    groups = streamed_groups(
        dit, blocks_to_swap, wants_modulation=is_streaming_modulation, ring_size=ring_size
    )
    streamed: set[int] = set()
    usage = MemoryUsage()
    for group, is_pinned in zip(groups, choose_page_locking(groups, device, force=force_pin), strict=True):
        streamed.update(id(tensor) for tensor in group.tensors())
        usage += _group_usage(group, device, is_pinned=is_pinned)
    resident: Counter[str] = Counter()
    for name, tensor in (*dit.named_parameters(), *dit.named_buffers()):
        if id(tensor) not in streamed:
            resident["modulation" if "modulation" in name else "weights"] += tensor.nbytes
    return MemoryUsage(device=dict(resident)) + usage


def _group_usage(group: StreamedGroup, device: torch.device, *, is_pinned: bool) -> MemoryUsage:
    """Host copies and buffers of weights that stream."""
    sizes = group.packed_sizes()
    largest = max(sizes)
    buffers = {f"buffers of {group.what}": largest * min(group.ring_size, len(sizes))}
    moved = {group.what: sum(sizes)}
    if is_pinned:
        locked = {group.what: sum(map(page_locked_buffer_size, sizes))}
        return MemoryUsage(device=buffers, pinned=locked, moved=moved)
    usage = MemoryUsage(device=buffers, pageable=moved, moved=moved)
    if device.type != "cuda":
        return usage
    staging = STAGING_BUFFERS * staging_size(largest)
    return usage + MemoryUsage(pinned={f"staging of {group.what}": staging})


def batches_of(data: CachedDataset, text_tokens: int) -> list[BatchShape]:
    """Every batch shape of the first epoch, the largest first; captions are taken as `text_tokens` long."""
    batches = {batch_of(data, plan, text_tokens) for plan in data.epoch_batches(1)}
    return sorted(batches, key=lambda batch: (batch_elements(batch), batch.latent_height), reverse=True)


def batch_of(data: CachedDataset, plan: BatchPlan, text_tokens: int) -> BatchShape:
    """The size of one batch of a dataset."""
    frames, height, width = data.items[plan.items[0]].shape
    return BatchShape(
        clips=len(plan.items),
        latent_frames=frames,
        latent_height=height,
        latent_width=width,
        text_tokens=text_tokens,
    )


def largest_batch(data: CachedDataset, plans: Iterable[BatchPlan], text_tokens: int) -> BatchShape:
    """The shape that requires the most memory."""
    return max((batch_of(data, plan, text_tokens) for plan in plans), key=batch_elements)


def batch_elements(batch: BatchShape) -> tuple[int, int]:
    """Sort key of batches by memory: latent positions of all clips, then of one."""
    clip = batch.latent_frames * batch.latent_height * batch.latent_width
    return batch.clips * clip, clip


class Planner(ABC, Generic[Options, Job]):
    """Plans of one run under any memory options. The model is assembled once per format of its weights.

    Args:
        given: the memory options of the command line.
        params: of the task, with `--override_dit` merged in.
        device: what the run computes on; nothing is allocated there.
    """

    def __init__(
        self,
        given: Options,
        task: Task,
        params: DitParams,
        *,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.given, self.task, self.params = given, task, params
        self.device, self.dtype = device, dtype
        self._models: dict[tuple[object, ...], AssembledModel] = {}
        self._activations: dict[tuple[object, ...], Activations] = {}

    @abstractmethod
    def plan(self, options: Options, job: Job) -> MemoryPlan:
        """A job under these memory options."""

    @abstractmethod
    def advice(self, plan: MemoryPlan) -> str:
        """Advice beyond memory options."""

    @abstractmethod
    def assemble(self, options: Options) -> AssembledModel:
        """The model on the meta device, with the code that the run uses."""

    @property
    def text_tokens(self) -> int:
        """Of the longest possible caption; all captions are planned with it."""
        return self.task.qwen_max_length

    def model(self, options: Options) -> AssembledModel:
        """The assembled model, ready for a run on the meta device."""
        key = options.storage_form
        if key not in self._models:
            with EqualOnMeta():
                model = self.assemble(options)
            # The attention of other libraries has the same inputs and outputs as torch's.
            model.dit.set_attention_backend("sdpa")
            model.dit.nabla_observer = None
            self._models[key] = model
        return self._models[key]

    def weights_usage(self, options: Options, *, ring_size: int) -> MemoryUsage:
        return weights_usage(
            self.model(options).dit,
            self.device,
            blocks_to_swap=options.blocks_to_swap,
            modulation_on_host=options.modulation_on_host,
            ring_size=ring_size,
            force_pin=options.use_pinned_memory_for_block_swap,
        )

    def activations(
        self, key: tuple[object, ...], count: Callable[[], Activations], *, uses_nabla: bool
    ) -> Activations:
        """Activations and operations of a pass, counted once per key; with NABLA at `NABLA_DENSITY`.

        Args:
            count: runs the model on the meta device, where NABLA counts as dense attention.
        """
        if key not in self._activations:
            counted = count()
            if uses_nabla:
                left_out = int((1 - NABLA_DENSITY) * counted.self_attention_flops)
                counted = replace(counted, flops=counted.flops - left_out)
            self._activations[key] = counted
        return self._activations[key]


@dataclass(frozen=True, slots=True)
class AssembledModel:
    """A model without data, with its LoRAs."""

    dit: DiffusionTransformer3D
    networks: tuple[LoRANetwork, ...]


class TrainingPlanner(Planner[ModelConfig, BatchShape]):
    """Plans the steps of a training run.

    Args:
        num_processes: with several, gradients are exchanged through buckets of their size.
        source: names, shapes and dtypes instead of those of the files of `--dit`.
    """

    def __init__(
        self,
        config: TrainConfig,
        device: torch.device,
        dtype: torch.dtype,
        *,
        num_processes: int = 1,
        source: WeightSource | None = None,
    ) -> None:
        model = config.model
        super().__init__(model, model.task, model.dit_params, device=device, dtype=dtype)
        self.config = config
        self._num_processes = num_processes
        self._source = source
        self._optimizer: OptimizerMemory | None = None

    def plan(self, options: ModelConfig, job: BatchShape) -> MemoryPlan:
        optimizer = self._optimizer_memory(options)
        activations = self._step_activations(options, job)
        usage = self.weights_usage(options, ring_size=options.block_swap_ring_size)
        usage += self._lora_usage(options, optimizer)
        # Weights move when the activations are gone.
        usage += MemoryUsage(device={"activations": max(activations.device, optimizer.scratch)})
        if activations.host:
            is_pinned = self.device.type == "cuda"
            away = {"activations": activations.host}
            usage += MemoryUsage(pinned=away) if is_pinned else MemoryUsage(pageable=away)
            usage += MemoryUsage(moved={"activations": activations.moved})
        return MemoryPlan(
            shape=job,
            usage=usage,
            flops=activations.flops,
            video_tokens=job.video_tokens(self.params.patch_size),
        )

    def assemble(self, options: ModelConfig) -> AssembledModel:
        plain = replace(options, base_weights=(), base_weights_multiplier=(), no_weight_check=True)
        dit = assembly.load_model(plain, META, self.dtype, source=self._source)
        network = assembly.build_network(
            self.config.network, dit, 0, allow_partial=options.lora_allow_partial, device=META
        )
        # Dropout would draw masks; they are as small as the LoRA's inner activations.
        network.train(False)
        return AssembledModel(dit, (network,))

    def advice(self, plan: MemoryPlan) -> str:
        options = []
        if plan.shape.clips > 1:
            options.append("batch_size = 1 in the dataset file")
        if plan.shape.latent_frames > 1:
            options.append("fewer frames")
        options.append("a smaller resolution")
        device = plan.usage.device
        if device["LoRA"] + device["gradients"] + device["optimizer"] > plan.peak / 4:
            options.append("a smaller --network_dim or --optimizer_type AdamW8bit")
        return f"What helps: {', '.join(options)}."

    def _optimizer_memory(self, options: ModelConfig) -> OptimizerMemory:
        if self._optimizer is None:  # the same for every format of the frozen weights
            groups = self.model(options).networks[0].parameter_groups(1.0)
            self._optimizer = optimizer_memory(self.config.optimizer, groups, self.device)
        return self._optimizer

    def _lora_usage(self, options: ModelConfig, optimizer: OptimizerMemory) -> MemoryUsage:
        lora = sum(parameter.nbytes for parameter in self.model(options).networks[0].parameters())
        device = {"LoRA": lora, "gradients": lora, "optimizer": optimizer.on_device}
        if self.config.network.ema_decay is not None:
            device["average of the LoRA"] = lora
        if self._num_processes > 1 and not self.config.run.ddp_gradient_as_bucket_view:
            device["exchanged gradients"] = lora
        return MemoryUsage(
            device=device, pageable={"optimizer": optimizer.on_host} if optimizer.on_host else {}
        )

    def _step_activations(self, options: ModelConfig, shape: BatchShape) -> Activations:
        model, offloads = self.model(options), options.gradient_checkpointing_cpu_offload
        kept = options.gradient_checkpointing_keep_attention
        size = (shape.clips, shape.video_tokens(self.params.patch_size), shape.text_tokens)
        key = (options.storage_form, options.gradient_checkpointing, kept, offloads, size)

        def count() -> Activations:
            dit, (network,) = model.dit, model.networks
            dit.gradient_checkpointing, dit.kept_attention_blocks = options.gradient_checkpointing, kept
            return step_activations(
                dit,
                network,
                self.task,
                shape,
                velocity=lambda short: VelocityModel(short, self.task.scale_factor, options.nabla, network),
                offload_min_bytes=assembly.OFFLOADED_BYTES if offloads else None,
                host_rounding=page_locked_buffer_size if self.device.type == "cuda" else int,
            )

        return self.activations(key, count, uses_nabla=options.nabla is not None)
