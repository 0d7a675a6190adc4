"""Trains the small base's DiT on cached latents, with the product's own conditioning and objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from kandinsky5.model.conditioning import (
    FrameConditioning,
    ImageMode,
    TextConditioning,
    VelocityModel,
    condition_frames,
    pad_text,
)
from kandinsky5.model.dit import DiffusionTransformer3D
from kandinsky5.model.flow_matching import flow_matching_loss
from kandinsky5.small_world.caches import ClipCache, TextCache
from kandinsky5.small_world.stage import Stage, StageConfig
from kandinsky5.small_world.world import COLOURS, MOTIONS, SHAPES, WORDINGS, Scene
from kandinsky5.tasks import DitParams, Task
from kandinsky5.training.loss.timesteps import shift_sigma

DIT = StageConfig(
    name="dit",
    steps=3400,
    learning_rate=1.5e-3,
    betas=(0.9, 0.98),
    warmup_steps=100,
    constant_share=0.4,
    weight_decay=0.01,
    clip_norm=1.0,
    ema_decay=0.998,
)

_SHIFT = 3.0
"""Of the drawn sigmas, as in sampling: most steps at high noise, where the caption decides."""
_BATCH = {1: 16, 2: 12, 3: 10, 5: 8}
"""Clips per step and process for each number of latent frames."""
_NO_CAPTION = 0.05
"""Share of clips that are trained with an empty caption."""
_NEGATIVE_EVERY = 20
"""Each so many steps one is trained with the default negative prompt as its caption."""


@dataclass(frozen=True, slots=True)
class _Kind:
    """What a step trains: clips of one length, with or without given frames."""

    latent_frames: int
    image_mode: ImageMode | None = None


_CYCLE = (
    _Kind(5),
    _Kind(5, "first"),
    _Kind(5),
    _Kind(3),
    _Kind(5),
    _Kind(5, "first_last"),
    _Kind(5),
    _Kind(2, "first"),
    _Kind(5),
    _Kind(3, "first"),
    _Kind(1),
    _Kind(3, "first_last"),
    _Kind(2),
)


def train_dit(
    folder: Path, task: Task, clips: ClipCache, texts: TextCache, config: StageConfig = DIT
) -> nn.Module:
    """Run or resume the stage, and return the DiT with averaged weights."""
    dit = initial_dit(task.dit_params, texts)
    model = VelocityModel(dit, task.scale_factor)
    stage = Stage(config, dit, folder)
    check = WordCheck(model, clips, texts)
    stage.run(lambda step, generator: _loss(model, clips, texts, step, generator), check.measure)
    return dit


def initial_dit(params: DitParams, texts: TextCache) -> DiffusionTransformer3D:
    """Modulation and output start at zero, text projections centred and scaled on the world's captions."""
    torch.manual_seed(0)
    dit = DiffusionTransformer3D(**params.as_kwargs())
    for name, param in dit.named_parameters():
        if "modulation" in name or name.startswith("out_layer.") or name.endswith("bias"):
            nn.init.zeros_(param)
        elif param.ndim == 2:
            nn.init.xavier_uniform_(param)
    captions = texts.all_captions()
    tokens = torch.cat([caption.text_embeds for caption in captions]).float()
    pooled = torch.stack([caption.pooled_embed for caption in captions])
    _start_centred(dit.text_embeddings.in_layer, tokens)
    _start_centred(dit.pooled_text_embeddings.in_layer, pooled)
    return dit


def _start_centred(layer: nn.Linear, inputs: Tensor) -> None:
    """Give outputs of mean 0 and deviation 1 over `inputs` [N, dim]: random encoders are far from both."""
    mean = inputs.mean(0)
    deviation = (inputs - mean).square().mean().sqrt()
    weight = torch.randn(layer.weight.shape) / (deviation * inputs.shape[1] ** 0.5)
    with torch.no_grad():
        layer.weight.copy_(weight)
        layer.bias.copy_(-weight @ mean)


