"""Images: upright, composited, scaled, and refused where they are broken."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dataset.media.files import IMAGE_EXTENSIONS
from dataset.media.media import (
    DAMAGED,
    TOO_LARGE,
    UNREADABLE,
    MediaError,
    probe_image,
    read_image,
    resize_and_crop,
    source_fingerprint,
)

TRANSPOSES = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def refused(path: Path) -> MediaError:
    """The error that reading (or already probing) a file ends in."""

    def look(path: Path) -> None:
        probe_image(path)
        read_image(path)

    with pytest.raises(MediaError) as caught:
        look(path)
    assert caught.value.exit_code == 3
    assert str(path.parent) not in caught.value.detail
    return caught.value


@pytest.mark.parametrize("suffix", [".png", ".webp", ".jpg"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_all_exif_orientations_come_out_upright(tmp_path: Path, orientation: int, suffix: str) -> None:
    upright = np.zeros((32, 48, 3), np.uint8)
    upright[:8, :16] = (255, 0, 0)
    upright[16:] = (0, 255, 0)
    image = Image.fromarray(upright)
    if orientation in TRANSPOSES:
        image = image.transpose(TRANSPOSES[orientation])
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a{suffix}"
    options = {".jpg": {"quality": 100, "subsampling": 0}, ".webp": {"lossless": True}, ".png": {}}
    image.save(path, exif=exif, **options[suffix])
    assert probe_image(path).size == (48, 32)
    assert np.abs(read_image(path).astype(int) - upright).max() <= (4 if suffix == ".jpg" else 0)


def test_orientation_is_found_behind_the_pixels_of_a_png(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (48, 32)).save(path)
    exif = Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = b"eXIf" + raw
    content = path.read_bytes()
    late = struct.pack(">I", len(raw)) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:-12] + late + content[-12:])
    assert probe_image(path).size == (32, 48)
    assert read_image(path).shape == (48, 32, 3)


@pytest.mark.parametrize("is_compressed", [False, True])
def test_orientation_is_found_in_the_xmp_of_a_png(tmp_path: Path, is_compressed: bool) -> None:
    path = tmp_path / "a.png"
    Image.new("RGB", (48, 32)).save(path)
    xmp = b'<x:xmpmeta><rdf:Description tiff:Orientation="6"/></x:xmpmeta>'
    text = zlib.compress(xmp) if is_compressed else xmp
    chunk = b"iTXtXML:com.adobe.xmp\0" + bytes([is_compressed, 0, 0, 0]) + text
    content = path.read_bytes()
    header = 8 + 25  # signature and IHDR
    early = struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk))
    path.write_bytes(content[:header] + early + content[header:])
    assert probe_image(path).size == (32, 48)
    assert read_image(path).shape == (48, 32, 3)


def test_hidden_colours_of_transparent_pixels_are_not_seen(tmp_path: Path) -> None:
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[..., 0] = 255  # red all over,
    pixels[0, 0, 3] = 255  # shown in one corner,
    pixels[0, 1, 3] = 128  # half in the next
    Image.fromarray(pixels, "RGBA").save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png")
    assert read[0, 0].tolist() == [255, 0, 0]
    assert np.abs(read[0, 1].astype(int) - [255, 127, 127]).max() <= 1
    assert (read[1:] == 255).all()


def test_palette_and_grey_transparency_are_composited_over_white(tmp_path: Path) -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    palette.save(tmp_path / "p.png", transparency=0)
    assert read_image(tmp_path / "p.png").tolist() == [[[255, 255, 255], [0, 0, 255]]]
    Image.fromarray(np.array([[[10, 0], [10, 255]]], np.uint8), "LA").save(tmp_path / "la.png")
    assert read_image(tmp_path / "la.png").tolist() == [[[255, 255, 255], [10, 10, 10]]]


def test_grey_palette_and_cmyk_become_rgb(tmp_path: Path) -> None:
    Image.new("L", (2, 2), 77).save(tmp_path / "l.png")
    assert (read_image(tmp_path / "l.png") == 77).all()
    Image.new("1", (2, 2), 1).save(tmp_path / "1.png")
    assert (read_image(tmp_path / "1.png") == 255).all()
    palette = Image.new("P", (2, 2))
    palette.putpalette([1, 2, 3])
    palette.save(tmp_path / "p.png")
    assert (read_image(tmp_path / "p.png") == [1, 2, 3]).all()
    Image.new("CMYK", (16, 16), (0, 255, 255, 0)).save(tmp_path / "c.jpg", quality=100)
    assert np.abs(read_image(tmp_path / "c.jpg")[8, 8].astype(int) - [255, 0, 0]).max() <= 3


def test_16_bit_greys_are_scaled_not_clipped(tmp_path: Path) -> None:
    grey = np.arange(256, dtype=np.uint16).reshape(16, 16)
    Image.fromarray(grey * 257).save(tmp_path / "a.png")
    assert (read_image(tmp_path / "a.png")[..., 0] == grey).all()


def test_a_16_bit_colour_png_is_as_bright_as_its_8_bit_twin(tmp_path: Path) -> None:
    colours = np.random.default_rng(0).integers(0, 65536, (20, 30, 3), dtype=np.uint16)
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in colours)

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", 30, 20, 16, 2, 0, 0, 0)
    (tmp_path / "a.png").write_bytes(
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(rows))
        + chunk(b"IEND", b"")
    )
    assert np.abs(read_image(tmp_path / "a.png") - colours / 257).max() <= 1


def test_a_bomb_is_refused_from_its_header(tmp_path: Path) -> None:
    path = tmp_path / "bomb.png"
    Image.new("1", (20000, 20000)).save(path)
    assert path.stat().st_size < 100_000
    assert refused(path).reason == TOO_LARGE


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
def test_a_cut_image_is_damaged_never_half_grey(tmp_path: Path, media: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    Image.open(media / "coffee.jpg").save(path)
    content = path.read_bytes()
    for share in (0.3, 0.7, 0.95):
        path.write_bytes(content[: int(len(content) * share)])
        assert refused(path).reason in {DAMAGED, UNREADABLE}


def test_files_that_are_no_images_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"")
    assert refused(path).detail == "the file is empty"
    path.write_bytes(np.random.default_rng(1).bytes(5000))
    assert refused(path).reason == UNREADABLE
    path.write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n")
    assert refused(path).reason == UNREADABLE  # no decoder that starts Ghostscript


def test_an_image_of_the_right_size_is_untouched(media: Path) -> None:
    frame = read_image(media / "coffee.jpg")
    assert resize_and_crop(frame, (600, 400)) is frame


@pytest.mark.parametrize(
    ("source", "target"), [((853, 481), (96, 64)), ((853, 481), (64, 96)), ((40, 30), (96, 64))]
)
def test_a_grid_lies_where_the_centre_crop_puts_it(source: tuple[int, int], target: tuple[int, int]) -> None:
    x, y = np.meshgrid(np.arange(source[0]) + 0.5, np.arange(source[1]) + 0.5)
    frame = np.stack([x / source[0] * 255, y / source[1] * 255, x * 0], axis=2).astype(np.uint8)
    scale = max(target[0] / source[0], target[1] / source[1])
    cropped = resize_and_crop(frame, target)
    assert cropped.shape == (target[1], target[0], 3)
    for column, row in ((4, 4), (target[0] - 5, target[1] - 5), (target[0] // 2, target[1] // 2)):
        # Where the pixel lies in the source, to within one pixel of the target.
        at_x = (column + 0.5 - target[0] / 2) / scale + source[0] / 2
        at_y = (row + 0.5 - target[1] / 2) / scale + source[1] / 2
        red, green, _ = cropped[row, column].astype(float)
        assert abs(red / 255 * source[0] - at_x) * scale <= 1 + scale * source[0] / 255
        assert abs(green / 255 * source[1] - at_y) * scale <= 1 + scale * source[1] / 255


def test_the_fingerprint_follows_the_content_not_the_name(tmp_path: Path, media: Path) -> None:
    first = shutil.copy(media / "coffee.jpg", tmp_path / "a.jpg")
    second = shutil.copy(media / "coffee.jpg", tmp_path / "b.jpg")
    assert source_fingerprint(first) == source_fingerprint(second)
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    assert source_fingerprint(first) != source_fingerprint(second)
    big = tmp_path / "big"
    big.write_bytes(bytes(3 * 2**20))
    before = source_fingerprint(big)
    big.write_bytes(bytes(3 * 2**20 - 1) + b"x")
    assert source_fingerprint(big) != before


def test_every_listed_image_format_is_read_whatever_the_case_of_its_name(tmp_path: Path) -> None:
    colour, lossless = (200, 40, 60), {".png", ".bmp", ".gif", ".tif", ".tiff"}
    for extension in IMAGE_EXTENSIONS:
        path = tmp_path / f"a{extension.upper()}"
        if extension == ".jxl":  # an optional decoder
            path.write_bytes(b"\xff\x0a")
            assert refused(path).reason == UNREADABLE
            continue
        kind = {".hif": "HEIF", ".jpe": "JPEG", ".jfif": "JPEG"}.get(extension)
        options = {} if extension in lossless else {"quality": 100}
        Image.new("RGB", (48, 32), colour).save(path, format=kind, **options)
        assert probe_image(path).size == (48, 32)
        assert np.abs(read_image(path).astype(int) - colour).max() <= 3, extension


def test_an_animated_image_gives_its_first_frame(tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    for name in ("a.gif", "a.webp", "a.png", "a.tif"):
        options = {"lossless": True} if name == "a.webp" else {}
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:], **options)
        assert (read_image(tmp_path / name) == (255, 0, 0)).all(), name
