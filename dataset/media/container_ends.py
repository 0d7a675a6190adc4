"""Detects truncated video files from the container structure, without decoding or demuxing.

FFmpeg reads a fragmented MP4, a live Matroska or an FLV as far as it goes and reports nothing when the rest
is missing. A file whose last box, element or tag is announced longer than what is left of the file was cut.
One that was cut exactly between two of them looks whole, unless an index at the front of the file (`sidx`)
promises more.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

# ISO/IEC 14496-12: frames lie in these boxes, or in one that follows.
_FRAME_BOXES = {b"moov", b"moof", b"mdat", b"sidx", b"styp"}
_FLV_TAGS = {8, 9, 18}  # sound, picture, data: Adobe Flash Video File Format Specification 10.1
# RFC 8794 and 9559: the two elements whose length may be unknown, because they are written live.
_SEGMENT, _CLUSTER = 0x18538067, 0x1F43B675


def ends_early(path: Path, format_name: str) -> bool:
    """Whether a file is shorter than its container announces; containers of other kinds are not judged.

    Args:
        format_name: FFmpeg's name of the container.
    Raises:
        OSError: the file cannot be read.
    """
    names = format_name.split(",")
    size = path.stat().st_size
    with path.open("rb") as stream:
        if "mp4" in names:
            return _mp4_ends_early(stream, size)
        if "matroska" in names:
            return _matroska_ends_early(stream, size)
        if "flv" in names:
            return _flv_ends_early(stream, size)
    return False


def _mp4_ends_early(stream: BinaryIO, size: int) -> bool:
    position, last, is_fragmented = 0, b"", False
    while position + 8 <= size:
        stream.seek(position)
        header = stream.read(16)
        length, last = int.from_bytes(header[:4], "big"), header[4:8]
        is_fragmented = is_fragmented or last == b"moof"
        if length == 1:  # too long for 32 bits
            length = int.from_bytes(header[8:], "big")
        if length < 8:  # 0: up to the end of the file, wherever that is; else no box: bytes behind the last
            return False
        end = position + length
        if end > size:
            return last in _FRAME_BOXES
        if last == b"sidx" and end + _indexed_bytes(stream, position + 8, end) > size:
            return True
        position = end
    return last == b"moof" or (is_fragmented and position < size)


def _indexed_bytes(stream: BinaryIO, start: int, end: int) -> int:
    """How much has to follow a segment index box whose body is [start, end)."""
    stream.seek(start)
    body = stream.read(min(end - start, 2**20))
    try:
        version = body[0]
        offset, count = struct.unpack_from(">Q2xH" if version else ">I2xH", body, 20 if version else 16)
        sizes = struct.unpack_from(f">{3 * count}I", body, 32 if version else 24)[::3]
    except (IndexError, struct.error):
        return 0
    return offset + sum(value & 0x7FFF_FFFF for value in sizes)


def _matroska_ends_early(stream: BinaryIO, size: int) -> bool:
    position = 0
    while position < size:
        stream.seek(position)
        header = stream.read(12)  # 4 bytes of name and 8 of length at most
        name_width, length_width = _width(header[:1]), 0
        if not 1 <= name_width <= 4:
            return False  # no element: FFmpeg looks for the next one
        length_width = _width(header[name_width : name_width + 1])
        if len(header) < name_width + max(length_width, 1):
            return True
        if length_width > 8:
            return False
        name = int.from_bytes(header[:name_width], "big")
        raw = int.from_bytes(header[name_width : name_width + length_width], "big")
        length = raw & ((1 << 7 * length_width) - 1)
        position += name_width + length_width
        if length == (1 << 7 * length_width) - 1:  # unknown: go through what is inside
            if name not in {_SEGMENT, _CLUSTER}:
                return False
            continue
        position += length
        if name == _SEGMENT:
            break
    return position > size


def _width(first: bytes) -> int:
    """Bytes of an EBML number: 1 + the zero bits that it starts with; 9 is none, 0 is the end of the file."""
    return 9 - first[0].bit_length() if first else 0


def _flv_ends_early(stream: BinaryIO, size: int) -> bool:
    stream.seek(5)
    position = int.from_bytes(stream.read(4), "big") + 4  # behind the file's header and the size of no tag
    while position < size:
        stream.seek(position)
        header = stream.read(4)
        if header[0] & 0x1F not in _FLV_TAGS:
            return False  # no tag: bytes behind the last
        position += 11 + int.from_bytes(header[1:], "big") + 4  # the tag's header, body, and its size again
        if len(header) < 4:
            return True
    return position > size