def _loss(
    model: VelocityModel, clips: ClipCache, texts: TextCache, step: int, generator: torch.Generator
) -> Tensor:
    kind = _CYCLE[step % len(_CYCLE)]
    rows = torch.randint(len(clips), (_BATCH[kind.latent_frames],), generator=generator)
    latents = clips.draw_latents(rows, kind.latent_frames, generator)
    captions = _captions([clips.scenes[row] for row in rows.tolist()], texts, kind, step, generator)
    text = pad_text(captions, device=latents.device, dtype=latents.dtype)
    frames = _given_frames(clips, rows, kind)
    noise = torch.randn(latents.shape, generator=generator)
    sigma = draw_stratified_sigmas(len(rows), generator)
    predicted = None if frames is None else frames.predicted_frames()
    return flow_matching_loss(
        lambda noisy, at: model(noisy, at, text, frames), latents, noise, sigma, predicted
    ).mean()


def _captions(
    scenes: Sequence[Scene], texts: TextCache, kind: _Kind, step: int, generator: torch.Generator
) -> list[TextConditioning]:
    """One wording for all clips of a step, here and there no caption, and in some steps the negative prompt.

    The negative prompt is several times as long as a caption: alone in its steps it does not pad the others.
    """
    is_image = kind.latent_frames == 1
    if step % _NEGATIVE_EVERY == _NEGATIVE_EVERY - 1:
        return [texts.find(texts.negative_prompt, is_image)] * len(scenes)
    wording = int(torch.randint(len(WORDINGS), (), generator=generator))
    is_empty = torch.rand(len(scenes), generator=generator) < _NO_CAPTION
    return [
        texts.find("" if empty else scene.caption(wording), is_image)
        for scene, empty in zip(scenes, is_empty.tolist(), strict=True)
    ]


def _given_frames(clips: ClipCache, rows: Tensor, kind: _Kind) -> FrameConditioning | None:
    if kind.image_mode is None:
        return None
    ends = clips.singles[rows][:, :, [0, kind.latent_frames - 1]]
    return condition_frames(ends, kind.latent_frames, mode=kind.image_mode)


def draw_stratified_sigmas(count: int, generator: torch.Generator) -> Tensor:
    """One sigma in each of `count` equal parts of the shifted distribution, [count]."""
    uniform = (torch.rand(count, generator=generator) + torch.arange(count)) / count
    return torch.tensor([shift_sigma(u, _SHIFT) for u in uniform.tolist()])


class WordCheck:
    """Use of each caption word by the model: the rise of the loss when that word alone is swapped.

    The loss itself hardly shows whether motion is read from the caption: at low noise it is visible in the
    noisy latents, and at high noise little of the loss depends on it.
    """

    def __init__(self, model: VelocityModel, clips: ClipCache, texts: TextCache, count: int = 48) -> None:
        generator = torch.Generator().manual_seed(11)
        rows = torch.randint(len(clips), (count,), generator=generator)
        self._model = model
        self._texts = texts
        self._latents = clips.draw_latents(rows, 5, generator)
        self._noise = torch.randn(self._latents.shape, generator=generator)
        scenes = [clips.scenes[row] for row in rows.tolist()]
        self._scenes: Mapping[str, Sequence[Scene]] = {
            "true": scenes,
            "shape": [replace(scene, shape=_next(SHAPES[:3], scene.shape)) for scene in scenes],
            "colour": [replace(scene, colour=_next(tuple(COLOURS), scene.colour)) for scene in scenes],
            "motion": [replace(scene, motion=_next(tuple(MOTIONS)[:7], scene.motion)) for scene in scenes],
        }

    @torch.no_grad()
    def measure(self) -> dict[str, object]:
        """The loss at two sigmas, and by how much it rises for each kind of word."""
        figures: dict[str, object] = {}
        for sigma in (0.8, 0.9):
            losses = {name: self._loss(scenes, sigma) for name, scenes in self._scenes.items()}
            true = losses.pop("true")
            figures[f"loss_{sigma}"] = round(true, 4)
            figures[f"swap_{sigma}"] = {name: round(loss - true, 4) for name, loss in losses.items()}
        return figures

    def _loss(self, scenes: Sequence[Scene], sigma: float) -> float:
        captions = [self._texts.find(scene.caption(), False) for scene in scenes]
        text = pad_text(captions, device=self._latents.device, dtype=self._latents.dtype)
        sigmas = torch.full((len(scenes),), sigma)
        loss = flow_matching_loss(
            lambda noisy, at: self._model(noisy, at, text), self._latents, self._noise, sigmas
        )
        return float(loss.mean())


def _next(values: Sequence[str], value: str) -> str:
    return values[(values.index(value) + 1) % len(values)]
