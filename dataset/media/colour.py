"""What the numbers of a picture mean as colours, and the way from there to 8-bit sRGB.

The one place for matrices, ranges, transfer functions, primaries and tone mapping, for videos and pictures
alike. ICC profiles are in `profiles.py`.

Sources: ITU-T H.273 (code points, matrices, chromaticities), BT.2100 and SMPTE ST 2084 (PQ, HLG), BT.2408
(diffuse white at 203 nits), IEC 61966-2-1 (sRGB), Lindbloom's "Chromatic Adaptation" (Bradford).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]

Chromaticities = tuple[float, float, float, float, float, float, float, float]
"""x and y of red, green, blue and white."""
Transfer = float | Literal["display", "log100", "log316", "st428", "pq", "hlg"]
"""How numbers 0 .. 1 become light: v ** float, or a curve by name. "display" is that of the target: SDR video
(BT.709, BT.601, BT.2020) and sRGB are shown by one curve, as browsers and most players do."""

UNSPECIFIED = 2
"""H.273's code point for "not known"; 0 and 3 are reserved in most tables and mean the same."""
RGB_MATRIX, BT709, BT601 = 0, 1, 6
BT2020, BT2020_CL = 9, 10
PQ, HLG = 16, 18
HD_LINES = 720
"""Untagged video with so many lines is BT.709, below it is BT.601, as players take it."""
DIFFUSE_WHITE = 203.0
"""Nits of white paper in HDR (BT.2408); 1.0 in linear light here."""
DEFAULT_PEAK = 1000.0
"""Nits of the brightest HDR pixel where the file gives none; of HLG always, whose light is relative."""

_D65 = (0.3127, 0.3290)
_C = (0.310, 0.316)
SRGB_PRIMARIES: Chromaticities = (0.640, 0.330, 0.300, 0.600, 0.150, 0.060, *_D65)
_BT2020_PRIMARIES: Chromaticities = (0.708, 0.292, 0.170, 0.797, 0.131, 0.046, *_D65)
_SMPTE_C: Chromaticities = (0.630, 0.340, 0.310, 0.595, 0.155, 0.070, *_D65)
_PRIMARIES: dict[int, Chromaticities] = {
    1: SRGB_PRIMARIES,
    4: (0.67, 0.33, 0.21, 0.71, 0.14, 0.08, *_C),  # BT.470 M
    5: (0.64, 0.33, 0.29, 0.60, 0.15, 0.06, *_D65),  # BT.470 BG, BT.601 of 625 lines
    6: _SMPTE_C,
    7: _SMPTE_C,  # SMPTE 240M
    8: (0.681, 0.319, 0.243, 0.692, 0.145, 0.049, *_C),  # film
    9: _BT2020_PRIMARIES,
    10: (1.0, 0.0, 0.0, 1.0, 0.0, 0.0, 1 / 3, 1 / 3),  # CIE XYZ
    11: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, 0.314, 0.351),  # DCI-P3
    12: (0.680, 0.320, 0.265, 0.690, 0.150, 0.060, *_D65),  # Display P3
    22: (0.630, 0.340, 0.295, 0.605, 0.155, 0.077, *_D65),  # EBU 3213
}
_TRANSFERS: dict[int, Transfer] = {
    **dict.fromkeys((1, 6, 7, 11, 12, 13, 14, 15), "display"),
    4: 2.2,
    5: 2.8,
    8: 1.0,
    9: "log100",
    10: "log316",
    PQ: "pq",
    17: "st428",
    HLG: "hlg",
}
_LUMA: dict[int, tuple[float, float]] = {
    1: (0.2126, 0.0722),
    4: (0.30, 0.11),
    5: (0.299, 0.114),
    6: (0.299, 0.114),
    7: (0.212, 0.087),
    9: (0.2627, 0.0593),
}
"""Matrix -> the weights of red and blue in luma."""
_YCGCO = 8
_DERIVED = 12
"""Luma weights that follow from the primaries."""
_MATRIX_NAMES = {10: "BT.2020 constant luminance", 11: "SMPTE ST 2085", 13: "chromaticity-derived constant"}
_MATRIX_NAMES |= {14: "ICtCp", 15: "IPT-C2", 16: "YCgCo-Re", 17: "YCgCo-Ro"}


