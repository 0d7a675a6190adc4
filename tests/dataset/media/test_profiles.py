"""Colours of pictures: profiles and what each format says besides, against formulas written out here."""

from __future__ import annotations

import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms

from dataset.clips import load_clip, plan_clips
from dataset.config.config import load_dataset_config
from dataset.media.media import probe_image, read_image
from dataset.sources.listing import list_items
from tests.dataset.media.icc import cmyk_profile, grey_profile, rgb_profile

Colours = np.ndarray
PATCHES: Colours = np.array([
    (200, 40, 60),
    (60, 160, 90),
    (60, 70, 190),
    (128, 128, 128),
    (255, 255, 255),
    (0, 0, 0),
])

# XYZ of sRGB under D65 (IEC 61966-2-1), and primaries of wider spaces in the same light (printed matrices).
SRGB_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
P3_XYZ = np.array([[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]])
ADOBE_XYZ = np.array([[0.57667, 0.18556, 0.18823], [0.29734, 0.62736, 0.07529], [0.02703, 0.07069, 0.99134]])
BRADFORD_TO_D50 = np.array([[1.0478, 0.0229, -0.0501], [0.0295, 0.9905, -0.0171], [-0.0092, 0.0151, 0.7517]])


def light(value: np.ndarray) -> np.ndarray:
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def number(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * np.maximum(light, 0) ** (1 / 2.4) - 0.055)


def adobe_light(value: np.ndarray) -> np.ndarray:
    return value ** (563 / 256)


def stored(to_xyz: np.ndarray, encode: Callable[[np.ndarray], np.ndarray]) -> Colours:
    """PATCHES as 8-bit numbers of another space."""
    linear = light(PATCHES / 255) @ (np.linalg.inv(to_xyz) @ SRGB_XYZ).T
    return np.round(255 * encode(np.clip(linear, 0, 1))).astype(np.uint8)


def picture(colours: Colours) -> Image.Image:
    """Patches of 16 x 16, side by side."""
    return Image.fromarray(np.repeat(np.repeat(colours[None].astype(np.uint8), 16, axis=1), 16, axis=0))


def found(path: Path) -> Colours:
    """The colours in the middle of the patches."""
    return read_image(path)[8, 8::16].astype(int)


def assert_close(path: Path, expected: Colours, most: int) -> None:
    colours = found(path)
    pairs = zip(expected.tolist(), colours.tolist(), strict=True)
    shown = "  ".join(f"{tuple(source)} -> {tuple(read)}" for source, read in pairs)
    error = int(np.abs(colours - expected).max())
    print(f"{path.name:24} error {error}  {shown}")
    assert error <= most


P3 = rgb_profile((BRADFORD_TO_D50 @ P3_XYZ).T.tolist(), light)
ADOBE = rgb_profile((BRADFORD_TO_D50 @ ADOBE_XYZ).T.tolist(), adobe_light)
P3_PATCHES, ADOBE_PATCHES = stored(P3_XYZ, number), stored(ADOBE_XYZ, lambda x: x ** (256 / 563))
EXACT = {
    ".jpg": {"quality": 100, "subsampling": 0},
    ".webp": {"lossless": True},
    ".avif": {"quality": 100, "subsampling": "4:4:4"},
    ".heic": {"quality": 100, "chroma": 444},
}


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".tif", ".avif", ".heic"])
@pytest.mark.parametrize(
    ("name", "profile", "numbers"), [("p3", P3, P3_PATCHES), ("adobe", ADOBE, ADOBE_PATCHES)]
)
def test_profiles_of_wide_gamuts_are_used(
    tmp_path: Path, name: str, profile: bytes, numbers: Colours, suffix: str
) -> None:
    path = tmp_path / f"{name}{suffix}"
    picture(numbers).save(path, icc_profile=profile, **EXACT.get(suffix, {}))
    assert np.abs(numbers.astype(int) - PATCHES).max() > 10
    assert_close(path, PATCHES, 6 if suffix in {".avif", ".heic"} else 3)
    assert probe_image(path).treatment


def test_srgb_with_and_without_its_profile_is_not_touched(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for name, options in (("srgb.png", {"icc_profile": profile}), ("none.png", {})):
        picture(PATCHES).save(tmp_path / name, **options)
        assert_close(tmp_path / name, PATCHES, 0)
        assert not probe_image(tmp_path / name).treatment


def test_transparent_and_indexed_pictures_are_converted_before_they_are_composited(tmp_path: Path) -> None:
    clear = picture(P3_PATCHES).convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat([[255] * 48 + [0] * 48], 16, axis=0).astype(np.uint8)))
    clear.save(tmp_path / "clear.png", icc_profile=P3)
    assert_close(tmp_path / "clear.png", np.concatenate([PATCHES[:3], np.full((3, 3), 255)]), 3)
    picture(P3_PATCHES).quantize(8).save(tmp_path / "indexed.png", icc_profile=P3)
    assert_close(tmp_path / "indexed.png", PATCHES, 3)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".tif"])
