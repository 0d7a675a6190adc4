"""What a generation will hold and compute, request by request, before anything is loaded.

The stages follow each other and free their models: text encoders, DiT, VAE. The DiT is put together on the
meta device by the code that loads it, and every number of activations is counted on tensors without data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from kandinsky5.configs.generate import DitConfig, GenerateConfig
from kandinsky5.generation.models import ModelLoader, SamplingModel
from kandinsky5.memory.activations import META, AnswerYes, Batch, sampling_activations
from kandinsky5.memory.budget import added_options, fewest_that_fit, too_little_memory, with_reserve
from kandinsky5.memory.plan import Held, hold_weights
from kandinsky5.memory.roofline import NABLA_DENSITY, Work, forward_work
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.modulation_table import table_bytes
from kandinsky5.model.offload import max_blocks_to_swap
from kandinsky5.model.precision import compute_dtype, vae_dtype
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.sampling.sampler import uses_guidance
from kandinsky5.vae.files import vae_without_data
from kandinsky5.vae.video_vae import VideoVAE, square_tiles
from modules.byte_sizes import GIB, size_text
from modules.dtypes import dtype_name
from modules.host_memory import page_locked_size
from modules.live_bytes import LiveBytes
from networks.lora_files import LoadedLora

_DECODED_WINDOWS = 7
"""Latent frames of two windows in time: further ones take no more."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RequestPlan:
    """One video or image."""

    request: VideoRequest
    tokens: int
    passes: int
    """Forward passes of the DiT."""
    work: Work
    """Of one pass."""
    sampling: Held
    decoding: Held

    @property
    def peak(self) -> int:
        """Of the DiT's stage, on the device."""
        return self.sampling.device_bytes


class GenerationPlanner:
    """Plans of one run of the script under any memory options.

    Args:
        device: what is planned for; nothing is allocated on it.
    """

    def __init__(self, config: GenerateConfig, loras: Sequence[LoadedLora], device: torch.device) -> None:
        self.config = config
        self.device = device
        self.dtype = compute_dtype(config.dit.dtype, device)
        self._loras = loras
        self._models: dict[tuple[bool, ...], SamplingModel] = {}
        self._activations: dict[tuple[object, ...], int] = {}
        self._decoding: dict[tuple[int, ...], Held] = {}

    def plan(self, dit: DitConfig, request: VideoRequest) -> RequestPlan:
        """A request under the memory options of `dit`."""
        params = self.config.task.dit_params
        batch = self._batch(request)
        model = self._assemble(dit)
        held = hold_weights(
            model.dit,
            self.device,
            blocks_to_swap=dit.blocks_to_swap,
            modulation_on_host=dit.modulation_on_host,
            ring_size=2,
            force_pin=dit.use_pinned_memory_for_block_swap,
        )
        factors = [p for network in model.networks for p in network.parameters()]
        lora = sum(p.nbytes for p in factors)
        passes = request.steps * (2 if uses_guidance(request.guidance) else 1)
        held += Held(device={"LoRA": lora, "activations": self._rehearse(dit, model, batch, request)})
        held += self._hold_modulation_table(table_bytes(model.dit, passes))
        tokens = batch.video_tokens(params.patch_size)
        return RequestPlan(
            request=request,
            tokens=tokens,
            passes=passes,
            work=forward_work(
                params,
                clips=1,
                video_tokens=tokens,
                text_tokens=batch.text_tokens,
                density=1.0 if dit.nabla is None else NABLA_DENSITY,
            ),
            sampling=held,
            decoding=self._decode(request),
        )

    def _hold_modulation_table(self, size: int) -> Held:
        what = "modulation of all passes"
        if self.device.type == "cuda":
            return Held(page_locked={what: page_locked_size(size)})
        return Held(pageable={what: size})

    def _batch(self, request: VideoRequest) -> Batch:
        _, frames, height, width = request.latent_shape
        return Batch(
            clips=1,
            latent_frames=frames,
            latent_height=height,
            latent_width=width,
            text_tokens=self.config.task.qwen_max_length,
        )

    def _assemble(self, dit: DitConfig) -> SamplingModel:
        key = dit.storage_form
        if key not in self._models:
            plain = replace(
                dit,
                dtype=dtype_name(self.dtype),
                blocks_to_swap=0,
                compile=None,
                use_pinned_memory_for_block_swap=False,
                no_weight_check=True,
            )
            loader = ModelLoader(replace(self.config, dit=plain), self._loras, META, None)
            with AnswerYes():
                model = loader.dit()
            model.dit.set_attention_backend("sdpa")
            model.dit.nabla_observer = None
            self._models[key] = model
        return self._models[key]

    def _rehearse(self, dit: DitConfig, model: SamplingModel, batch: Batch, request: VideoRequest) -> int:
        task = self.config.task
        passes = 2 if uses_guidance(request.guidance) else 1
        has_cache = dit.magcache is not None
        key = (dit.storage_form, batch, passes, has_cache, request.image is None)
        if key not in self._activations:
            self._activations[key] = sampling_activations(
                model.dit,
                task,
                batch,
                velocity=lambda short: VelocityModel(short, task.scale_factor, dit.nabla),
                passes=passes,
                keeps_residuals=has_cache,
            ).device
        return self._activations[key]

    def _decode(self, request: VideoRequest) -> Held:
        """The VAE's weights and the peak of decoding, in tiles if the config says so."""
        config = self.config
        _, frames, height, width = request.latent_shape
        shape = (min(frames, _DECODED_WINDOWS), height, width)
        if shape not in self._decoding:
            vae = VideoVAE(vae_without_data(config.models.vae, vae_dtype(config.vae.vae_dtype, self.device)))
            with LiveBytes() as counted:
                latents = torch.empty(1, request.latent_shape[0], *shape, device=META)
                for _ in vae.decode_windows(latents, tiles=square_tiles(config.vae.tile_px)):
                    pass
            self._decoding[shape] = Held(device={"VAE": vae.weight_bytes, "decoding": counted.peak})
        return self._decoding[shape]


