"""Whole sampling runs against diffusers' Kandinsky 5 pipelines, which mostly do what the official code does.

Both sides get the same weights, text embeddings, noise and image. diffusers departs from the official code in
the places named by `Departure`; with all of them set right the latents agree, and each of them alone, left as
diffusers has it, moves the latents by the amount stated beside it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal
from unittest import mock

import pytest
import torch
from diffusers import (
    AutoencoderKLHunyuanVideo,
    FlowMatchEulerDiscreteScheduler,
    Kandinsky5I2VPipeline,
    Kandinsky5T2VPipeline,
    Kandinsky5Transformer3DModel,
)
from diffusers.pipelines.kandinsky5 import pipeline_kandinsky, pipeline_kandinsky_i2v
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.overrides import TorchFunctionMode

from kandinsky5.model.checkpoints import load_dit
from kandinsky5.model.conditioning import TextConditioning
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.sampling.pipeline import (
    ClipInputs,
    RequestText,
    SamplerSettings,
    encode_images,
    encode_prompts,
    sample_latents,
)
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.sampling.sampler import initial_noise, sigma_schedule
from kandinsky5.tasks import TINY_PARAMS, get_task
from kandinsky5.text.encoders import TextEncoders
from kandinsky5.vae.video_vae import VideoVAE, load_vae
from modules.seeding import generator_for
from modules.tensor_files import read_tensors

pytestmark = pytest.mark.usefixtures("one_thread")

CPU = torch.device("cpu")
TASKS = {"t2v": get_task("k5-tiny-t2v"), "i2v": get_task("k5-tiny-i2v")}
WIDTH, HEIGHT = 64, 48

Kind = Literal["t2v", "i2v"]
Departure = Literal["schedule", "timestep_bf16", "rotary_bf16", "rotary_scale", "first_frames_joint"]
"""What diffusers does otherwise than the official code:

    schedule            sigma grid of FlowMatchEulerDiscreteScheduler instead of the shifted linspace
    timestep_bf16       1000 * sigma rounded to bfloat16, as in a bfloat16 model
    rotary_bf16         rotated queries and keys rounded to bfloat16, in float32 models too
    rotary_scale        rotary scale from the pixel size instead of from the checkpoint
    first_frames_joint  one mean and deviation over the first four frames instead of one for each
"""
CHANGES: dict[Kind, dict[Departure, float]] = {
    "t2v": {"schedule": 0.243, "timestep_bf16": 0.067, "rotary_bf16": 2.9e-4, "rotary_scale": 6.1e-3},
    "i2v": {
        "schedule": 0.235,
        "timestep_bf16": 0.064,
        "rotary_bf16": 2.9e-4,
        "rotary_scale": 6.3e-3,
        "first_frames_joint": 0.067,
    },
}
"""Measured: what each of them alone changes, relative to the latents."""


@dataclass(frozen=True)
class Models:
    """One set of weights in both implementations."""

    ours: DiffusionTransformer3D
    our_vae: VideoVAE
    theirs: Kandinsky5Transformer3DModel
    their_vae: AutoencoderKLHunyuanVideo


@pytest.fixture(scope="module")
def both(tiny_models: Path) -> Models:
    path = tiny_models / "model" / "tiny.safetensors"
    params = TINY_PARAMS.as_kwargs()
    params.pop("instruct_type")
    theirs = Kandinsky5Transformer3DModel(**params)
    weights = {name: tensor.float() for name, tensor in read_tensors(path)[0].items()}
    theirs.load_state_dict(weights, strict=False)
    theirs.requires_grad_(False)
    ours = load_dit(path, TINY_PARAMS, device=CPU, compute_dtype=torch.float32)
    assert dict(ours.named_parameters()).keys() == dict(theirs.named_parameters()).keys()
    our_vae = load_vae(tiny_models / "vae", dtype=torch.float32, device=CPU)
    their_vae = AutoencoderKLHunyuanVideo.from_pretrained(tiny_models / "vae", local_files_only=True)
    return Models(ours, our_vae, theirs, their_vae)


def request_of(kind: Kind, image: Path | None = None, **changes: Any) -> VideoRequest:
    settings: dict[str, Any] = {
        "prompt": "a red fox in the snow",
        "negative_prompt": "blurry",
        "width": WIDTH,
        "height": HEIGHT,
        "num_frames": 29,  # 8 latent frames: four are normalised after the other four
        "steps": 3,
        "guidance": 3.0,
        "scheduler_scale": TASKS[kind].scheduler_scale,
        "seed": 3,
        "image": image,
        **changes,
    }
    return VideoRequest(**settings)


@pytest.fixture
def image(tmp_path: Path, media: Path) -> Path:
    """A photo at the clip's size: nothing is left to resize."""
    with Image.open(media / "chelsea.jpg") as photo:
        photo.convert("RGB").resize((WIDTH, HEIGHT)).save(tmp_path / "image.png")
    return tmp_path / "image.png"


def our_latents(models: Models, request: VideoRequest, text: RequestText, kind: Kind) -> Tensor:
    inputs = ClipInputs(request, text, encode_images(models.our_vae, request))
    settings = SamplerSettings(task=TASKS[kind], nabla=None, device=CPU, noise_device=CPU)
    return sample_latents(models.ours, inputs, settings)


