"""Trains the small base's VAE: pictures first, through an exact 2-D shortcut, then clips."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoCausalConv3d,
)
from torch import Tensor, nn

from kandinsky5.small_world.stage import Stage, StageConfig
from kandinsky5.small_world.world import ALL_SCENES, FRAMES, draw, pick_scenes

VAE_CONFIG = {
    "block_out_channels": (8, 16, 32, 48),
    "layers_per_block": 1,
    "norm_num_groups": 1,  # a norm runs over the whole clip; groups of two channels would lose its brightness
    "latent_channels": 16,
    "scaling_factor": 0.476986,
}
"""Constructor arguments of diffusers' AutoencoderKLHunyuanVideo; compression and scaling are as published."""

PICTURES = StageConfig(
    name="vae_pictures",
    steps=480,
    learning_rate=3e-3,
    betas=(0.9, 0.99),
    warmup_steps=50,
    final_share=0.1,
    weight_decay=1e-4,
    clip_norm=3.0,
    ema_decay=0.99,
)
CLIPS = StageConfig(
    name="vae_clips",
    steps=300,
    learning_rate=6e-4,
    betas=(0.9, 0.99),
    warmup_steps=30,
    constant_share=0.2,
    weight_decay=1e-4,
    clip_norm=3.0,
    ema_decay=0.99,
)

_PICTURES_PER_STEP = 12
_CLIPS_PER_STEP = {1: 12, 5: 5, 9: 3, 17: 2}
"""About equal work per step for every length."""
_LENGTH_CYCLE = (5, 9, 17, 9, 5, 17, 1, 17)
_ANY_COLOUR = 0.3
_SHAPE_WEIGHT = 4.0
"""Extra weight of a pixel of the shape; otherwise the background, nine tenths of a frame, decides alone."""
_KL_WEIGHT = 1e-4
_SHARP_SHARE = 0.35
"""Share at the end of the clip stage with the Charbonnier loss alone, for sharp edges."""


def train_vae(folder: Path, pictures: StageConfig = PICTURES, clips: StageConfig = CLIPS) -> nn.Module:
    """Run or resume both stages, and return the VAE with averaged weights."""
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(**VAE_CONFIG)
    calm_start(vae)
    judged = _Judged()
    stage = Stage(pictures, vae, folder)
    with single_frames_as_pictures(last_tap_only=True):
        stage.run(lambda step, generator: _picture_loss(vae, generator), lambda: judged.measure(vae))
    stage = Stage(clips, vae, folder)
    stage.run(
        lambda step, generator: _clip_loss(vae, step, clips.steps, generator), lambda: judged.measure(vae)
    )
    return vae


def calm_start(vae: Any) -> None:
    """Initialise as a blur to an eighth of the size and back, in colour, without delay in time.

    Blocks start as identities and resampling as blurring or copying. The channels 0 to 2 carry red, green
    and blue, 3 to 5 their negatives: silu(x) - silu(-x) = x, so that the activations at the ends let them
    pass. All weight of time lies on the present frame. With the usual initialisation each causal convolution
    averages over three frames: some 25 of them are a delay line in which the last decoded frame depends on
    the first input frame only, nothing moves, and for minutes no shape and no colour is learnt at all.
    """
    with torch.no_grad():
        for module in vae.modules():
            kind = type(module).__name__
            if kind == "HunyuanVideoResnetBlockCausal3D":
                _zero(module.conv2.conv)
                if module.conv_shortcut is not None:
                    _pass_channels(module.conv_shortcut.conv)
            elif kind == "Attention":
                _zero(module.to_out[0])
            elif kind in ("HunyuanVideoDownsampleCausal3D", "HunyuanVideoUpsampleCausal3D"):
                _pass_channels(module.conv.conv, _BLUR)
        _pass_colours(vae.encoder.conv_in.conv, 1.0, doubled="out")
        _pass_colours(vae.encoder.conv_out.conv, 1.5, doubled="in")
        _pass_channels(vae.quant_conv)
        vae.quant_conv.bias[VAE_CONFIG["latent_channels"] :] = -4  # of the log-variance: little noise
        _pass_channels(vae.post_quant_conv)
        _pass_colours(vae.decoder.conv_in.conv, 1.0, doubled="out")
        _pass_colours(vae.decoder.conv_out.conv, 0.5, doubled="in")
        for module in vae.modules():
            if isinstance(module, HunyuanVideoCausalConv3d) and module.conv.kernel_size[0] == 3:
                module.conv.weight[:, :, :2] = 0


