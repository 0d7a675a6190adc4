"""Plans the memory and the operations of a generation, request by request, before anything is loaded.

The stages follow each other and free their models: text encoders, DiT, VAE. The DiT is assembled on the meta
device by the code that loads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from kandinsky5.configs.generate import DitConfig, GenerateConfig
from kandinsky5.configs.weights import DEFAULT_RING_SIZE
from kandinsky5.generation.models import ModelLoader
from kandinsky5.memory.activations import META, Activations, BatchShape, sampling_activations
from kandinsky5.memory.plan import AssembledModel, MemoryPlan, MemoryUsage, Planner
from kandinsky5.model.conditioning import VelocityModel
from kandinsky5.model.modulation_table import table_bytes
from kandinsky5.model.precision import compute_dtype, vae_dtype
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.sampling.sampler import uses_guidance
from kandinsky5.text.files import encoder_bytes
from kandinsky5.vae.files import vae_without_data
from kandinsky5.vae.video_vae import VideoVAE, square_tiles
from modules.byte_sizes import size_text
from modules.dtypes import dtype_name
from modules.host_memory import page_locked_size
from modules.live_bytes import LiveBytes
from networks.lora_files import LoadedLora

_DECODED_WINDOWS = 7
"""Latent frames of two windows in time: further ones take no more."""


class GenerationPlanner(Planner[DitConfig, VideoRequest]):
    """Plans the clips of one start of the script."""

    def __init__(self, config: GenerateConfig, loras: Sequence[LoadedLora], device: torch.device) -> None:
        super().__init__(
            config.dit,
            config.task,
            config.task.dit_params,
            device=device,
            dtype=compute_dtype(config.dit.dtype, device),
        )
        self.config = config
        self._loras = loras
        self._decoding: dict[tuple[int, ...], MemoryUsage] = {}

    def plan(self, options: DitConfig, job: VideoRequest) -> MemoryPlan:
        shape, model = self._shape(job), self.model(options)
        usage = self.weights_usage(options, ring_size=DEFAULT_RING_SIZE)
        lora = sum(p.nbytes for network in model.networks for p in network.parameters())
        activations = self._pass_activations(options, model, shape, job)
        passes_per_step = 2 if uses_guidance(job.guidance) else 1
        passes = job.steps * passes_per_step
        usage += MemoryUsage(device={"LoRA": lora, "activations": activations.device})
        usage += self._modulation_table_usage(table_bytes(model.dit, passes))
        return MemoryPlan(
            shape=shape,
            usage=usage,
            flops=activations.flops * job.steps,
            video_tokens=shape.video_tokens(self.params.patch_size),
            passes=passes,
            decoding=self._decoding_usage(job),
        )

    def advice(self, plan: MemoryPlan) -> str:
        return "What helps: fewer --frames, a smaller --width and --height."

    def assemble(self, options: DitConfig) -> AssembledModel:
        plain = replace(
            options,
            dtype=dtype_name(self.dtype),
            blocks_to_swap=0,
            compile=None,
            use_pinned_memory_for_block_swap=False,
            no_weight_check=True,
        )
        model = ModelLoader(replace(self.config, dit=plain), self._loras, META, None).dit()
        return AssembledModel(model.dit, model.networks)

    def _modulation_table_usage(self, size: int) -> MemoryUsage:
        part = "modulation of all passes"
        if self.device.type == "cuda":
            return MemoryUsage(pinned={part: page_locked_size(size)})
        return MemoryUsage(pageable={part: size})

    def _shape(self, request: VideoRequest) -> BatchShape:
        _, frames, height, width = request.latent_shape
        return BatchShape(
            clips=1,
            latent_frames=frames,
            latent_height=height,
            latent_width=width,
            text_tokens=self.text_tokens,
        )

    def _pass_activations(
        self, options: DitConfig, model: AssembledModel, shape: BatchShape, request: VideoRequest
    ) -> Activations:
        passes = 2 if uses_guidance(request.guidance) else 1
        has_cache = options.magcache is not None

        def count() -> Activations:
            return sampling_activations(
                model.dit,
                self.task,
                shape,
                velocity=lambda short: VelocityModel(short, self.task.scale_factor, options.nabla),
                passes=passes,
                keeps_residuals=has_cache,
            )

        key = (options.storage_form, shape, passes, has_cache, request.image is None)
        return self.activations(key, count, uses_nabla=options.nabla is not None)

    def _decoding_usage(self, request: VideoRequest) -> MemoryUsage:
        """The VAE's weights and the peak of decoding, in tiles if the config asks for them."""
        config = self.config
        _, frames, height, width = request.latent_shape
        shape = (min(frames, _DECODED_WINDOWS), height, width)
        if shape not in self._decoding:
            vae = VideoVAE(vae_without_data(config.models.vae, vae_dtype(config.vae.vae_dtype, self.device)))
            with LiveBytes() as counted:
                latents = torch.empty(1, request.latent_shape[0], *shape, device=META)
                for _ in vae.decode_windows(latents, tiles=square_tiles(config.vae.tile_px)):
                    pass
            usage = MemoryUsage(device={"VAE": vae.weight_bytes, "decoding": counted.peak})
            self._decoding[shape] = usage
        return self._decoding[shape]


def largest_request(requests: Sequence[VideoRequest]) -> VideoRequest:
    """The request that takes the most memory."""
    return max(requests, key=lambda request: request.num_frames * request.width * request.height)


def dry_run_remarks(config: GenerateConfig) -> list[str]:
    """Lines for the plan of a generation: the stages beside the DiT's."""
    tiles = f" in tiles of {config.vae.tile_px} pixels" if config.vae.tile_px else ""
    remarks = [
        "Stages follow each other and free their models. Passes that MagCache skips are counted as run.",
        f"Decoding is for whole frames{tiles}; when memory runs out it starts again in smaller tiles.",
    ]
    sizes = [
        encoder_bytes(config.models.text_encoder_qwen, "qwen"),
        encoder_bytes(config.models.text_encoder_clip, "clip"),
    ]
    known = [size for size in sizes if size is not None]
    where = "host" if config.text.text_encoder_cpu else "device"
    if len(known) == len(sizes):
        remarks.append(
            f"Text encoders, before the DiT: {size_text(sum(known))} of weights in their files, to the "
            f"{where}. --fp8_llm and --quantized_qwen make them smaller; memory for encoding is not counted."
        )
    else:
        remarks.append("The text encoders have not been downloaded yet and are not counted.")
    return remarks