@dataclass(frozen=True, kw_only=True, slots=True)
class ColourTags:
    """What a file says, in the code points of H.273."""

    primaries: int = UNSPECIFIED
    transfer: int = UNSPECIFIED
    matrix: int = UNSPECIFIED
    is_full_range: bool | None = None
    peak_nits: float | None = None
    """Of HDR: the brightest pixel by MaxCLL, else the mastering display's peak."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Colour:
    """How RGB numbers 0 .. 1 become colours."""

    primaries: Chromaticities = SRGB_PRIMARIES
    transfer: Transfer = "display"
    peak_nits: float = DEFAULT_PEAK

    @property
    def is_target(self) -> bool:
        """Whether these numbers are sRGB's already."""
        return self.transfer == "display" and self.primaries == SRGB_PRIMARIES

    @property
    def is_hdr(self) -> bool:
        """Whether highlights have to be compressed."""
        return self.transfer in ("pq", "hlg")


SRGB = Colour()


def colour_of(tags: ColourTags) -> tuple[Colour, tuple[str, ...]]:
    """The meaning of RGB numbers by a file's tags, and what in the tags is not known here.

    Unspecified primaries are BT.2020's beside an HDR transfer or the BT.2020 matrix, else BT.709's.
    """
    unknown = []
    transfer: Transfer = "display"
    if not _is_unset(tags.transfer):
        if tags.transfer in _TRANSFERS:
            transfer = _TRANSFERS[tags.transfer]
        else:
            unknown.append(f"transfer function {tags.transfer}")
    primaries = SRGB_PRIMARIES
    if transfer in ("pq", "hlg") or tags.matrix in (BT2020, BT2020_CL):
        primaries = _BT2020_PRIMARIES
    if not _is_unset(tags.primaries):
        if tags.primaries in _PRIMARIES:
            primaries = _PRIMARIES[tags.primaries]
        else:
            unknown.append(f"primaries {tags.primaries}")
    peak = DEFAULT_PEAK if transfer == "hlg" or not tags.peak_nits else tags.peak_nits
    return Colour(primaries=primaries, transfer=transfer, peak_nits=peak), tuple(unknown)


def matrix_of(tags: ColourTags, colour: Colour, lines: int) -> tuple[int, tuple[str, ...]]:
    """The matrix of a YCbCr picture (a key of `yuv_to_rgb`), and a matrix in the tags that is not known.

    Args:
        lines: height of the stored picture, which decides for untagged video.
    """
    if tags.matrix in _LUMA or tags.matrix in (_YCGCO, _DERIVED):
        return tags.matrix, ()
    if not _is_unset(tags.matrix) and tags.matrix != RGB_MATRIX:
        guess = BT2020 if colour.primaries == _BT2020_PRIMARIES else BT709
        return guess, (f"matrix {tags.matrix} ({_MATRIX_NAMES.get(tags.matrix, 'not known')})",)
    if colour.is_hdr or colour.primaries == _BT2020_PRIMARIES:
        return BT2020, ()
    return (BT709 if lines >= HD_LINES else BT601), ()


def _is_unset(code: int) -> bool:
    return code in (0, UNSPECIFIED, 3)


def yuv_to_rgb(planes: Floats, matrix: int, colour: Colour, *, is_full_range: bool, depth: int) -> Floats:
    """YCbCr as RGB, both [H, W, 3]; 0 .. 1 is RGB's nominal range, and values outside are kept.

    Args:
        planes: numbers of `depth` bits shifted up to 16, where the limited range is that of 8 bits times 256.
    """
    return _transformed(planes, yuv_matrix(matrix, colour, is_full_range=is_full_range, depth=depth))


