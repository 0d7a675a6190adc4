"""Colours of pictures: ICC profiles, and what PNG, JPEG, AVIF and HEIC say about their numbers besides.

Sources: the PNG specification, third edition (cICP, iCCP, sRGB, gAMA and cHRM, in that order of precedence),
the Exif DCF option for Adobe RGB, ISO/IEC 23000-22 (an ICC profile wins over nclx).
"""

from __future__ import annotations

import functools
import io
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageCms

from dataset.media.colour import SRGB, SRGB_PRIMARIES, Chromaticities, Colour, ColourTags, colour_of, to_srgb

_ADOBE_RGB = Colour(
    primaries=(0.64, 0.33, 0.21, 0.71, 0.15, 0.06, 0.3127, 0.3290), transfer=563 / 256
)  # Adobe RGB (1998), sections 4.3.1 and 4.3.4
_INTEROPERABILITY, _INTEROP_INDEX = 0xA005, 1  # EXIF: pointer to a directory, and a tag in there
_MODES = {b"RGB ": "RGB", b"GRAY": "L", b"CMYK": "CMYK"}
"""Colour space of a profile -> Pillow's mode of the pictures that it describes."""
_MOST_META_BYTES = 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureColour:
    """How the numbers of a picture become colours."""

    profile: bytes | None = None
    """An ICC profile, which is used instead of `colour`."""
    colour: Colour = SRGB
    unknown: tuple[str, ...] = ()
    """What the file says that cannot be converted."""

    @property
    def is_target(self) -> bool:
        """Whether the numbers are sRGB's already."""
        return self.profile is None and self.colour.is_target


def picture_colour(path: Path, image: Image.Image) -> PictureColour:
    """The meaning of an opened picture's numbers.

    Raises:
        OSError: the file cannot be read.
    """
    png = _png_chunks(path) if image.format == "PNG" else {}
    if b"cICP" in png and len(png[b"cICP"]) == 4:
        return _by_tags(ColourTags(primaries=png[b"cICP"][0], transfer=png[b"cICP"][1]))
    profile = image.info.get("icc_profile")
    if profile:
        return _by_profile(bytes(profile), image.mode)
    if image.format == "PNG":
        return PictureColour(colour=SRGB if b"sRGB" in png else _png_colour(png))
    if image.format in ("JPEG", "MPO", "TIFF", "WEBP"):
        index = image.getexif().get_ifd(_INTEROPERABILITY).get(_INTEROP_INDEX)
        return PictureColour(colour=_ADOBE_RGB if index == "R03" else SRGB)
    if image.format == "AVIF":
        return _by_tags(_nclx_tags(path))
    if image.format == "HEIF":
        nclx = image.info.get("nclx_profile") or {}
        primaries, transfer = nclx.get("color_primaries", 2), nclx.get("transfer_characteristics", 2)
        return _by_tags(ColourTags(primaries=int(primaries), transfer=int(transfer)))
    return PictureColour()


def _by_tags(tags: ColourTags) -> PictureColour:
    colour, unknown = colour_of(tags)
    return PictureColour(colour=colour, unknown=unknown)


def _by_profile(profile: bytes, mode: str) -> PictureColour:
    try:
        space = _MODES.get(profile[16:20])
        if space is None:
            kind = profile[16:20].decode("ascii", "replace").strip()
            return PictureColour(unknown=(f"an ICC profile for {kind or 'nothing'}",))
        if not _fits(space, mode):
            return PictureColour(unknown=(f"an ICC profile for {space} in a picture of {mode}",))
        return PictureColour(profile=None if _transform(profile) is None else profile)
    except ImageCms.PyCMSError as error:
        return PictureColour(unknown=(f"an ICC profile that cannot be used ({error})",))


def _fits(space: str, mode: str) -> bool:
    """Grey pictures may have an RGB profile; all other spaces have to be the picture's own."""
    is_grey = mode in ("1", "L", "LA", "La") or mode.startswith("I")
    if space == "CMYK" or mode == "CMYK":
        return space == mode
    return space == "RGB" or is_grey


# ------------------------------------------------------------------------------------------- conversion