def fit_budget(planner: GenerationPlanner, request: VideoRequest, budget: int) -> DitConfig:
    """The options that make the largest request fit: `--fp8_base`, then as few swapped blocks as will do.

    Options that were given are kept.

    Raises:
        ConfigError: nothing fits.
    """
    given = planner.config.dit
    candidates = [given]
    if not given.has_one_byte_weights:
        candidates.append(replace(given, fp8_base=True))
    most = max_blocks_to_swap(planner.config.task.dit_params)
    if given.blocks_to_swap == 0 and most > 0:
        last = candidates[-1]
        candidates.append(
            fewest_that_fit(
                most,
                lambda count: replace(last, blocks_to_swap=count),
                lambda dit: with_reserve(planner.plan(dit, request).peak) <= budget,
            )
        )
    for dit in candidates:
        if with_reserve(planner.plan(dit, request).peak) <= budget:
            return dit
    smallest = min(candidates, key=lambda dit: planner.plan(dit, request).peak)
    size = f"{request.width}x{request.height}, {request.num_frames} frames"
    raise too_little_memory(
        budget,
        size,
        planner.plan(smallest, request).peak,
        added_options(given, smallest),
        "What helps: fewer --frames, a smaller --width and --height.",
    )


def largest_request(requests: Sequence[VideoRequest]) -> VideoRequest:
    """The request that needs most memory."""
    return max(requests, key=lambda request: request.num_frames * request.width * request.height)


def budget_remark(planner: GenerationPlanner, dit: DitConfig, request: VideoRequest, budget: int) -> str:
    """What `--vram_budget` chose, for the log."""
    plan = planner.plan(dit, request)
    words = " ".join(added_options(planner.config.dit, dit)) or "nothing to add"
    line = (
        f"--vram_budget {budget / GIB:g}: {words} (largest: {request.width}x{request.height}, "
        f"{request.num_frames} frames: {size_text(plan.peak)} planned, "
        f"{size_text(with_reserve(plan.peak))} with reserve)"
    )
    if with_reserve(plan.decoding.device_bytes) > budget:
        line += (
            f"; decoding whole frames would take {size_text(plan.decoding.device_bytes)}: they are "
            "decoded in tiles when memory runs out, or with --vae_tiling"
        )
    return line