def yuv_matrix(matrix: int, colour: Colour, *, is_full_range: bool, depth: int) -> NDArray[np.floating]:
    """[3, 4]: what `yuv_to_rgb` multiplies by; the last column is added."""
    lowest = 0 if is_full_range else 16 * 256
    luma, chroma = (full_scale(depth),) * 2 if is_full_range else (219 * 256, 224 * 256)
    rows = _yuv_rows(matrix, colour.primaries) / [luma, chroma, chroma]
    return np.column_stack([rows, -rows @ [lowest, 128 * 256, 128 * 256]])


def _transformed(values: Floats, matrix: NDArray[np.floating]) -> Floats:
    """[H, W, 3] times [3, 3] or [3, 4], whose last column is added."""
    return cv2.transform(values, matrix.astype(np.float32)).astype(np.float32, copy=False)


def full_range(values: Floats, *, is_full_range: bool, depth: int) -> Floats:
    """RGB or grey as 0 .. 1; `values` are numbers of `depth` bits shifted up to 16."""
    if is_full_range:
        return values * np.float32(1 / full_scale(depth))
    return (values - np.float32(16 * 256)) * np.float32(1 / (219 * 256))


def full_scale(depth: int) -> int:
    """The largest number of `depth` bits, shifted up to 16."""
    return 65536 - 2 ** (16 - depth)


def _yuv_rows(matrix: int, primaries: Chromaticities) -> NDArray[np.float64]:
    """[3, 3]: RGB from Y 0 .. 1 and Cb, Cr -0.5 .. 0.5 (H.273, equations 38 to 49)."""
    if matrix == _YCGCO:  # planes are Y, Cg, Co
        return np.array([[1, -1, 1], [1, 1, 0], [1, -1, -1]], np.float64)
    if matrix == _DERIVED:
        red, _, blue = rgb_to_xyz(primaries)[1]
    else:
        red, blue = _LUMA[matrix]
    green = 1 - red - blue
    to_blue, to_red = 2 * (1 - blue), 2 * (1 - red)
    return np.array([[1, 0, to_red], [1, -to_blue * blue / green, -to_red * red / green], [1, to_blue, 0]])


# ------------------------------------------------------------------------------------------ to sRGB


def to_srgb(rgb: Floats, colour: Colour) -> NDArray[np.uint8]:
    """Colours in 8-bit sRGB; what lies outside of its gamut is clipped, HDR is tone-mapped.

    Args:
        rgb: [H, W, 3], 0 .. 1 as stored, before the transfer function; values outside are clipped.
    """
    index = (np.clip(rgb, 0, 1) * _STEPS + 0.5).astype(np.uint16)
    if colour.is_target:
        return (np.clip(rgb, 0, 1) * 255 + 0.5).astype(np.uint8)
    linear = _linear_table(colour.transfer)[index]
    if colour.transfer == "hlg":
        linear = _hlg_display_light(linear, colour.primaries)
    linear = _transformed(linear, _to_srgb_primaries(colour.primaries))
    if colour.is_hdr:
        linear = _tone_mapped(linear, colour.peak_nits)
    # Steps of the square root keep the darkest levels apart.
    return _encode_table()[(np.sqrt(np.clip(linear, 0, 1)) * _STEPS + 0.5).astype(np.uint16)]


_STEPS = 65535


@functools.cache
def _linear_table(transfer: Transfer) -> Floats:
    """[65536]: light of each 16-bit number, 1.0 is SDR white or diffuse white of HDR; of HLG: scene light."""
    value = np.arange(_STEPS + 1) / _STEPS
    match transfer:
        case "display":
            light = np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)
        case "log100":
            light = np.where(value > 0, 10 ** (2 * (value - 1)), 0)
        case "log316":
            light = np.where(value > 0, 10 ** (2.5 * (value - 1)), 0)
        case "st428":
            light = value**2.6 * 52.37 / 48
        case "pq":
            light = pq_nits(value) / DIFFUSE_WHITE
        case "hlg":
            a, b, c = 0.17883277, 0.28466892, 0.55991073  # BT.2100, table 5
            light = np.where(value <= 0.5, value**2 / 3, (np.exp((value - c) / a) + b) / 12)
        case _:
            light = value**transfer
    return light.astype(np.float32)