_BLUR = torch.outer(torch.tensor([0.25, 0.5, 0.25]), torch.tensor([0.25, 0.5, 0.25]))
_START_NOISE = 0.3
"""Share of the usual random weights that is kept beside what lets the channels pass."""


def _zero(layer: Any) -> None:
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)


def _pass_channels(conv: Any, kernel: Tensor | None = None) -> None:
    """Each output channel is its input channel, as far as there are both, plus some noise."""
    conv.weight.mul_(_START_NOISE)
    nn.init.zeros_(conv.bias)
    for channel in range(min(conv.weight.shape[:2])):
        if kernel is None:
            conv.weight[channel, channel, -1, 0, 0] += 1  # kernels of one pixel
        else:
            conv.weight[channel, channel, -1] += kernel


def _pass_colours(conv: Any, gain: float, *, doubled: Literal["in", "out"]) -> None:
    """Three signed channels to three and their negatives, or back."""
    conv.weight.mul_(_START_NOISE)
    nn.init.zeros_(conv.bias)
    for colour in range(3):
        for offset, sign in ((0, 1), (3, -1)):
            out, into = (colour + offset, colour) if doubled == "out" else (colour, colour + offset)
            conv.weight[out, into, -1, 1, 1] += sign * gain * (1 if doubled == "out" else 0.5)


@contextmanager
def single_frames_as_pictures(*, last_tap_only: bool) -> Iterator[None]:
    """Within it, a causal convolution of a single frame runs as the 2-D convolution that it is.

    The frames before the first are its copies, so the three taps add up. `last_tap_only` leaves out the
    other two, which hold zeros during the picture stage and then get no gradient.
    """
    full = HunyuanVideoCausalConv3d.forward

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        conv = self.conv
        if hidden_states.shape[2] > 1 or conv.kernel_size[0] == 1:
            return full(self, hidden_states)
        weight = conv.weight[:, :, 2] if last_tap_only else conv.weight.sum(2)
        padded = F.pad(hidden_states[:, :, 0], (1, 1, 1, 1), mode="replicate")
        return F.conv2d(padded, weight, conv.bias, conv.stride[1:])[:, :, None]

    HunyuanVideoCausalConv3d.forward = forward
    try:
        yield
    finally:
        HunyuanVideoCausalConv3d.forward = full


