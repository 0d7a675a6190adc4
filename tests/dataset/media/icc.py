"""Builds small ICC profiles for tests, by the ICC specification (ICC.1:2001-04, version 2)."""

from __future__ import annotations

import itertools
import struct
from collections.abc import Callable, Sequence

import numpy as np

D50 = (0.9642, 1.0, 0.8249)


def _number(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: Sequence[float]) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_number, values))


def _text(kind: bytes, text: bytes) -> bytes:
    if kind == b"desc":
        return b"desc\0\0\0\0" + struct.pack(">I", len(text) + 1) + text + b"\0" + bytes(78)
    return b"text\0\0\0\0" + text + b"\0"


def _curve(curve: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A curve of 1024 steps from device numbers to light."""
    table = np.clip(np.round(curve(np.linspace(0, 1, 1024)) * 65535), 0, 65535).astype(">u2")
    return b"curv\0\0\0\0" + struct.pack(">I", len(table)) + table.tobytes()


def _profile(space: bytes, connection: bytes, tags: dict[bytes, bytes], kind: bytes = b"mntr") -> bytes:
    tags = {b"desc": _text(b"desc", b"test"), b"cprt": _text(b"text", b"none"), b"wtpt": _xyz(D50)} | tags
    position, directory, data = 132 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        directory += name + struct.pack(">II", position + len(data), len(content))
        data += content
    header = struct.pack(">4s4s4s4s", b"test", b"\x02\x20\0\0", kind, space) + connection
    header += (
        struct.pack(">6H", 2026, 1, 1, 0, 0, 0)
        + b"acsp"
        + bytes(24)
        + struct.pack(">I", 1)  # intent: relative colorimetric
        + b"".join(map(_number, D50))
        + bytes(48)
    )
    body = header + struct.pack(">I", len(tags)) + directory + data
    return struct.pack(">I", len(body) + 4) + body


def rgb_profile(columns: Sequence[Sequence[float]], curve: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A display profile: XYZ under D50 of red, green and blue, and the curve of all three."""
    names = (b"rXYZ", b"gXYZ", b"bXYZ")
    tags = {name: _xyz(column) for name, column in zip(names, columns, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(curve)))


def grey_profile(curve: Callable[[np.ndarray], np.ndarray]) -> bytes:
    """A grey profile with this curve."""
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(curve)})


def cmyk_profile(lab_of_inks: Callable[[Sequence[int]], Sequence[float]]) -> bytes:
    """A printer profile: Lab of every corner, (C, M, Y, K) of 0 or 1; linear in between."""
    table = b"".join(
        struct.pack(">BBB", round(lightness * 2.55), round(a + 128), round(b + 128))
        for lightness, a, b in (lab_of_inks(inks) for inks in itertools.product((0, 1), repeat=4))
    )
    identity = bytes(range(256))
    matrix = b"".join(map(_number, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    lut = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + matrix + identity * 4 + table + identity * 3
    return _profile(b"CMYK", b"Lab ", {b"A2B0": lut}, kind=b"prtr")