def converted(image: Image.Image, meaning: PictureColour) -> Image.Image:
    """A picture of 8 bits per channel (RGB, RGBA, L or CMYK) as sRGB of mode RGB or RGBA.

    Transparency is kept, and colours are converted before anything is composited.
    """
    if image.mode == "RGBA":
        opaque = converted(image.convert("RGB"), meaning)
        opaque.putalpha(image.getchannel("A"))
        return opaque
    if meaning.profile is not None:
        transform = _transform(meaning.profile)
        assert transform is not None  # else the profile had been left out
        mode = _MODES[meaning.profile[16:20]]
        picture = image if image.mode == mode else image.convert(mode)
        result = ImageCms.applyTransform(picture, transform)
        assert result is not None  # as it is not done in place
        return result
    rgb = image.convert("RGB")
    if meaning.colour.is_target:
        return rgb
    return Image.fromarray(to_srgb(np.asarray(rgb, np.float32) / np.float32(255), meaning.colour))


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes) -> ImageCms.ImageCmsTransform | None:
    """From a profile to sRGB by the profile's own intent; None where it changes nothing, as for sRGB itself.

    Raises:
        ImageCms.PyCMSError: the profile is damaged.
    """
    mode = _MODES[profile[16:20]]
    source = ImageCms.getOpenProfile(io.BytesIO(profile))
    target = ImageCms.createProfile("sRGB")
    intent = ImageCms.Intent(ImageCms.getDefaultIntent(source))
    transform = ImageCms.buildTransform(source, target, mode, "RGB", renderingIntent=intent)
    if mode == "CMYK":
        return transform
    probe = Image.fromarray(_colour_grid())
    if mode == "L":
        probe = Image.fromarray(np.arange(256, dtype=np.uint8)[None])
    before = np.asarray(probe.convert("RGB")).astype(int)
    difference = np.abs(np.asarray(ImageCms.applyTransform(probe, transform)).astype(int) - before)
    return None if difference.max() <= 1 else transform


def _colour_grid() -> NDArray[np.uint8]:
    """[16, 256, 3]: 16 levels of each channel."""
    levels = np.arange(0, 256, 17, dtype=np.uint8)
    return np.stack(np.meshgrid(levels, levels, levels), axis=-1).reshape(16, 256, 3)


# ------------------------------------------------------------------------------------------- file formats


def _png_chunks(path: Path) -> dict[bytes, bytes]:
    """The chunks of a PNG before its pixels that are about colour."""
    chunks: dict[bytes, bytes] = {}
    with path.open("rb") as stream:
        stream.seek(8)
        while True:
            header = stream.read(8)
            if len(header) < 8 or header[4:] in (b"IDAT", b"IEND"):
                return chunks
            length, kind = int.from_bytes(header[:4], "big"), header[4:]
            if kind in (b"cICP", b"sRGB", b"gAMA", b"cHRM") and length <= 32:
                chunks.setdefault(kind, stream.read(length))
                length = 0
            stream.seek(length + 4, io.SEEK_CUR)  # its checksum too


def _png_colour(chunks: dict[bytes, bytes]) -> Colour:
    """By gAMA and cHRM; those that sRGB's encoders write are sRGB."""
    transfer, primaries = SRGB.transfer, SRGB_PRIMARIES
    if len(chunks.get(b"gAMA", b"")) == 4:
        (gamma,) = struct.unpack(">I", chunks[b"gAMA"])
        if gamma and abs(gamma - 45455) > 1000:  # 1/2.2 stands for sRGB's own curve
            transfer = 100000 / gamma
    if len(chunks.get(b"cHRM", b"")) == 32:
        wx, wy, rx, ry, gx, gy, bx, by = (value / 100000 for value in struct.unpack(">8I", chunks[b"cHRM"]))
        found: Chromaticities = (rx, ry, gx, gy, bx, by, wx, wy)
        is_srgb = max(abs(a - b) for a, b in zip(found, SRGB_PRIMARIES, strict=True)) < 0.005
        if not is_srgb and _is_gamut(found):
            primaries = found
    return Colour(primaries=primaries, transfer=transfer)


def _is_gamut(primaries: Chromaticities) -> bool:
    """Whether chromaticities span a triangle, so that colours can be computed from them."""
    red_x, red_y, green_x, green_y, blue_x, blue_y, _, white_y = primaries
    area = (green_x - red_x) * (blue_y - red_y) - (blue_x - red_x) * (green_y - red_y)
    return abs(area) > 0.01 and white_y > 0.01


def _nclx_tags(path: Path) -> ColourTags:
    """The first colour box of the `meta` box of an AVIF (ISO/IEC 14496-12, section 12.1.5)."""
    with path.open("rb") as stream:
        while True:
            header = stream.read(8)
            length = int.from_bytes(header[:4], "big")
            if len(header) < 8 or length < 8:
                return ColourTags()
            if header[4:] == b"meta":
                content = stream.read(min(length - 8, _MOST_META_BYTES))
                start = content.find(b"colrnclx")
                if not 0 <= start <= len(content) - 15:
                    return ColourTags()
                primaries, transfer, matrix = struct.unpack_from(">HHH", content, start + 8)
                return ColourTags(primaries=primaries, transfer=transfer, matrix=matrix)
            stream.seek(length - 8, io.SEEK_CUR)
