"""Samples during training: prompts are encoded before the model is loaded, clips made between steps.

No random stream of training is read or moved, and the LoRA is left as it was found, so that a run with
samples and one without end in the same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import av
import torch
from torch import Tensor
from tqdm import tqdm

from dataset.geometry import size_step
from kandinsky5.configs.text_encoders import encoders_for_task
from kandinsky5.configs.train import SampleConfig, SavingConfig, TrainConfig
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.offload import resident_weights_on_host
from kandinsky5.model.precision import vae_dtype
from kandinsky5.prompts import PromptSpec, read_prompt_file
from kandinsky5.sampling.pipeline import (
    ClipInputs,
    RequestText,
    SamplerSettings,
    decode_frames,
    encode_images,
    encode_prompts,
    sample_latents,
)
from kandinsky5.sampling.requests import VideoRequest, log_size_remarks, resolve_request
from kandinsky5.sampling.video_files import check_video_encoder
from kandinsky5.text.encoders import check_text_encoder_paths, load_text_encoders
from kandinsky5.text.templates import load_prompt_templates
from kandinsky5.training.sample_files import SampledPrompt, SampleNames, write_sample
from kandinsky5.training.tracking.animation import Animation, animate
from kandinsky5.training.tracking.metrics import FILE_NAME, read_records
from kandinsky5.vae.video_vae import VideoVAE, check_vae_file, load_vae
from modules.devices import empty_device_cache
from modules.errors import ConfigError, DataError, ModelFileError, UserError
from modules.interruption import Interrupted
from modules.logs import get_logger
from modules.messages import counted
from networks.lora import LoRANetwork

log = get_logger(__name__)

DEFAULT_FRAMES = 17
"""Pixel frames of a prompt that names none."""
KIND = "sample"
"""Of the lines in metrics.jsonl."""


@dataclass(frozen=True, slots=True)
class PreparedPrompt:
    """A prompt of the file with its encoder outputs, on the CPU."""

    number: int
    """Position in the prompt file, from 0."""
    request: VideoRequest
    text: RequestText
    image_latents: Tensor | None


@dataclass(frozen=True, slots=True)
class Sample:
    """A finished sample."""

    prompt_number: int
    file_name: str
    animation: Animation | None
    """None without a tracker to show it."""


def is_due(settings: SampleConfig, step: int, epoch: int | None) -> bool:
    """Whether the options ask for samples after `step`, which ended `epoch` if that is given."""
    if settings.sample_prompts is None:
        return False
    if step == 0:
        return settings.sample_at_first
    every = settings.sample_every_n_steps
    return (every is not None and step % every == 0) or _is_due_by_epoch(settings, epoch)


def _is_due_by_epoch(settings: SampleConfig, epoch: int | None) -> bool:
    every = settings.sample_every_n_epochs
    return every is not None and epoch is not None and epoch % every == 0


def prompts_on_record(saving: SavingConfig, step: int) -> set[int]:
    """Numbers of the prompts whose samples of `step` have been made."""
    records = read_records(saving.output_dir / FILE_NAME, saving.output_name, KIND)
    return {record["prompt"] for record in records if record["step"] == step}


def are_missing(config: TrainConfig, step: int, epoch: int | None, num_prompts: int) -> bool:
    """Whether samples are due after `step` and not all of them are on record."""
    return is_due(config.samples, step, epoch) and len(prompts_on_record(config.saving, step)) < num_prompts


def read_requests(config: TrainConfig) -> list[VideoRequest]:
    """The prompts of `--sample_prompts`, every setting decided.

    Raises:
        ConfigError: all problems of the prompts, with file and line.
        DataError: images are damaged, and nothing else is wrong.
    """
    settings, task = config.samples, config.model.task
    if settings.sample_prompts is None:
        return []
    listed = read_prompt_file(settings.sample_prompts)
    for note in listed.notes:
        log.info("%s", note)
    templates = load_prompt_templates(config.samples.prompt_templates)
    defaults = PromptSpec(scheduler_scale=config.model.scheduler_scale)
    requests: list[VideoRequest] = []
    problems = list(listed.problems)
    is_data_alone = not problems
    for spec in listed.specs:
        try:
            request = resolve_request(
                spec.over(defaults),
                task,
                size_divisor=size_step(uses_nabla=config.model.nabla is not None),
                default_frames=DEFAULT_FRAMES,
                default_negative_prompt=templates.negative_prompt,
                lora_count=1,
            )
        except (ConfigError, DataError) as error:
            problems += error.problems
            is_data_alone &= isinstance(error, DataError)
            continue
        log_size_remarks(request, task)
        requests.append(request)
    if problems:
        raise (DataError if is_data_alone else ConfigError)(problems)
    if any(request.num_frames > 1 for request in requests):
        check_video_encoder()
    return requests


def sample_model_problems(config: TrainConfig) -> list[str]:
    """Problems of VAE and text encoders by their headers, for a run that makes samples."""
    settings, params = config.samples, config.model.dit_params
    dims = (params.in_text_dim, params.in_text_dim2)
    problems = check_text_encoder_paths(settings.text_encoder_qwen, settings.text_encoder_clip, dims)
    try:
        check_vae_file(settings.vae)
    except ModelFileError as error:
        problems += error.problems
    return [*problems, "--sample_prompts needs the VAE and both text encoders"] if problems else []


def encode_requests(
    config: TrainConfig, numbered: Sequence[tuple[int, VideoRequest]], device: torch.device
) -> list[PreparedPrompt]:
    """Encode prompts and images, each model loaded once and freed; called before the DiT is loaded."""
    if not numbered:
        return []
    requests = [request for _, request in numbered]
    with _own_random_stream(device):
        texts = _encode_texts(config, requests, device)
        images: list[Tensor | None] = [None] * len(requests)
        if any(request.image is not None for request in requests):
            vae = _load_vae(config, device)
            images = [encode_images(vae, request) for request in requests]
            del vae
            empty_device_cache(device)
    return [
        PreparedPrompt(number, request, text, image)
        for (number, request), text, image in zip(numbered, texts, images, strict=True)
    ]


def _encode_texts(
    config: TrainConfig, requests: Sequence[VideoRequest], device: torch.device
) -> list[RequestText]:
    samples = config.samples
    log.info("encoding %s", counted(len(requests), "sample prompt"))
    settings = encoders_for_task(
        config.model.task,
        config.model.dit_params,
        samples.text_encoder_qwen,
        samples.text_encoder_clip,
        samples.quantization,
    )
    templates = load_prompt_templates(samples.prompt_templates)
    encoders = load_text_encoders(settings, device=device, templates=templates)
    try:
        return encode_prompts(encoders, requests)
    finally:
        encoders.free()


def _load_vae(config: TrainConfig, device: torch.device) -> VideoVAE:
    return load_vae(config.samples.vae, dtype=vae_dtype(config.samples.vae_dtype, device), device=device)


class TrainingSamples:
    """Makes the samples of one process; with several processes the prompts are shared out."""

    def __init__(
        self,
        config: TrainConfig,
        prompts: Sequence[PreparedPrompt],
        device: torch.device,
        names: SampleNames,
        *,
        has_bar: bool,
    ) -> None:
        self._config, self._prompts, self._device, self._names = config, prompts, device, names
        self._has_bar = has_bar

    def make(
        self,
        dit: DiffusionTransformer3D,
        network: LoRANetwork,
        step: int,
        epoch: int | None,
        should_stop: Callable[[], bool],
    ) -> list[Sample]:
        """Sample, decode and write the prompts that are not on record for `step`; returns the samples

        written. Errors are logged and do not end the run.

        Args:
            should_stop: called after every sampling step and before every clip is decoded; the rest is then
                left undone.
        """
        named_epoch = epoch if _is_due_by_epoch(self._config.samples, epoch) else None
        on_record = prompts_on_record(self._config.saving, step)
        prompts = [prompt for prompt in self._prompts if prompt.number not in on_record]
        samples: list[Sample] = []  # grows one by one: what is written before an error stays known
        try:
            with _own_random_stream(self._device):
                latents = self._sample(dit, network, prompts, should_stop)
                if latents:
                    for sample in self._decode(dit, latents, step, named_epoch, should_stop):
                        samples.append(sample)
        except Interrupted:
            pass
        # A RuntimeError is what torch raises for whatever fails on a device, too little memory included.
        except (UserError, OSError, MemoryError, av.FFmpegError, RuntimeError) as error:
            log.error("step %d: samples are missing, training goes on: %s", step, error)
        finally:
            empty_device_cache(self._device)
        return samples

    def _sample(
        self,
        dit: DiffusionTransformer3D,
        network: LoRANetwork,
        prompts: Sequence[PreparedPrompt],
        should_stop: Callable[[], bool],
    ) -> list[tuple[PreparedPrompt, Tensor]]:
        model = self._config.model
        settings = SamplerSettings(
            task=model.task, nabla=model.nabla, device=self._device, noise_device=self._device
        )
        done = []
        total = sum(prompt.request.steps for prompt in prompts)
        with (
            _in_use(network),
            tqdm(total=total, desc="samples", unit="step", leave=False, disable=not self._has_bar) as bar,
        ):

            def after_step(_step: int, _latents: Tensor) -> None:
                bar.update()
                if should_stop():
                    raise Interrupted

            strength = network.multiplier
            for prompt in prompts:
                own = prompt.request.lora_multiplier
                network.set_multiplier(strength if own is None else own[0])
                inputs = ClipInputs(prompt.request, prompt.text, prompt.image_latents)
                latents = sample_latents(dit, inputs, settings, on_step=after_step)
                done.append((prompt, latents.cpu()))
        return done

    def _decode(
        self,
        dit: DiffusionTransformer3D,
        latents: Sequence[tuple[PreparedPrompt, Tensor]],
        step: int,
        epoch: int | None,
        should_stop: Callable[[], bool],
    ) -> Iterator[Sample]:
        moves = self._config.samples.offload_dit_during_sampling
        with resident_weights_on_host(dit, self._device, enabled=moves):
            empty_device_cache(self._device)
            vae = _load_vae(self._config, self._device)
            for prompt, clip in latents:
                if should_stop():
                    raise Interrupted
                frames = decode_frames(vae, clip)
                request = prompt.request
                sampled = SampledPrompt(prompt.number, request.prompt, request.seed)
                path = write_sample(self._names, frames, sampled, step=step, epoch=epoch)
                log.info("wrote %s", path)
                shown = animate(frames) if self._config.tracking.uses_tensorboard else None
                yield Sample(prompt.number, path.name, shown)
            del vae
            empty_device_cache(self._device)


@contextmanager
def _in_use(network: LoRANetwork) -> Iterator[None]:
    """Within the block the network is used and not trained: no dropout, and its strength may be changed."""
    was_training, multiplier = network.training, network.multiplier
    network.eval()
    try:
        yield
    finally:
        network.train(was_training)
        network.set_multiplier(multiplier)


@contextmanager
def _own_random_stream(device: torch.device) -> Iterator[None]:
    """What the block draws from torch's global generators does not move them."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield
