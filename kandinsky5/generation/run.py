"""The generation script: all checks first, then the stages, each with its model loaded once and freed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.geometry import size_step
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.decode_latents import decode_saved_latents
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
from kandinsky5.generation.outputs import OutputNames, keep_latents, write_outputs
from kandinsky5.generation.plan import GenerationPlanner, budget_remark, fit_budget, largest_request
from kandinsky5.generation.report import generation_report
from kandinsky5.generation.settings import (
    latent_metadata,
    repeat_command,
    settings_metadata,
    used_multipliers,
)
from kandinsky5.memory.advice import memory_advice
from kandinsky5.model.checkpoints import save_merged_model
from kandinsky5.model.magcache import MagCache
from kandinsky5.prompts import PromptSpec, read_prompt_file
from kandinsky5.sampling.pipeline import (
    RequestText,
    decode_frames,
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
from modules.devices import empty_device_cache, pick_device
from modules.dtypes import dtype_name
from modules.errors import ConfigError, DataError, DivergedError, ResourceError, UserError
from modules.files import check_free_space
from modules.logs import get_logger, print_report

log = get_logger(__name__)


def generate(config: GenerateConfig) -> None:
    """Do what the command line asked for.

    Raises:
        UserError: anything the user can mend; nothing half-written is left.
    """
    device = pick_device(config.device)
    if config.latent_path is not None:
        decode_saved_latents(config, config.latent_path, device)
        return
    if config.lora.save_merged_model is not None:
        save_merged_model(
            config.models.dit,
            config.task.dit_params,
            read_loras(config),
            config.lora.save_merged_model,
            device=device,
        )
        log.info("wrote %s", config.lora.save_merged_model)
        return
    makes_many = config.from_file is not None or config.interactive
    names = OutputNames(config.output, makes_many=makes_many, is_dry=config.dry_run)
    run = Run(config, device, names)
    if config.interactive:
        from kandinsky5.generation.interactive import run_interactive

        run_interactive(run)
        return
    requests, problems = collect_requests(run)
    run.fit_budget(requests)
    if config.dry_run:
        print_report(generation_report(run.planner(), requests))
    else:
        check_free_space(names.folder, _bytes_needed(requests))
        run.make(requests)
    if problems:
        total = len(requests) + len(problems)
        done = "planned" if config.dry_run else "made"
        raise DataError([f"{len(requests)} of {total} prompts were {done}; left out:", *problems])


def collect_requests(run: Run) -> tuple[list[VideoRequest], list[str]]:
    """What to make, in order, and one line for every prompt of a file that cannot be made.

    Raises:
        ConfigError: nothing can be made, or the one request of the command line is wrong.
        DataError: nothing can be made, because images are damaged.
    """
    config = run.config
    if config.from_file is None:
        return [run.resolve(config.spec)], []
    prompts = read_prompt_file(config.from_file)
    for note in prompts.notes:
        log.info("%s", note)
    requests: list[VideoRequest] = []
    problems = list(prompts.problems)
    is_data_alone = not problems
    for spec in prompts.specs:
        try:
            requests.append(run.resolve(spec))
        except (ConfigError, DataError) as error:
            problems.append("; ".join(error.problems))
            is_data_alone &= isinstance(error, DataError)
    if not requests:
        raise (DataError if is_data_alone else ConfigError)(problems)
    for problem in problems:
        log.error("left out: %s", problem)
    return requests, problems


@dataclass(frozen=True, slots=True)
class Sampled:
    """A finished sampling."""

    request: VideoRequest
    latents: Tensor
    """[1, 16, F, H, W] float32 on the CPU."""


class Run:
    """One run of the script: its checked inputs, and the stages over any number of requests.

    Building it checks all model files and reads the LoRAs; nothing large is loaded.
    """

    def __init__(self, config: GenerateConfig, device: torch.device, names: OutputNames) -> None:
        self.config, self.device, self.names = config, device, names
        check_models(config, device)
        loras = read_loras(config)
        self.templates = load_prompt_templates(config.text.prompt_templates)
        log_trigger_words(config, loras)
        self.loader = ModelLoader(config, loras, device, self.templates)

    def planner(self) -> GenerationPlanner:
        """Plans for the device; with `--vram_budget` for a CUDA card, wherever it is asked."""
        device = self.device if self.config.vram_budget is None else torch.device("cuda")
        return GenerationPlanner(self.config, self.loader.loras, device)

    def fit_budget(self, requests: Sequence[VideoRequest]) -> None:
        """Take over what `--vram_budget` adds for the largest request.

        Raises:
            ConfigError: nothing fits.
        """
        if self.config.vram_budget is None:
            return
        budget = int(self.config.vram_budget * GIB)
        planner, largest = self.planner(), largest_request(requests)
        chosen = fit_budget(planner, largest, budget)
        log.info("%s", budget_remark(planner, chosen, largest, budget))
        self.config = replace(self.config, dit=chosen)
        self.loader = ModelLoader(self.config, self.loader.loras, self.device, self.templates)

    def resolve(self, spec: PromptSpec) -> VideoRequest:
        """One prompt with its settings, filled up from the command line and the task.

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
        """Run all stages, each model loaded once and gone before the next.

        Raises:
            UserError: something failed; what was finished is written, if only as latents.
        """
        for request in requests:
            log.info("to make this again:\n  %s", repeat_command(self.config, request))
        self.check_vae_values(requests)
        encoders = self.loader.text_encoders()
        with memory_advice("encoding the prompts", ENCODER_ADVICE):
            texts = encode_prompts(encoders, requests)
        encoders.free()
        del encoders
        empty_device_cache(self.device)
        vae, images = self._encode_images(requests)
        model = self.loader.dit()
        finished: deque[Sampled] = deque()
        with self.keeping(finished):
            failures = self._sample_all(model, requests, texts, images, finished)
            del model
            empty_device_cache(self.device)
            failures += self.decode_all(lambda: self._bring_back(vae), finished)
        raise_together(failures)

    def check_vae_values(self, requests: Sequence[VideoRequest] = ()) -> None:
        """Read the VAE through before hours of sampling, unless images of `requests` need it before that.

        Raises:
            ModelFileError: it holds NaN or infinity.
        """
        loads_early = any(request.image is not None for request in requests)
        if self.needs_pixels() and not loads_early and not self.config.dit.no_weight_check:
            check_vae_values(self.config.models.vae)

    def sample(
        self, model: SamplingModel, request: VideoRequest, text: RequestText, image_latents: Tensor | None
    ) -> Sampled:
        """Sample one request, with a progress bar."""
        config = self.config
        model.set_multipliers(used_multipliers(config, request))
        magcache = self._magcache(request)
        size = f"{request.width}x{request.height}, {request.num_frames} frames"
        advice = "--fp8_base, --blocks_to_swap N, fewer --frames or a smaller --width and --height"
        with (
            memory_advice(f"sampling {size}", advice),
            tqdm(total=request.steps, desc=size, unit="step") as progress,
        ):

            def advance(_step: int, _latents: Tensor) -> None:
                progress.update()

            latents = sample_latents(
                model.dit,
                request,
                text,
                task=config.task,
                nabla=config.dit.nabla,
                image_latents=image_latents,
                device=self.device,
                magcache=magcache,
                noise_device=torch.device("cpu") if config.dit.cpu_noise else self.device,
                on_step=advance,
            )
        if magcache is not None:
            log.info("MagCache skipped %d of %d passes", sum(magcache.skipped), len(magcache.skipped))
        return Sampled(request, latents.cpu())

    def decode_all(self, load_vae: Callable[[], VideoVAE], finished: deque[Sampled]) -> list[UserError]:
        """Decode and write what is finished, taking it out; returns what went wrong.

        A full disk or a failed encoder does not cost the other clips.
        """
        vae = load_vae() if finished and self.needs_pixels() else None
        failures: list[UserError] = []
        while finished:
            try:
                self._write(vae, finished[0])
            except ResourceError as error:  # what can be kept of it is kept by now
                failures.append(error)
            finished.popleft()
        return failures

    @contextmanager
    def keeping(self, finished: deque[Sampled]) -> Iterator[None]:
        """However the block ends, the latents of what is still in `finished` then are saved."""
        try:
            yield
        finally:
            while finished:
                log.warning("%s", self._keep(finished.popleft()))

    def _keep(self, sampled: Sampled) -> str:
        paths = self.names.rescue_paths(sampled.request.seed)
        return keep_latents(paths, sampled.latents, self._latent_metadata(sampled.request))

    def _write(self, vae: VideoVAE | None, sampled: Sampled) -> None:
        config, request = self.config, sampled.request
        paths = self.names.paths(request.seed, request.num_frames)
        frames: np.ndarray | None = None
        if vae is not None and paths.needs_pixels():
            try:
                frames = decode_frames(vae, sampled.latents, tile_px=config.vae.tile_px)
            except ResourceError as error:
                raise ResourceError([*error.problems, self._keep(sampled)]) from error
            frames = frames[: len(frames) - config.output.trim_tail_frames]
        written = write_outputs(
            paths,
            frames=frames,
            latents=sampled.latents,
            fps=config.output.fps,
            crf=config.output.crf,
            metadata=self._metadata(request),
            latent_metadata=self._latent_metadata(request),
        )
        for path in written:
            log.info("wrote %s", path)

    def needs_pixels(self) -> bool:
        return self.config.output.output_type != "latent"

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

    def _metadata(self, request: VideoRequest) -> dict[str, str]:
        if self.config.output.no_metadata:
            return {}
        dtype = dtype_name(self.loader.compute_dtype)
        return settings_metadata(self.config, request, dtype=dtype)

    def _latent_metadata(self, request: VideoRequest) -> dict[str, str]:
        settings = self._metadata(request)
        return latent_metadata(request, settings) if settings else {}

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
        requests: Sequence[VideoRequest],
        texts: Sequence[RequestText],
        images: Sequence[Tensor | None],
        finished: deque[Sampled],
    ) -> list[UserError]:
        """Sample all requests into `finished`; returns what went wrong with the others."""
        failures: list[UserError] = []
        for number, (request, text, image) in enumerate(zip(requests, texts, images, strict=True), start=1):
            if len(requests) > 1:
                log.info("%d of %d: %s", number, len(requests), request.prompt)
            try:
                finished.append(self.sample(model, request, text, image))
            except (DivergedError, ResourceError) as error:  # the others may well come out
                where = f"{request.where}: " if request.where else ""
                failures.append(type(error)([f"{where}{line}" for line in error.problems]))
                if len(requests) > 1:
                    log.error("%s", failures[-1])
                empty_device_cache(self.device)
        return failures


def raise_together(failures: Sequence[UserError]) -> None:
    """Raise what was put off, as one error of the first one's kind; nothing if the list is empty."""
    if failures:
        raise type(failures[0])([line for error in failures for line in error.problems])


def _bytes_needed(requests: Sequence[VideoRequest]) -> int:
    """An upper bound for ordinary footage: a third of the raw frames."""
    return sum(request.width * request.height * request.num_frames for request in requests)