def pq_nits(value: NDArray[np.float64]) -> NDArray[np.float64]:
    """Nits of PQ numbers 0 .. 1 (SMPTE ST 2084, equation 4.1)."""
    m1, m2, c1, c2, c3 = 2610 / 16384, 2523 / 32, 3424 / 4096, 2413 / 128, 2392 / 128
    root = value ** (1 / m2)
    return 10000 * (np.maximum(root - c1, 0) / (c2 - c3 * root)) ** (1 / m1)


def _hlg_display_light(scene: Floats, primaries: Chromaticities) -> Floats:
    """BT.2100's OOTF for a display of 1000 nits: light over diffuse white from scene light."""
    luminance = scene @ rgb_to_xyz(primaries)[1].astype(np.float32)
    gain = np.maximum(luminance, 1e-9) ** np.float32(0.2) * np.float32(DEFAULT_PEAK / DIFFUSE_WHITE)
    return scene * gain[..., None]


_KNEE = 0.75
"""Light up to here, level 224 of sRGB, is not touched by tone mapping; diffuse white becomes about 240."""


def _tone_mapped(linear: Floats, peak_nits: float) -> Floats:
    """Compress what is brighter than the knee, so that the peak becomes 1; all channels alike, hue is kept.

    A Reinhard curve with a white point (Reinhard et al. 2002, equation 4), shifted to begin at the knee with
    slope 1. Content without highlights above diffuse white is not changed.
    """
    brightest = linear.max(axis=-1, keepdims=True)
    white = max((peak_nits / DIFFUSE_WHITE - _KNEE) / (1 - _KNEE), 1.0)
    over = np.maximum(brightest - _KNEE, 0) / (1 - _KNEE)
    mapped = _KNEE + (1 - _KNEE) * over * (1 + over / white**2) / (1 + over)
    return np.where(brightest > _KNEE, linear * (mapped / np.maximum(brightest, _KNEE)), linear)


@functools.cache
def _encode_table() -> NDArray[np.uint8]:
    """[65536]: sRGB levels of the squares of 0 .. 1."""
    light = (np.arange(_STEPS + 1) / _STEPS) ** 2
    value = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (value * 255 + 0.5).astype(np.uint8)


@functools.cache
def _to_srgb_primaries(primaries: Chromaticities) -> NDArray[np.floating]:
    """[3, 3]: linear RGB of other primaries as linear sRGB, white adapted to D65 by Bradford."""
    bradford = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])
    cones, target_cones = (bradford @ _white_xyz(p) for p in (primaries, SRGB_PRIMARIES))
    adapt = np.linalg.inv(bradford) @ np.diag(target_cones / cones) @ bradford
    return np.linalg.inv(rgb_to_xyz(SRGB_PRIMARIES)) @ adapt @ rgb_to_xyz(primaries)


def _white_xyz(primaries: Chromaticities) -> NDArray[np.float64]:
    x, y = primaries[6:]
    return np.array([x / y, 1, (1 - x - y) / y])


@functools.cache
def rgb_to_xyz(primaries: Chromaticities) -> NDArray[np.float64]:
    """[3, 3]: CIE XYZ of linear RGB, from the chromaticities (SMPTE RP 177)."""
    columns = np.array([[x, y, 1 - x - y] for x, y in zip(primaries[0:6:2], primaries[1:6:2], strict=True)]).T
    return columns * np.linalg.solve(columns, _white_xyz(primaries)).astype(np.float64)
