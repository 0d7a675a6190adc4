"""Colours of videos: what a file says about its numbers is used, checked against formulas written out here.

The encoders below go the other way than the code under test: from a known sRGB colour to the numbers that a
file of each kind holds, by the formulas of the standards in float64.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import av
import numpy as np
import pytest

from dataset.media.videos import probe_video, read_frames

PATCHES = [(200, 40, 60), (30, 160, 90), (20, 60, 200), (128, 128, 128), (0, 0, 0), (220, 210, 60)]
SIDE = 16

LUMA = {"bt601": (0.299, 0.114), "bt709": (0.2126, 0.0722), "bt2020": (0.2627, 0.0593)}
MATRIX_CODE = {"bt601": 6, "bt709": 1, "bt2020": 9}
# Linear BT.709 to BT.2020, as printed in ITU-R BT.2087, table 4.
TO_2020 = np.array([[0.6274, 0.3293, 0.0433], [0.0691, 0.9195, 0.0114], [0.0164, 0.0880, 0.8956]])


@dataclass(frozen=True)
class Kind:
    """A kind of video."""

    matrix: str
    is_full_range: bool
    bits: int
    transfer: str = "sdr"
    is_tagged: bool = True
    height: int = 48

    def __str__(self) -> str:
        tags = "tagged" if self.is_tagged else f"untagged {self.height} lines"
        return (
            f"{self.matrix} {'full' if self.is_full_range else 'limited'} {self.bits} {self.transfer} {tags}"
        )


def srgb_light(colour: tuple[int, int, int] | np.ndarray) -> np.ndarray:
    value = np.array(colour) / 255
    return np.where(value <= 0.04045, value / 12.92, ((value + 0.055) / 1.055) ** 2.4)


def srgb_value(light: np.ndarray) -> np.ndarray:
    return np.where(light <= 0.0031308, light * 12.92, 1.055 * light ** (1 / 2.4) - 0.055)


def pq_value(nits: np.ndarray) -> np.ndarray:
    y = (nits / 10000) ** 0.1593017578125
    return ((0.8359375 + 18.8515625 * y) / (1 + 18.6875 * y)) ** 78.84375


def hlg_value(nits: np.ndarray) -> np.ndarray:
    """Signal that a 1000 nit display shows as these nits: inverse OOTF, then OETF (BT.2100)."""
    display = nits / 1000
    luminance = float(display @ [0.2627, 0.6780, 0.0593])
    scene = display * luminance ** (1 / 1.2 - 1) if luminance > 0 else display
    a = 0.17883277
    b = 1 - 4 * a
    c = 0.5 - a * np.log(4 * a)
    return np.where(scene <= 1 / 12, np.sqrt(3 * scene), a * np.log(np.maximum(12 * scene - b, 1e-9)) + c)


def stored_rgb(colour: tuple[int, int, int], kind: Kind) -> np.ndarray:
    """R'G'B' 0 .. 1 as a file of this kind holds an sRGB colour, whose white is 203 nits in HDR."""
    if kind.transfer == "sdr":
        if kind.matrix != "bt2020" or not kind.is_tagged:
            return np.array(colour) / 255
        return srgb_value(TO_2020 @ srgb_light(colour))
    nits = 203 * TO_2020 @ srgb_light(colour)
    return pq_value(nits) if kind.transfer == "pq" else hlg_value(nits)


def stored_yuv(rgb: np.ndarray, kind: Kind) -> list[int]:
    """Code values of Y, Cb, Cr (ITU-R BT.709 section 3, BT.2020 table 4, H.273 for full range)."""
    red, blue = LUMA[kind.matrix]
    y = red * rgb[0] + (1 - red - blue) * rgb[1] + blue * rgb[2]
    cb, cr = (rgb[2] - y) / (2 - 2 * blue), (rgb[0] - y) / (2 - 2 * red)
    top = 2**kind.bits - 1
    if kind.is_full_range:
        values = [top * y, top * cb + 2 ** (kind.bits - 1), top * cr + 2 ** (kind.bits - 1)]
    else:
        values = [v * 2 ** (kind.bits - 8) for v in (219 * y + 16, 224 * cb + 128, 224 * cr + 128)]
    return [int(np.clip(round(value), 0, top)) for value in values]