def test_grey_pictures_use_their_profile(tmp_path: Path, suffix: str) -> None:
    levels = np.array([0, 40, 128, 200, 255])
    expected = np.round(255 * number((levels / 255) ** 1.8)).astype(int)
    grey = Image.fromarray(np.repeat(np.repeat(levels[None].astype(np.uint8), 16, axis=1), 16, axis=0))
    path = tmp_path / f"grey{suffix}"
    grey.save(path, icc_profile=grey_profile(lambda x: x**1.8), **EXACT.get(suffix, {}))
    assert_close(path, np.repeat(expected[:, None], 3, axis=1), 2)


def test_16_bit_grey_uses_its_profile_and_grey_may_have_an_rgb_profile(tmp_path: Path) -> None:
    levels = np.array([0, 40, 128, 200, 255])
    expected = np.repeat(np.round(255 * number((levels / 255) ** 1.8)).astype(int)[:, None], 3, axis=1)
    rows = np.repeat(np.repeat(levels[None], 16, axis=1), 16, axis=0)
    profile = grey_profile(lambda x: x**1.8)
    Image.fromarray((rows * 257).astype(np.uint16)).save(tmp_path / "deep.png", icc_profile=profile)
    assert_close(tmp_path / "deep.png", expected, 2)
    profile = rgb_profile((BRADFORD_TO_D50 @ SRGB_XYZ).T.tolist(), lambda x: x**1.8)
    Image.fromarray(rows.astype(np.uint8)).save(tmp_path / "rgb.png", icc_profile=profile)
    assert_close(tmp_path / "rgb.png", expected, 2)


# Lab of the inks, roughly as they are printed: what no formula without a profile gives.
INKS = {
    (0, 0, 0, 0): (100, 0, 0),
    (1, 0, 0, 0): (60, -30, -40),
    (0, 1, 0, 0): (50, 65, -5),
    (0, 0, 1, 0): (90, -5, 80),
}
INKS |= {
    (1, 1, 0, 0): (30, 20, -40),
    (1, 0, 1, 0): (50, -55, 30),
    (0, 1, 1, 0): (48, 60, 40),
    (1, 1, 1, 0): (25, 0, 0),
}


def lab_of_inks(inks: tuple[int, ...]) -> tuple[int, int, int]:
    return INKS.get(tuple(inks), (10, 0, 0))


def srgb_of_lab(lab: tuple[int, ...]) -> np.ndarray:
    """By CIE's formulas, with white adapted from D50 by Bradford."""
    f = np.array([
        (lab[0] + 16) / 116 + lab[1] / 500,
        (lab[0] + 16) / 116,
        (lab[0] + 16) / 116 - lab[2] / 200,
    ])
    xyz = np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * [0.9642, 1, 0.8249]
    linear = np.linalg.inv(SRGB_XYZ) @ np.linalg.inv(BRADFORD_TO_D50) @ xyz
    return np.round(255 * number(np.clip(linear, 0, 1)))


@pytest.mark.parametrize("suffix", [".jpg", ".tif"])
def test_cmyk_pictures_use_their_profile(tmp_path: Path, suffix: str) -> None:
    corners = np.array(list(INKS)) * 255
    path = tmp_path / f"cmyk{suffix}"
    rows = np.repeat(np.repeat(corners[None].astype(np.uint8), 16, axis=1), 16, axis=0)
    image = Image.frombytes("CMYK", (rows.shape[1], 16), rows.tobytes())
    image.save(path, icc_profile=cmyk_profile(lab_of_inks), **EXACT.get(suffix, {}))
    assert_close(path, np.array([srgb_of_lab(lab) for lab in INKS.values()]).astype(int), 5)


def test_the_dcf_option_of_cameras_means_adobe_rgb(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03", 2: b"0100"}
    path = tmp_path / "dcf.jpg"
    picture(ADOBE_PATCHES).save(path, exif=exif, quality=100, subsampling=0)
    assert_close(path, PATCHES, 4)


def with_chunks(path: Path, chunks: dict[bytes, bytes]) -> Path:
    """Insert chunks behind the header of a PNG."""
    content = path.read_bytes()
    extra = b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks.items()
    )
    path.write_bytes(content[:33] + extra + content[33:])
    return path