def encode_moments(vae: Any, pixels: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log-variance of the posterior, each [B, 16, F, H, W], unscaled, with gradients."""
    mean, logvar = vae.quant_conv(vae.encoder(pixels)).chunk(2, dim=1)
    return mean, logvar.clamp(-30, 20)


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Unscaled latents to pixels, with gradients."""
    return vae.decoder(vae.post_quant_conv(latents))


def _picture_loss(vae: nn.Module, generator: torch.Generator) -> Tensor:
    scenes = pick_scenes(ALL_SCENES, _PICTURES_PER_STEP, generator)
    times = torch.rand(len(scenes), 1, generator=generator)
    return _loss(vae, draw(scenes, generator, times=times, any_colour=_ANY_COLOUR), generator, sharp=False)


def _clip_loss(vae: nn.Module, step: int, steps: int, generator: torch.Generator) -> Tensor:
    """Clips of every length from anywhere in the motion; single frames use all three taps."""
    length = _LENGTH_CYCLE[step % len(_LENGTH_CYCLE)]
    scenes = pick_scenes(ALL_SCENES, _CLIPS_PER_STEP[length], generator)
    start = torch.rand(len(scenes), 1, generator=generator) * (FRAMES - length) / (FRAMES - 1)
    times = start + torch.arange(length) / (FRAMES - 1)
    pixels = draw(scenes, generator, times=times, any_colour=_ANY_COLOUR)
    with single_frames_as_pictures(last_tap_only=False):
        return _loss(vae, pixels, generator, sharp=step > (1 - _SHARP_SHARE) * steps)


def _loss(vae: nn.Module, pixels: Tensor, generator: torch.Generator, *, sharp: bool) -> Tensor:
    mean, logvar = encode_moments(vae, pixels)
    noise = torch.randn(mean.shape, generator=generator)
    squared = (decode(vae, mean + (0.5 * logvar).exp() * noise) - pixels).square()
    charbonnier = (squared + 1e-4).sqrt()
    error = charbonnier if sharp else squared + 0.5 * charbonnier
    reconstruction = ((1 + _SHAPE_WEIGHT * shape_pixels(pixels)) * error).mean()
    divergence = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    return reconstruction + _KL_WEIGHT * divergence


def shape_pixels(pixels: Tensor) -> Tensor:
    """[B, 3, F, H, W] -> [B, 1, F, H, W], 1 where the picture is saturated, which the background never is."""
    return (pixels.amax(1, keepdim=True) - pixels.amin(1, keepdim=True) > 0.3).float()


class _Judged:
    """Fixed clips that the reports are measured on."""

    def __init__(self, count: int = 12) -> None:
        generator = torch.Generator().manual_seed(99)
        self._clips = draw(pick_scenes(ALL_SCENES, count, generator), generator)

    def measure(self, vae: nn.Module) -> dict[str, Any]:
        clips, firsts = self._clips, self._clips[:, :, :1]
        mean, logvar = encode_moments(vae, clips)
        decoded = decode(vae, mean).clamp(-1, 1)
        shown = shape_pixels(clips).expand_as(clips)
        on_shape = ((decoded - clips).square() * shown).sum() / shown.sum()
        single = decode(vae, encode_moments(vae, firsts)[0]).clamp(-1, 1)
        return {
            "psnr": _psnr((decoded - clips).square().mean()),
            "psnr_shape": _psnr(on_shape),
            "psnr_single": _psnr((single - firsts).square().mean()),
            "latent_std": round(float(mean.std()), 3),
            "posterior_std": round(float((0.5 * logvar).exp().mean()), 3),
        }


def _psnr(squared_error: Tensor) -> float:
    """In dB, for pixels in [-1, 1]."""
    return round(10 * math.log10(4 / float(squared_error)), 2)


@torch.no_grad()
def fold_latent_statistics(vae: Any, clips: int = 64) -> None:
    """Give every latent channel mean 0 and variance 1 after the usual scaling factor.

    A shift and a scale per channel go into the last layer before the latents and the first one after them,
    so that decoding stays the same and `config.json` the ordinary one. Without it the channel means are up
    to two deviations from 0, which is the first thing the DiT would have to learn.
    """
    generator = torch.Generator().manual_seed(5)
    pixels = draw(pick_scenes(ALL_SCENES, clips, generator), generator)
    mean, logvar = (
        torch.cat(part) for part in zip(*(encode_moments(vae, x) for x in pixels.split(8)), strict=True)
    )
    across = (0, 2, 3, 4)
    centre = mean.mean(across)
    variance = mean.var(across) + logvar.exp().mean(across)
    scale = 1 / (variance.sqrt() * vae.config.scaling_factor)  # new = (old - centre) * scale
    channels = len(centre)
    into, out = vae.quant_conv, vae.post_quant_conv
    into.weight[:channels] *= scale[:, None, None, None, None]
    into.bias[:channels] = (into.bias[:channels] - centre) * scale
    into.bias[channels:] += 2 * scale.log()
    out.bias += out.weight[:, :, 0, 0, 0] @ centre
    out.weight /= scale[:, None, None, None]
