"""The size an image gives a clip, and how the image fills it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from kandinsky5.sampling.images import image_clip_size, image_pixels
from modules.errors import DataError
from tests.dataset.media.test_profiles import P3, P3_PATCHES, PATCHES, picture


@pytest.mark.parametrize(
    ("height", "width", "area", "divisor", "expected"),
    [
        (1080, 1920, 512 * 768, 16, (464, 832)),
        (333, 1001, 512 * 768, 16, (368, 1088)),
        (100, 100, 512 * 768, 16, (624, 624)),  # small images are enlarged
        (1080, 1920, 1024 * 1024, 128, (768, 1408)),
    ],
)
def test_the_official_size_rule(
    height: int, width: int, area: int, divisor: int, expected: tuple[int, int]
) -> None:
    assert image_clip_size(height, width, max_area=area, divisor=divisor) == expected


def test_a_scaled_image_keeps_its_edges_and_a_cropped_one_its_shapes(tmp_path: Path) -> None:
    picture = np.zeros((32, 96, 3), np.uint8)
    picture[:, 32:64] = 255  # a white square in the middle
    Image.fromarray(picture).save(tmp_path / "p.png")
    scaled = image_pixels(tmp_path / "p.png", 32, 32, crop=False)
    cropped = image_pixels(tmp_path / "p.png", 32, 32, crop=True)
    assert scaled.shape == cropped.shape == (1, 3, 1, 32, 32)
    assert torch.all(cropped == 1)
    assert scaled[0, 0, 0, 0, 0] == -1
    assert scaled[0, 0, 0, 0, 16] == 1


def test_pixels_are_whole_levels_in_minus_one_to_one(media: Path) -> None:
    pixels = image_pixels(media / "chelsea.jpg", 96, 128, crop=True)
    levels = (pixels + 1) * 127.5
    torch.testing.assert_close(levels, levels.round(), atol=1e-4, rtol=0)
    assert pixels.min() >= -1
    assert pixels.max() <= 1


def test_a_portrait_image_fills_a_landscape_size_without_stretching(tmp_path: Path) -> None:
    Image.new("RGB", (30, 61), "red").save(tmp_path / "p.png")
    pixels = image_pixels(tmp_path / "p.png", 48, 80, crop=True)
    assert pixels.shape == (1, 3, 1, 48, 80)


def test_a_broken_image_is_a_data_error(tmp_path: Path) -> None:
    (tmp_path / "p.png").write_bytes(b"not a picture")
    with pytest.raises(DataError, match=r"p\.png"):
        image_pixels(tmp_path / "p.png", 32, 32, crop=True)


def test_the_profile_of_an_image_is_used(tmp_path: Path) -> None:
    """What --image and --image_last read; the colours are those of the dataset's tests."""
    picture(P3_PATCHES).save(tmp_path / "p3.png", icc_profile=P3)
    width = 16 * len(PATCHES)
    levels = (image_pixels(tmp_path / "p3.png", 16, width, crop=True) + 1) * 127.5  # [1, 3, 1, 16, width]
    assert np.abs(levels[0, :, 0, 8, 8::16].T.numpy() - PATCHES).max() <= 3