def test_chunks_of_a_png_count_in_their_order_of_precedence(tmp_path: Path) -> None:
    def save(name: str, numbers: Colours, **options: bytes) -> Path:
        picture(numbers).save(tmp_path / name, **options)
        return tmp_path / name

    linear = np.round(255 * light(PATCHES / 255))
    gamma_1 = {b"gAMA": struct.pack(">I", 100000)}
    mid = PATCHES >= 100
    assert np.abs(found(with_chunks(save("gamma.png", linear), gamma_1)) - PATCHES)[mid].max() <= 2
    p3 = struct.pack(
        ">8I", *(round(v * 100000) for v in (0.3127, 0.329, 0.68, 0.32, 0.265, 0.69, 0.15, 0.06))
    )
    gamma_22 = {b"gAMA": struct.pack(">I", 45455)}
    assert_close(with_chunks(save("chrm.png", P3_PATCHES), {**gamma_22, b"cHRM": p3}), PATCHES, 3)
    assert_close(with_chunks(save("gamma22.png", PATCHES), gamma_22), PATCHES, 0)
    assert_close(with_chunks(save("srgb.png", PATCHES), {**gamma_1, b"sRGB": b"\0"}), PATCHES, 0)
    assert_close(with_chunks(save("iccp.png", P3_PATCHES, icc_profile=P3), gamma_1), PATCHES, 3)
    cicp = {b"cICP": bytes([12, 13, 0, 1])}
    assert_close(with_chunks(save("cicp.png", P3_PATCHES, icc_profile=ADOBE), cicp), PATCHES, 3)


def test_hdr_pictures_are_tone_mapped(tmp_path: Path) -> None:
    """PQ in a PNG (cICP) and in an AVIF (nclx), grey at 100, 203 and 1000 nits."""
    y = (np.array([0, 100, 203, 1000]) / 10000) ** 0.1593017578125
    grey = np.round(255 * ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375)
    colours = np.repeat(grey[:, None], 3, axis=1)
    png, avif = tmp_path / "a.png", tmp_path / "a.avif"
    picture(colours).save(png)
    with_chunks(png, {b"cICP": bytes([9, 16, 0, 1])})
    picture(colours).save(avif, quality=100, subsampling="4:4:4")
    content = avif.read_bytes()
    place = content.index(b"colrnclx") + 8
    avif.write_bytes(content[:place] + struct.pack(">HH", 9, 16) + content[place + 4 :])
    for path in (png, avif):
        black, middle, white, peak = found(path)[:, 1].tolist()
        assert black <= 1
        assert abs(middle - 255 * float(number(np.array(100 / 203)))) <= 4
        assert 235 <= white <= 245
        assert peak >= 253
        assert probe_image(path).colour.colour.is_hdr


@pytest.mark.parametrize(
    ("profile", "words"),
    [
        (b"no profile at all" * 20, "ICC profile"),
        (cmyk_profile(lab_of_inks), "ICC profile for CMYK in a picture of RGB"),
        (P3[:300], "cannot be used"),
    ],
    ids=["noise", "another space", "cut"],
)
def test_a_profile_that_cannot_be_used_is_named_and_the_picture_read(
    tmp_path: Path, profile: bytes, words: str
) -> None:
    path = tmp_path / "a.png"
    picture(PATCHES).save(path, icc_profile=profile)
    (unknown,) = probe_image(path).colour.unknown
    assert words in unknown
    assert_close(path, PATCHES, 0)


def test_frames_and_images_whose_colours_change_are_cached_again(tmp_path: Path) -> None:
    """The conversion is part of the fingerprint, so that caches of the unconverted colours no longer fit."""
    for content, extra in (("image", ""), ("video", "target_frames = [5]\n")):
        (tmp_path / content).mkdir()
        media = "image/a.png" if content == "image" else "video"
        names = ["a"] if content == "image" else [f"{number}" for number in range(5)]
        for name in names:
            picture(P3_PATCHES).save(tmp_path / content / f"{name}.png", icc_profile=P3)
        line = json.dumps({f"{content}_path": str(tmp_path / media), "caption": "c"})
        (tmp_path / f"{content}.jsonl").write_text(line, encoding="utf-8")
        (tmp_path / "d.toml").write_text(
            f"[[datasets]]\n{content}_jsonl_file = '{(tmp_path / content).as_posix()}.jsonl'\n"
            f"cache_directory = '{tmp_path.as_posix()}'\nresolution = [96, 16]\n{extra}",
            encoding="utf-8",
        )
        (dataset,) = load_dataset_config(tmp_path / "d.toml").datasets
        (clip,) = plan_clips(dataset, list_items(dataset), nabla_resize=False).clips
        assert clip.source_fingerprint.endswith("-to-srgb")
        assert np.abs(load_clip(clip)[:, 8, 8::16].astype(int) - PATCHES).max() <= 3