def write(
    path: Path, kind: Kind, levels: Sequence[np.ndarray] | None = None, codec: str = "ffv1", **tags: int
) -> Path:
    """A lossless video of colour patches, side by side, with the tags that the kind has.

    `levels` are the R'G'B' numbers to store instead of those of PATCHES, `tags` replace the kind's.
    """
    if levels is None:
        levels = [stored_rgb(colour, kind) for colour in PATCHES]
    width = SIDE * max(8, len(levels))
    layout = {8: "yuv420p", 10: "yuv420p10le"}[kind.bits]
    frame = av.VideoFrame(width, kind.height, layout)
    values = [stored_yuv(level, kind) for level in levels]
    for number, plane in enumerate(frame.planes):
        step = SIDE if number == 0 else SIDE // 2
        dtype = np.dtype(np.uint8 if kind.bits == 8 else "<u2")
        row = np.zeros(plane.line_size // dtype.itemsize, dtype)
        for place, value in enumerate(values):
            row[place * step : (place + 1) * step] = value[number]
        plane.update(np.tile(row, (plane.height, 1)).tobytes())
    if kind.is_tagged:
        curve = {"pq": 16, "hlg": 18}.get(kind.transfer, 14 if kind.matrix == "bt2020" else 1)
        primaries = 9 if kind.matrix == "bt2020" else 1
        tags = {
            "colorspace": MATRIX_CODE[kind.matrix],
            "color_primaries": primaries,
            "color_trc": curve,
        } | tags
    return encode(path, [frame], codec, color_range=2 if kind.is_full_range else 1, **tags)


def encode(path: Path, frames: Sequence[av.VideoFrame], codec: str, **tags: int) -> Path:
    """Write frames without loss, with tags in the code points of H.273."""
    options = {
        "libx264": {"qp": "0"},
        "libvpx-vp9": {"lossless": "1", "auto-alt-ref": "0"},
        "libvpx": {"auto-alt-ref": "0"},
    }
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=24, options=options.get(codec, {}))
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        for name, value in tags.items():
            setattr(stream.codec_context, name, value)
        for frame in frames:
            for name, value in tags.items():
                setattr(frame, name, value)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def decoded(path: Path, count: int = len(PATCHES)) -> np.ndarray:
    """[count, 3]: the colours that are read in the middle of each patch."""
    ((_, frame),) = read_frames(path, probe_video(path), [0])
    return frame[frame.shape[0] // 2, SIDE // 2 : count * SIDE : SIDE]


def largest_error(path: Path, kind: Kind) -> int:
    write(path, kind)
    found = decoded(path)
    error = np.abs(found.astype(int) - PATCHES).max()
    shown = "  ".join(
        f"{source}->{tuple(map(int, read))}" for source, read in zip(PATCHES, found, strict=True)
    )
    print(f"{kind!s:38} error {error}  {shown}")
    return int(error)


TAGGED = [
    Kind(matrix, is_full, bits)
    for matrix, is_full, bits in itertools.product(("bt601", "bt709", "bt2020"), (False, True), (8, 10))
]
UNTAGGED = [
    Kind("bt709" if height >= 720 else "bt601", is_full, bits, is_tagged=False, height=height)
    for height, is_full, bits in itertools.product((48, 718, 720, 1080), (False, True), (8, 10))
]
HDR = [
    Kind("bt2020", is_full, bits, transfer)
    for transfer, is_full, bits in itertools.product(("pq", "hlg"), (False, True), (8, 10))
]


@pytest.mark.parametrize("kind", [*TAGGED, *UNTAGGED], ids=str)
def test_sdr_colours_come_out_as_they_went_in(tmp_path: Path, kind: Kind) -> None:
    """The source colour, by matrix, range, depth and tags; rounding to 8 bits of YCbCr is up to 2 levels."""
    allowed = {8: 2, 10: 1}[kind.bits] + (2 if kind.matrix == "bt2020" else 0)
    assert largest_error(tmp_path / "a.mkv", kind) <= allowed


@pytest.mark.parametrize("kind", HDR, ids=str)
def test_hdr_colours_of_diffuse_white_come_out_as_they_went_in(tmp_path: Path, kind: Kind) -> None:
    """sRGB colours placed at 203 nits: up to level 224 tone mapping leaves them alone."""
    assert largest_error(tmp_path / "a.mkv", kind) <= {8: 6, 10: 3}[kind.bits]


@pytest.mark.parametrize("transfer", ["pq", "hlg"])
def test_hdr_highlights_are_compressed_and_diffuse_white_stays_bright(tmp_path: Path, transfer: str) -> None:
    encode_light = pq_value if transfer == "pq" else hlg_value
    levels = [encode_light(np.full(3, nits)) for nits in (100.0, 203.0, 400.0, 1000.0)]
    grey = decoded(
        write(tmp_path / "a.mkv", Kind("bt2020", False, 10, transfer), levels), len(levels)
    ).astype(int)
    assert (grey.max(axis=1) - grey.min(axis=1)).max() <= 1
    middle, white, bright, peak = grey[:, 1].tolist()
    assert abs(middle - 255 * float(srgb_value(np.array(100 / 203)))) <= 1.5
    assert 235 <= white <= 245
    assert white < bright < peak
    assert peak >= 254


def test_tone_mapping_keeps_hues_and_is_monotonous(tmp_path: Path) -> None:
    orange = srgb_light((255, 140, 20))
    levels = [pq_value(gain * 203 * np.maximum(TO_2020 @ orange, 0)) for gain in (0.5, 1, 2, 4)]
    found = srgb_light(
        decoded(write(tmp_path / "a.mkv", Kind("bt2020", True, 10, "pq"), levels), len(levels))
    )  # pyright: ignore[reportArgumentType]
    assert (np.diff(found[:, 0]) > 0).all()
    assert np.abs(found[:, 1] / found[:, 0] - orange[1] / orange[0]).max() < 0.02


@pytest.mark.parametrize(
    ("tag", "curve"),
    [
        (4, lambda light: light ** (1 / 2.2)),
        (5, lambda light: light ** (1 / 2.8)),
        (8, lambda light: light),
        (9, lambda light: np.where(light > 0.01, 1 + np.log10(np.maximum(light, 0.01)) / 2, 0)),
        (17, lambda light: (light * 48 / 52.37) ** (1 / 2.6)),
        (13, srgb_value),
    ],
    ids=["gamma 2.2", "gamma 2.8", "linear", "log 100", "ST 428", "sRGB"],
)
def test_other_transfer_functions_are_undone(
    tmp_path: Path, tag: int, curve: Callable[[np.ndarray], np.ndarray]
) -> None:
    kind = Kind("bt709", True, 10)
    levels = [curve(srgb_light(colour)) for colour in PATCHES]
    found = decoded(write(tmp_path / "a.mkv", kind, levels, color_trc=tag))
    bright = np.array(PATCHES) >= (60 if tag == 8 else 40)  # 10 bits are few for dark linear light
    assert np.abs(found.astype(int) - PATCHES)[bright].max() <= 2


@pytest.mark.parametrize(
    ("tag", "to_xyz"),
    [
        (12, [[0.48657, 0.26567, 0.19822], [0.22897, 0.69174, 0.07929], [0.0, 0.04511, 1.04394]]),
        (6, [[0.3935, 0.3653, 0.1917], [0.2124, 0.7011, 0.0866], [0.0187, 0.1119, 0.9584]]),
        (5, [[0.4306, 0.3415, 0.1784], [0.2220, 0.7067, 0.0713], [0.0202, 0.1296, 0.9393]]),
    ],
    ids=["Display P3", "SMPTE C", "EBU"],
)
def test_other_primaries_are_converted(tmp_path: Path, tag: int, to_xyz: list[list[float]]) -> None:
    """The matrices are printed ones: Apple's Display P3, and Lindbloom's for SMPTE-C and PAL."""
    srgb_to_xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
    change = np.linalg.inv(to_xyz) @ srgb_to_xyz
    levels = [srgb_value(np.clip(change @ srgb_light(colour), 0, 1)) for colour in PATCHES]
    found = decoded(write(tmp_path / "a.mkv", Kind("bt709", True, 10), levels, color_primaries=tag))
    inside = [i for i, colour in enumerate(PATCHES) if (change @ srgb_light(colour)).min() >= 0]
    assert len(inside) >= 4
    assert np.abs(found.astype(int) - PATCHES)[inside].max() <= 2


def test_what_cannot_be_converted_is_named(tmp_path: Path) -> None:
    video = probe_video(write(tmp_path / "a.mkv", Kind("bt2020", False, 10, "pq"), colorspace=14))
    assert video.colour.unknown == ("matrix 14 (ICtCp)",)
    assert not probe_video(write(tmp_path / "b.mkv", Kind("bt2020", False, 10, "pq"))).colour.unknown


@pytest.mark.parametrize(
    ("layout", "codec"), [("gray", "libx264"), ("gray10le", "libx264"), ("gray", "ffv1")]
)
@pytest.mark.parametrize("is_full", [False, True])
def test_grey_video_of_either_range_becomes_full(
    tmp_path: Path, layout: str, codec: str, is_full: bool
) -> None:
    frame = av.VideoFrame(64, 48, layout)
    dtype, shift = (np.dtype("<u2"), 4) if layout == "gray10le" else (np.dtype(np.uint8), 1)
    levels = [0, 128, 255] if is_full else [16, 126, 235]
    row = np.zeros(frame.planes[0].line_size // dtype.itemsize, dtype)
    for place, level in enumerate(levels):
        row[place * SIDE : (place + 1) * SIDE] = level * shift
    frame.planes[0].update(np.tile(row, (48, 1)).tobytes())
    path = encode(tmp_path / "a.mkv", [frame], codec, color_range=2 if is_full else 1)
    found = decoded(path, 3)
    assert (found[:, 0] == found[:, 2]).all()
    assert np.abs(found[:, 0].astype(int) - [0, 128, 255]).max() <= 1


def test_an_untagged_h264_clip_of_720_lines_is_bt709(tmp_path: Path) -> None:
    kind = Kind("bt709", False, 8, is_tagged=False, height=720)
    path = write(tmp_path / "a.mp4", kind, codec="libx264")
    assert np.abs(decoded(path).astype(int) - PATCHES).max() <= 2
    assert probe_video(path).treatment  # caches that were made with other colours are made again
    tagged = write(tmp_path / "b.mp4", replace(kind, is_tagged=True), codec="libx264")
    assert not probe_video(tagged).treatment


@pytest.mark.parametrize(("name", "codec"), [("a.webm", "libvpx-vp9"), ("b.webm", "libvpx")])
def test_transparent_webm_does_not_show_hidden_colours(tmp_path: Path, name: str, codec: str) -> None:
    frames = []
    for _ in range(3):
        frame = av.VideoFrame(64, 48, "yuva420p")
        for plane, value in zip(frame.planes, (80, 90, 240, 0), strict=True):
            content = np.full((plane.height, plane.line_size), value, np.uint8)
            if value == 0:
                content[:, 32:] = 255  # the right half is shown
            plane.update(content.tobytes())
        frames.append(frame)
    video = probe_video(encode(tmp_path / name, frames, codec))
    assert (video.num_frames, video.has_alpha) == (3, True)
    shown = [frame for _, frame in read_frames(tmp_path / name, video, [0, 1, 2])]
    assert len(shown) == 3
    for pixels in shown:
        assert (pixels[:, :24] == 255).all()
        assert pixels[24, 48, 0] > 200 > 100 > pixels[24, 48, 1]


def test_interlaced_video_is_deinterlaced(tmp_path: Path) -> None:
    frames = []
    for number in range(6):
        content = np.full((48, 64), 60, np.uint8)
        content[0::2, 8 * number : 8 * number + 8] = 200  # a bar that moves on between the fields
        content[1::2, 8 * number + 4 : 8 * number + 12] = 200
        frame = av.VideoFrame.from_ndarray(np.repeat(content[..., None], 3, axis=2), format="rgb24")
        frames.append(frame.reformat(format="yuv420p"))
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24, options={"qp": "0", "x264-params": "tff=1"})
        assert isinstance(stream, av.VideoStream)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    video = probe_video(path)
    assert (video.is_interlaced, video.num_frames) == (True, 6)
    whole = dict(read_frames(path, video, range(6)))
    assert len(whole) == 6
    for frame in whole.values():
        combing = np.abs(np.diff(frame[4:-4, :, 1].astype(int), axis=0)).max()
        assert combing < 70  # 140 between the fields as they are stored
    assert all((frame == whole[number]).all() for number, frame in read_frames(path, video, [2, 3]))