class OfficialSchedule(FlowMatchEulerDiscreteScheduler):
    """diffusers' scheduler on the official grid."""

    shift_of_task = 1.0

    def set_timesteps(self, num_inference_steps: int, device: Any = None) -> None:  # type: ignore[override]
        sigmas = sigma_schedule(num_inference_steps, self.shift_of_task)[:-1]  # the final 0 is appended
        super().set_timesteps(sigmas=sigmas.tolist(), device=device)


class KeepFloat32(TorchFunctionMode):
    """Leaves out every rounding to bfloat16; a float32 model has one, after the rotation."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is Tensor.to and torch.bfloat16 in args:
            return args[0]
        return func(*args, **(kwargs or {}))


def frame_by_frame(source: Tensor, reference: Tensor) -> Tensor:
    """diffusers' own normalisation, given one frame at a time. source [B, 4, H, W, C]."""
    normalise = Kandinsky5I2VPipeline.adaptive_mean_std_normalization
    return torch.cat([normalise(frame, reference) for frame in source.split(1, dim=1)], dim=1)


@contextmanager
def rounded_timesteps(transformer: Kandinsky5Transformer3DModel) -> Iterator[None]:
    def round_timestep(_module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        return args, {**kwargs, "timestep": kwargs["timestep"].bfloat16().float()}

    hook = transformer.register_forward_pre_hook(round_timestep, with_kwargs=True)
    yield
    hook.remove()


def build_pipeline(models: Models, kind: Kind, departures: Sequence[Departure]) -> Any:
    official, theirs = OfficialSchedule(shift=1.0), FlowMatchEulerDiscreteScheduler(shift=10.0)
    official.shift_of_task = TASKS[kind].scheduler_scale
    scheduler = theirs if "schedule" in departures else official
    build = Kandinsky5T2VPipeline if kind == "t2v" else Kandinsky5I2VPipeline
    absent: dict[str, Any] = dict.fromkeys(("text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipeline = build(transformer=models.theirs, vae=models.their_vae, scheduler=scheduler, **absent)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def their_latents(
    models: Models, request: VideoRequest, text: RequestText, kind: Kind, departures: Sequence[Departure] = ()
) -> Tensor:
    """The pipeline's latents as [1, 16, F, H, W], with only the given departures from the official code."""
    pipeline = build_pipeline(models, kind, departures)
    noise = rearrange(
        initial_noise(request.seed, request.latent_shape, device=CPU, generator_device=CPU),
        "b c f h w -> b f h w c",
    )
    module = pipeline_kandinsky if kind == "t2v" else pipeline_kandinsky_i2v
    options: dict[str, Any] = {}
    if request.image is not None:
        with Image.open(request.image) as photo:
            options["image"] = photo.copy()
    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(module, "randn_tensor", return_value=noise))
        if "rotary_scale" not in departures:
            factor = TASKS[kind].scale_factor
            stack.enter_context(mock.patch.object(pipeline, "_get_scale_factor", return_value=factor))
        if "first_frames_joint" not in departures and kind == "i2v":
            stack.enter_context(
                mock.patch.object(pipeline, "adaptive_mean_std_normalization", frame_by_frame)
            )
        if "timestep_bf16" in departures:
            stack.enter_context(rounded_timesteps(models.theirs))
        if "rotary_bf16" not in departures:
            stack.enter_context(KeepFloat32())
        latents = pipeline(
            **_embeds(text),
            **options,
            height=request.height,
            width=request.width,
            num_frames=request.num_frames,
            num_inference_steps=request.steps,
            guidance_scale=request.guidance,
            generator=generator_for(request.seed, "image", 0),  # left to the draw from the image's posterior
            output_type="latent",
            return_dict=False,
        )[0]
    return rearrange(latents, "b f h w c -> b c f h w")


def _embeds(text: RequestText) -> dict[str, Tensor]:
    named = {**_one_embed("", text.positive)}
    return named if text.negative is None else {**named, **_one_embed("negative_", text.negative)}


def _one_embed(prefix: str, text: TextConditioning) -> dict[str, Tensor]:
    return {
        f"{prefix}prompt_embeds_qwen": text.text_embeds[None].float(),
        f"{prefix}prompt_embeds_clip": text.pooled_embed[None],
        f"{prefix}prompt_cu_seqlens": torch.tensor([0, len(text.text_embeds)]),
    }


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


def texts_of(encoders: TextEncoders, request: VideoRequest) -> RequestText:
    return encode_prompts(encoders, [request])[0]


@pytest.mark.parametrize("guidance", [1.0, 3.0])
@pytest.mark.parametrize("kind", ["t2v", "i2v"])
def test_with_every_departure_set_right_the_latents_agree(
    kind: Kind, guidance: float, both: Models, encoders: TextEncoders, image: Path
) -> None:
    request = request_of(kind, image if kind == "i2v" else None, guidance=guidance)
    text = texts_of(encoders, request)
    ours, theirs = our_latents(both, request, text, kind), their_latents(both, request, text, kind)
    assert relative_error(theirs, ours) < 2e-6


@pytest.mark.parametrize(
    ("kind", "departure"), [(kind, departure) for kind, changes in CHANGES.items() for departure in changes]
)
def test_each_departure_alone_changes_the_latents_by_a_known_share(
    kind: Kind, departure: Departure, both: Models, encoders: TextEncoders, image: Path
) -> None:
    request = request_of(kind, image if kind == "i2v" else None)
    text = texts_of(encoders, request)
    theirs = their_latents(both, request, text, kind, [departure])
    change = relative_error(theirs, our_latents(both, request, text, kind))
    print(kind, departure, change)
    assert change == pytest.approx(CHANGES[kind][departure], rel=0.25)
