"""The generation script: all checks first, then the stages, each with its model loaded once and freed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from kandinsky5.checkpoints import save_merged_model
from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation_models import (
    ModelLoader,
    SamplingModel,
    check_models,
    empty_device_cache,
    magcache_ratios,
    read_loras,
    trigger_words,
)
from kandinsky5.generation_plan import GenerationPlanner, budget_remark, fit_budget, largest_request
from kandinsky5.generation_report import generation_report
from kandinsky5.magcache import MagCache
from kandinsky5.outputs import OutputNames, OutputPaths, check_free_space, read_latents, write_outputs
from kandinsky5.prompt_templates import load_prompt_templates
from kandinsky5.prompts import PromptSpec, read_prompt_file
from kandinsky5.run_settings import latent_metadata, repeat_command, settings_metadata, used_multipliers
from kandinsky5.sampling import uses_guidance
from kandinsky5.sampling_pipeline import (
    RequestText,
    decode_frames,
    encode_images,
    encode_prompts,
    sample_latents,
)
from kandinsky5.vae import VideoVAE, check_vae_file
from kandinsky5.video_requests import VideoRequest, log_size_remarks, resolve_request
from modules.byte_sizes import GIB
from modules.devices import pick_device
from modules.dtypes import dtype_name
from modules.errors import ConfigError, DataError, DivergedError, ResourceError
from modules.logs import get_logger, print_report

log = get_logger(__name__)

NABLA_SIZE_DIVISOR = 128
"""Pixels: NABLA selects squares of 8 x 8 tokens of 16 pixels each."""


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
        from kandinsky5.interactive import run_interactive

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
        self.triggers = trigger_words(config, loras)
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
        wants_one_image = self.names.wants_one_image
        request = resolve_request(
            spec.over(config.spec),
            config.task,
            size_divisor=16 if config.dit.nabla is None else NABLA_SIZE_DIVISOR,
            default_frames=1 if wants_one_image else config.task.default_num_frames,
            default_negative_prompt=self.templates.negative_prompt,
            lora_count=len(config.lora.lora_weight),
        )
        problems = []
        if wants_one_image and request.num_frames > 1:
            problems.append(
                f"--output {config.output.output} takes one image but --frames is {request.num_frames}: "
                "use --frames 1, a .mp4, or --output_type images"
            )
        if config.output.trim_tail_frames >= request.num_frames:
            problems.append(f"--trim_tail_frames leaves nothing of {request.num_frames} frames")
        if request.lora_multiplier is not None and config.lora.lora_mode == "merge":
            problems.append("a prompt's own LoRA multipliers (--m) need --lora_mode runtime")
        if problems:
            raise ConfigError([f"{spec.where}: {line}" if spec.where else line for line in problems])
        log_size_remarks(request, config.task)
        return request

    def make(self, requests: Sequence[VideoRequest]) -> list[Path]:
        """Run all stages, each model loaded once and gone before the next; returns the files written."""
        for request in requests:
            log.info("to make this again:\n  %s", repeat_command(self.config, request))
        with _memory_advice("encoding the prompts", "--fp8_llm, --quantized_qwen or --text_encoder_cpu"):
            encoders = self.loader.text_encoders()
            texts = encode_prompts(encoders, requests, self.triggers)
        encoders.free()
        del encoders
        empty_device_cache(self.device)
        vae, images = self._encode_images(requests)
        with _memory_advice("loading the DiT", "--fp8_base or --blocks_to_swap N"):
            model = self.loader.dit()
        done, failures = self._sample_all(model, requests, texts, images)
        del model
        empty_device_cache(self.device)
        written = self._decode_all(vae, done)
        if failures:
            raise DivergedError(failures)
        return written

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
            _memory_advice(f"sampling {size}", advice),
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

    def write(self, vae: VideoVAE | None, sampled: Sampled) -> list[Path]:
        """Decode as far as the output type needs it, and write."""
        config, request = self.config, sampled.request
        paths = self.names.paths(request.seed, request.num_frames)
        settings = self._metadata(request)
        frames: np.ndarray | None = None
        if vae is not None and paths.needs_pixels():
            frames = self._decode_or_keep(vae, sampled, paths)
            frames = frames[: len(frames) - config.output.trim_tail_frames]
        written = write_outputs(
            paths,
            frames=frames,
            latents=sampled.latents,
            fps=config.output.fps,
            crf=config.output.crf,
            metadata=settings,
            latent_metadata=latent_metadata(request, settings) if settings else {},
        )
        for path in written:
            log.info("wrote %s", path)
        return written

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
        return settings_metadata(self.config, request, dtype=dtype, triggers=self.triggers)

    def _encode_images(self, requests: Sequence[VideoRequest]) -> tuple[VideoVAE | None, list[Tensor | None]]:
        """Latents of the given images; the VAE waits in host memory for the decoding."""
        if all(request.image is None for request in requests):
            return None, [None] * len(requests)
        vae = self.loader.vae()
        images = [encode_images(vae, request, tile_px=self.config.vae.tile_px) for request in requests]
        if self.device.type != "cpu":
            vae.to("cpu")
            empty_device_cache(self.device)
        return vae, images

    def _sample_all(
        self,
        model: SamplingModel,
        requests: Sequence[VideoRequest],
        texts: Sequence[RequestText],
        images: Sequence[Tensor | None],
    ) -> tuple[list[Sampled], list[str]]:
        done: list[Sampled] = []
        failures: list[str] = []
        for number, (request, text, image) in enumerate(zip(requests, texts, images, strict=True), start=1):
            if len(requests) > 1:
                log.info("%d of %d: %s", number, len(requests), request.prompt)
            try:
                done.append(self.sample(model, request, text, image))
            except DivergedError as error:  # the others may well come out
                failures += [f"{request.where}: {line}" if request.where else line for line in error.problems]
            except KeyboardInterrupt:
                if not done:
                    raise
                log.warning("interrupted: writing the %d finished", len(done))
                failures.append(f"interrupted at prompt {number} of {len(requests)}")
                break
        return done, failures

    def _decode_all(self, vae: VideoVAE | None, done: Sequence[Sampled]) -> list[Path]:
        if done and self.needs_pixels():
            vae = self.loader.vae() if vae is None else vae.to(self.device)
        written: list[Path] = []
        problems: list[str] = []
        for sampled in done:
            try:
                written += self.write(vae, sampled)
            except ResourceError as error:  # one full disk or failed encoder must not cost the other clips
                problems += error.problems
        if problems:
            raise ResourceError(problems)
        return written

    def _decode_or_keep(self, vae: VideoVAE, sampled: Sampled, paths: OutputPaths) -> np.ndarray:
        """Decode; if that fails for good, keep the latents, which took the time."""
        try:
            return decode_frames(vae, sampled.latents, tile_px=self.config.vae.tile_px)
        except ResourceError as error:
            target = paths.video or paths.image or paths.frames
            assert target is not None
            kept = replace(OutputPaths(), latent=target.with_name(f"{target.stem}_latent.safetensors"))
            write_outputs(
                kept,
                frames=None,
                latents=sampled.latents,
                fps=self.config.output.fps,
                crf=self.config.output.crf,
                metadata={},
                latent_metadata=latent_metadata(sampled.request, self._metadata(sampled.request)),
            )
            raise ResourceError([*error.problems, f"The latents were kept in {kept.latent}"]) from error


def decode_saved_latents(config: GenerateConfig, path: Path, device: torch.device) -> None:
    """Decode a latent file that an earlier run saved; no DiT and no text encoder is touched.

    Raises:
        ConfigError: the output type needs no decoding.
        ModelFileError: the file or the VAE cannot be used.
    """
    if config.output.output_type == "latent":
        raise ConfigError("--latent_path decodes a latent: --output_type video or images is wanted")
    latents, metadata = read_latents(path)
    check_vae_file(config.models.vae)
    names = OutputNames(config.output, makes_many=False)
    seed = int(metadata["seeds"]) if metadata.get("seeds", "").isdigit() else 0
    num_frames = 4 * latents.shape[2] - 3
    paths = names.paths(seed, num_frames)
    vae = ModelLoader(config, (), device, None).vae()
    frames = decode_frames(vae, latents, tile_px=config.vae.tile_px)
    written = write_outputs(
        replace(paths, latent=None),  # it is there already
        frames=frames[: max(1, len(frames) - config.output.trim_tail_frames)],
        latents=None,
        fps=config.output.fps,
        crf=config.output.crf,
        metadata={} if config.output.no_metadata else metadata,
        latent_metadata={},
    )
    for result in written:
        log.info("wrote %s", result)


@contextmanager
def _memory_advice(doing: str, advice: str) -> Iterator[None]:
    """Turn running out of device memory into advice."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise ResourceError(f"device memory ran out while {doing}: use {advice}") from error


def _bytes_needed(requests: Sequence[VideoRequest]) -> int:
    """An upper bound for ordinary footage: a third of the raw frames."""
    return sum(request.width * request.height * request.num_frames for request in requests)
