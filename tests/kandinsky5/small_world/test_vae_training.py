"""The start of the small VAE and its shortcuts change nothing they should not."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.autoencoders.autoencoder_kl_hunyuan_video import (
    AutoencoderKLHunyuanVideo,
    HunyuanVideoCausalConv3d,
)
from torch import Tensor

from kandinsky5.small_world.vae_training import (
    VAE_CONFIG,
    calm_start,
    decode,
    encode_moments,
    fold_latent_statistics,
    shape_pixels,
    single_frames_as_pictures,
)
from kandinsky5.small_world.world import ALL_SCENES, Scene, draw, pick_scenes


def new_vae(*, is_calm: bool = True) -> Any:
    torch.manual_seed(0)
    vae = AutoencoderKLHunyuanVideo(**VAE_CONFIG)
    if is_calm:
        calm_start(vae)
    return vae.requires_grad_(False)


def pictures(count: int) -> Tensor:
    """[count, 3, 1, 64, 64] with the middle of the motion."""
    generator = torch.Generator().manual_seed(0)
    return draw(pick_scenes(ALL_SCENES, count, generator), generator, times=torch.tensor([0.5]))


def test_a_single_frame_convolved_as_a_picture_is_the_causal_convolution() -> None:
    torch.manual_seed(0)
    conv = HunyuanVideoCausalConv3d(3, 4, stride=(1, 2, 2))
    frame = torch.randn(2, 3, 1, 8, 8)
    with torch.no_grad():
        expected = conv(frame)
        with single_frames_as_pictures(last_tap_only=False):
            torch.testing.assert_close(conv(frame), expected)
        conv.conv.weight[:, :, :2] = 0
        expected = conv(frame)
        with single_frames_as_pictures(last_tap_only=True):
            torch.testing.assert_close(conv(frame), expected)
        clip = torch.randn(2, 3, 5, 8, 8)
        expected = conv(clip)
        with single_frames_as_pictures(last_tap_only=True):
            torch.testing.assert_close(conv(clip), expected)


def test_the_calm_start_shows_place_and_colour_before_any_training() -> None:
    vae, frames = new_vae(), pictures(6)
    shown = decode(vae, encode_moments(vae, frames)[0])
    weights = shape_pixels(frames)
    for frame, result, weight in zip(frames, shown, weights, strict=True):
        colour = (frame * weight).sum((1, 2, 3)) / weight.sum()
        decoded = (result * weight).sum((1, 2, 3)) / weight.sum()
        around = (result * (1 - weight)).sum((1, 2, 3)) / (1 - weight).sum()
        difference = decoded - around
        background = (frame * (1 - weight)).sum((1, 2, 3)) / (1 - weight).sum()
        assert torch.cosine_similarity(difference, colour - background, dim=0) > 0.9


def test_only_at_the_calm_start_the_last_frame_depends_on_the_end_of_the_clip() -> None:
    pixels = draw([Scene("circle", "red", "right")], torch.Generator().manual_seed(0)).requires_grad_()
    shares = []
    for is_calm in (True, False):
        vae = new_vae(is_calm=is_calm)
        last = decode(vae, encode_moments(vae, pixels)[0])[:, :, -1]
        weights = torch.randn(last.shape, generator=torch.Generator().manual_seed(1))
        (gradient,) = torch.autograd.grad((last * weights).sum(), pixels)
        energy = gradient.square().sum((0, 1, 3, 4))
        shares.append(float(energy[-1] / energy.sum()))
    calm, usual = shares
    assert calm > 0.8
    assert usual < 0.2


def test_folding_the_statistics_centres_the_latents_and_leaves_decoding_as_it_was() -> None:
    vae = new_vae()
    frames = pictures(4)
    before = decode(vae, encode_moments(vae, frames)[0])
    fold_latent_statistics(vae, clips=16)
    mean, _ = encode_moments(vae, frames)
    torch.testing.assert_close(decode(vae, mean), before, rtol=1e-3, atol=1e-3)
    generator = torch.Generator().manual_seed(5)
    clips = draw(pick_scenes(ALL_SCENES, 16, generator), generator)
    mean, logvar = encode_moments(vae, clips)
    scale = vae.config.scaling_factor
    variance = scale**2 * (mean.var((0, 2, 3, 4)) + logvar.exp().mean((0, 2, 3, 4)))
    torch.testing.assert_close(scale * mean.mean((0, 2, 3, 4)), torch.zeros(16), rtol=0, atol=0.02)
    torch.testing.assert_close(variance, torch.ones(16), rtol=0.02, atol=0)
