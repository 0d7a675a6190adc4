"""How pixels, frames and latents count, against tables worked out by hand."""

from __future__ import annotations

import pytest

from dataset.geometry import (
    NABLA_STEP,
    PIXEL_STEP,
    latent_frame_count,
    pixel_frame_count,
    pixel_size,
    round_frames,
    size_label,
)


@pytest.mark.parametrize(
    ("length", "rounded"),
    [
        (1, 1),
        (2, 1),
        (4, 1),
        (5, 5),
        (16, 13),
        (17, 17),
        (24, 21),
        (80, 77),
        (81, 81),
        (124, 121),
        (129, 129),
    ],
)
def test_lengths_are_rounded_down_to_4k_plus_1(length: int, rounded: int) -> None:
    assert round_frames(length) == rounded


@pytest.mark.parametrize(("frames", "latents"), [(1, 1), (17, 5), (25, 7), (81, 21), (121, 31), (241, 61)])
def test_four_frames_make_one_latent(frames: int, latents: int) -> None:
    assert latent_frame_count(frames) == latents
    assert pixel_frame_count(latents) == frames


def test_pixel_sizes_are_width_and_height_of_latent_height_and_width() -> None:
    assert pixel_size(48, 84) == (672, 384)
    assert size_label(*pixel_size(48, 84), pixel_frame_count(7)) == "672x384x25"


def test_sides_are_multiples_of_a_patch_or_of_a_block_of_patches() -> None:
    assert (PIXEL_STEP, NABLA_STEP) == (16, 128)
