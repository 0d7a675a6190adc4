"""The stages of a generation over any number of requests: encode, sample, decode, write."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor
from tqdm import tqdm

from dataset.geometry import size_step
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.clips import ClipWriter, Sampled
from kandinsky5.generation.models import (
    ENCODER_ADVICE,
    VAE_ADVICE,
    ModelLoader,
    SamplingModel,
    check_models,
    log_trigger_words,
    magcache_ratios,
    read_loras,
    trigger_words,
)
from kandinsky5.generation.outputs import OutputNames
from kandinsky5.generation.plan import GenerationPlanner, dry_run_remarks, largest_request
from kandinsky5.generation.settings import (
    repeat_command,
    used_multipliers,
)
from kandinsky5.memory.advice import memory_advice
from kandinsky5.memory.bases import base_for
from kandinsky5.memory.budget import choose
from kandinsky5.memory.report import budget_report, plan_report
from kandinsky5.model.magcache import MagCache
from kandinsky5.prompts import PromptSpec
from kandinsky5.sampling.pipeline import (
    ClipInputs,
    SamplerSettings,
    encode_images,
    encode_prompts,
    sample_latents,
)
from kandinsky5.sampling.requests import VideoRequest, log_size_remarks, resolve_request
from kandinsky5.sampling.sampler import uses_guidance
from kandinsky5.text.templates import load_prompt_templates
from kandinsky5.vae.files import check_vae_values
from kandinsky5.vae.video_vae import VideoVAE
from modules.byte_sizes import GIB
from modules.devices import empty_device_cache
from modules.errors import ConfigError, DivergedError, ResourceError, UserError
from modules.logs import get_logger

log = get_logger(__name__)


class GenerationSession:
    """The checked inputs of one start of the script, and the stages over any number of requests.

    Building it checks all model files and reads the LoRAs; nothing large is loaded.
    """

    def __init__(self, config: GenerateConfig, device: torch.device, names: OutputNames) -> None:
        self.config, self.device, self.names = config, device, names
        check_models(config, device)
        loras = read_loras(config)
        self.templates = load_prompt_templates(config.text.prompt_templates)
        log_trigger_words(config, loras)
        self.loader = ModelLoader(config, loras, device, self.templates)
        self.writer = ClipWriter(config, names, self.loader.compute_dtype)

    def planner(self) -> GenerationPlanner:
        """Plans for the device; with `--vram_budget` for a CUDA card, on any machine."""
        device = self.device if self.config.vram_budget is None else torch.device("cuda")
        return GenerationPlanner(self.config, self.loader.loras, device)

    def fit_budget(self, requests: Sequence[VideoRequest]) -> None:
        """Apply the options that `--vram_budget` adds for the largest request.

        Raises:
            ConfigError: nothing fits.
        """
        if self.config.vram_budget is None:
            return
        budget = int(self.config.vram_budget * GIB)
        choice = choose(self.planner(), largest_request(requests), budget, base_for(self.device))
        log.info("%s", budget_report(choice, budget))
        self.config = replace(self.config, dit=choice.options)
        self.loader = ModelLoader(self.config, self.loader.loras, self.device, self.templates)

    def plan_report(self, requests: Sequence[VideoRequest]) -> str:
        """The output of `--dry_run`."""
        planner, dit = self.planner(), self.config.dit
        return plan_report(
            [planner.plan(dit, request) for request in requests],
            planner.device,
            planner.dtype,
            uses_nabla=dit.nabla is not None,
            remarks=dry_run_remarks(self.config),
        )

    def resolve(self, spec: PromptSpec) -> VideoRequest:
        """Resolve one prompt; missing settings come from the command line and the task.

        Raises:
            ConfigError: settings that are impossible or contradict the output.
            DataError: the conditioning image is damaged.
        """
        config = self.config
        request = resolve_request(
            spec.over(config.spec),
            config.task,
            size_divisor=size_step(uses_nabla=config.dit.nabla is not None),
            default_frames=1 if self.names.wants_one_image else config.task.default_num_frames,
            default_negative_prompt=self.templates.negative_prompt,
            lora_count=len(config.lora.lora_weight),
        )
        problems = self.names.problems(request.num_frames, "--frames 1, ")
        if request.lora_multiplier is not None and config.lora.lora_mode == "merge":
            problems.append("a prompt's own LoRA multipliers (--m) need --lora_mode runtime")
        if problems:
            raise ConfigError([f"{spec.where}: {line}" if spec.where else line for line in problems])
        log_size_remarks(request, config.task)
        return replace(request, triggers=self._triggers(request))

    def _triggers(self, request: VideoRequest) -> tuple[str, ...]:
        multipliers = used_multipliers(self.config, request)
        own, count = request.lora_multiplier, len(multipliers)
        if own is not None and len(own) < count:
            rest = ", ".join(f"{multiplier:g}" for multiplier in multipliers[len(own) :])
            prefix = f"{request.where}: " if request.where else ""
            log.info("%s%d multipliers for %d LoRAs: the rest are %s", prefix, len(own), count, rest)
        return trigger_words(self.config, self.loader.loras, multipliers)

    def make(self, requests: Sequence[VideoRequest]) -> None:
        """Run all stages; each model is loaded once and freed before the next.

        Raises:
            UserError: something failed; finished clips are written, at least as latents.
        """
        for request in requests if self.config.output.verbose else ():
            log.info("to make this again:\n  %s", repeat_command(self.config, request))
        self.check_vae_values(requests)
        encoders = self.loader.text_encoders()
        with memory_advice("encoding the prompts", ENCODER_ADVICE):
            texts = encode_prompts(encoders, requests)
        encoders.free()
        del encoders
        empty_device_cache(self.device)
        vae, images = self._encode_images(requests)
        clips = [ClipInputs(*inputs) for inputs in zip(requests, texts, images, strict=True)]
        model = self.loader.dit()
        finished: deque[Sampled] = deque()
        with self.writer.keeping(finished):
            failures = self._sample_all(model, clips, finished)
            del model
            empty_device_cache(self.device)
            failures += self.writer.decode_all(lambda: self._bring_back(vae), finished)
        raise_together(failures)

    def check_vae_values(self, requests: Sequence[VideoRequest] = ()) -> None:
        """Check the VAE's values before sampling, unless images of `requests` load it earlier anyway.

        Raises:
            ModelFileError: it holds NaN or infinity.
        """
        loads_early = any(request.image is not None for request in requests)
        if self.writer.needs_pixels and not loads_early and not self.config.dit.no_weight_check:
            check_vae_values(self.config.models.vae)

    def sample(self, model: SamplingModel, inputs: ClipInputs) -> Sampled:
        """Sample one request, with a progress bar."""
        config, request = self.config, inputs.request
        model.set_multipliers(used_multipliers(config, request))
        magcache = self._magcache(request)
        settings = SamplerSettings(
            task=config.task,
            nabla=config.dit.nabla,
            device=self.device,
            noise_device=torch.device("cpu") if config.dit.cpu_noise else self.device,
            magcache=magcache,
        )
        size = f"{request.width}x{request.height}, {request.num_frames} frames"
        advice = "--fp8_base, --blocks_to_swap N, fewer --frames or a smaller --width and --height"
        with (
            memory_advice(f"sampling {size}", advice),
            tqdm(total=request.steps, desc=size, unit="step") as progress,
        ):

            def advance(_step: int, _latents: Tensor) -> None:
                progress.update()

            latents = sample_latents(model.dit, inputs, settings, on_step=advance)
        if magcache is not None:
            log.info("MagCache skipped %d of %d passes", sum(magcache.skipped), len(magcache.skipped))
        return Sampled(request, latents.cpu())

    def _magcache(self, request: VideoRequest) -> MagCache | None:
        settings, ratios = self.config.dit.magcache, magcache_ratios(self.config)
        if settings is None or ratios is None:
            return None
        return MagCache(
            ratios,
            request.steps,
            uses_guidance=uses_guidance(request.guidance),
            threshold=settings.magcache_threshold,
            max_skips=settings.magcache_k,
            retention=settings.magcache_retention_ratio,
        )

    def _encode_images(self, requests: Sequence[VideoRequest]) -> tuple[VideoVAE | None, list[Tensor | None]]:
        """Latents of the given images; the VAE waits in host memory for the decoding."""
        if all(request.image is None for request in requests):
            return None, [None] * len(requests)
        vae = self.loader.vae()
        with memory_advice("encoding the images", VAE_ADVICE):
            images = [encode_images(vae, request, tile_px=self.config.vae.tile_px) for request in requests]
        if self.device.type != "cpu":
            vae.to("cpu")
            empty_device_cache(self.device)
        return vae, images

    def _bring_back(self, vae: VideoVAE | None) -> VideoVAE:
        if vae is None:
            return self.loader.vae()
        with memory_advice("moving the VAE to the device", VAE_ADVICE):
            return vae.to(self.device)

    def _sample_all(
        self,
        model: SamplingModel,
        clips: Sequence[ClipInputs],
        finished: deque[Sampled],
    ) -> list[UserError]:
        """Sample all clips into `finished`; returns the errors of the others."""
        failures: list[UserError] = []
        for number, clip in enumerate(clips, start=1):
            request = clip.request
            if len(clips) > 1:
                log.info("%d of %d: %s", number, len(clips), request.prompt)
            try:
                finished.append(self.writer.copied(self.sample(model, clip)))
            except (DivergedError, ResourceError) as error:  # the others may well come out
                where = f"{request.where}: " if request.where else ""
                failures.append(type(error)([f"{where}{line}" for line in error.problems]))
                if len(clips) > 1:
                    log.error("%s", failures[-1])
                empty_device_cache(self.device)
        return failures


def raise_together(failures: Sequence[UserError]) -> None:
    """Raise deferred errors as one error of the first one's kind; none if the list is empty."""
    if failures:
        raise type(failures[0])([line for error in failures for line in error.problems])
