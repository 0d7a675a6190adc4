"""safetensors files: checked headers, tensors read one by one, bytes determined by the content alone.

The format is written here rather than by the safetensors package because that package orders the metadata
at random (so equal content gives unequal files), gives the file mode 0600 and does not fsync.
Format: https://github.com/huggingface/safetensors#format
"""

from __future__ import annotations

import json
import mmap
import struct
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from modules.errors import ModelFileError
from modules.files import atomic_writer
from modules.parsing import parse_json

MAX_HEADER_BYTES = 100 * 2**20
SAFETENSORS_SUFFIXES = frozenset({".safetensors", ".sft"})
"""In lower case."""
_MAX_DIMENSIONS = 64
"""Of torch's tensors."""

_DTYPE_BY_CODE = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_UNREAD_DTYPES = {
    "F4": "4-bit (FP4, NVFP4 or MXFP4)",
    "F6_E2M3": "6-bit",
    "F6_E3M2": "6-bit",
    "F8_E8M0": "a scale of MXFP8 or MXFP4",
}
"""Codes of the format for which there is no use here, in words for a message."""
_CODE_BY_DTYPE = {dtype: code for code, dtype in _DTYPE_BY_CODE.items()}


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Location of a tensor in its file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int
    """Absolute byte offsets in the file."""
    end: int


@dataclass(frozen=True, slots=True)
class TensorFileHeader:
    """The parsed header of a safetensors file."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]


def read_header(path: Path) -> TensorFileHeader:
    """Read and check the header of a safetensors file; no tensor data is touched.

    Raises:
        ModelFileError: the file is missing, not safetensors, cut short, or claims an unreasonable header.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as stream:
            prefix = stream.read(8)
            if len(prefix) < 8:
                raise ModelFileError(f"{path}: {size} bytes is too short for a safetensors file")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER_BYTES or 8 + length > size:
                raise ModelFileError(
                    f"{path}: not a whole safetensors file: its header claims {length} bytes, "
                    f"the file has {size}"
                )
            raw = stream.read(length)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: no such file") from error
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read: {error.strerror}") from error
    return _parse_header(path, raw, data_start=8 + length, size=size)


def _parse_header(path: Path, raw: bytes, *, data_start: int, size: int) -> TensorFileHeader:
    try:
        header = _object(parse_json(raw), "the header")
        metadata = _metadata(header.pop("__metadata__", None))
        _refuse_unread_dtypes(path, header)
        tensors = {name: _tensor_info(name, entry, data_start) for name, entry in header.items()}
    except ValueError as error:
        raise ModelFileError(
            f"{path}: not a safetensors file: its header cannot be read ({error})"
        ) from error
    end = max((info.end for info in tensors.values()), default=data_start)
    if end != size:
        raise ModelFileError(
            f"{path}: the file is damaged: its header describes {end} bytes, found {size}. "
            "Copy or download it again."
        )
    for name, info in tensors.items():
        if info.end - info.start != info.dtype.itemsize * _count(info.shape) or info.start < data_start:
            raise ModelFileError(
                f"{path}: the file is damaged: the extent of tensor {name} does not fit its shape"
            )
    return TensorFileHeader(tensors, metadata)


def _object(value: Any, what: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is no JSON object")
    return value


def _metadata(value: Any) -> dict[str, str]:
    """The one place where the types of metadata are checked: all that read it find texts."""
    metadata = _object({} if value is None else value, "__metadata__")
    return {name: str(text) for name, text in metadata.items()}  # some programs write numbers


def _refuse_unread_dtypes(path: Path, header: Mapping[str, Any]) -> None:
    for name, entry in header.items():
        code = entry.get("dtype") if isinstance(entry, dict) else None
        if isinstance(code, str) and code in _UNREAD_DTYPES:
            raise ModelFileError(
                f"{path}: tensor {name[:80]} is {_UNREAD_DTYPES[code]}, which is not read here. "
                "Download the model in bfloat16 or float8"
            )


def _tensor_info(name: str, entry: Any, data_start: int) -> TensorInfo:
    """Likewise for the tensors: a known dtype, sizes and places within the file that are whole numbers."""
    what = f"tensor {name[:80]!r}"
    entry = _object(entry, what)
    code = entry.get("dtype")
    if not isinstance(code, str) or code not in _DTYPE_BY_CODE:
        raise ValueError(f"{what} has the unknown dtype {str(code)[:40]}")
    shape = _sizes(entry.get("shape"), f"the shape of {what}")
    offsets = _sizes(entry.get("data_offsets"), f"data_offsets of {what}")
    if len(offsets) != 2 or offsets[0] > offsets[1]:
        raise ValueError(f"data_offsets of {what} are no start and end")
    return TensorInfo(_DTYPE_BY_CODE[code], shape, data_start + offsets[0], data_start + offsets[1])


def _sizes(value: Any, what: str) -> tuple[int, ...]:
    is_list = isinstance(value, list) and len(value) <= _MAX_DIMENSIONS
    if not is_list or not all(type(size) is int and 0 <= size < 2**63 for size in value):
        raise ValueError(f"{what} is no list of sizes")
    return tuple(value)


def _count(shape: Iterable[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class TensorFile:
    """An open safetensors file whose tensors are read one at a time.

    `read` returns a private copy, so the file may be closed or replaced afterwards; `view` copies nothing.
    With `use_mmap` false the file is read with plain reads (some network drives dislike mapping).
    """

    def __init__(self, path: Path, *, use_mmap: bool = True) -> None:
        self.path = path
        self.header = read_header(path)
        self._stream = path.open("rb")
        self._map = mmap.mmap(self._stream.fileno(), 0, access=mmap.ACCESS_READ) if use_mmap else None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self._map = None  # unmapped with the last view
        self._stream.close()

    def read(self, name: str) -> Tensor:
        """One tensor on the CPU, in the file's dtype."""
        info = self.header.tensors[name]
        storage = torch.empty(info.end - info.start, dtype=torch.uint8)
        if storage.numel():
            view = storage.numpy().data
            if self._map is not None:
                view[:] = memoryview(self._map)[info.start : info.end]
            else:
                self._stream.seek(info.start)
                if self._stream.readinto(view) != len(view):
                    raise ModelFileError(f"{self.path}: ended early while reading tensor {name}")
        return storage.view(info.dtype).reshape(info.shape)

    def view(self, name: str) -> Tensor:
        """A tensor as a view of the mapped file; a private copy if the file is not mapped.

        It must not be written to, and as long as it is kept the file stays mapped.
        """
        info = self.header.tensors[name]
        if self._map is None or info.start == info.end or info.start % info.dtype.itemsize:
            return self.read(name)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            raw = torch.frombuffer(
                self._map, dtype=torch.uint8, offset=info.start, count=info.end - info.start
            )
        return raw.view(info.dtype).reshape(info.shape)


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors and the metadata of a (small) safetensors file."""
    with TensorFile(path) as file:
        return {name: file.read(name) for name in file.header.tensors}, dict(file.header.metadata)


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    makes_folder: bool = True,
    replaces: bool = True,
) -> None:
    """Write a safetensors file as one whole file; equal content gives equal bytes.

    Args:
        makes_folder, replaces: see `atomic_writer`.
    """
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    write_tensor_stream(
        path, layout, tensors.__getitem__, metadata, makes_folder=makes_folder, replaces=replaces
    )


def write_tensor_stream(
    path: Path,
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
    read: Callable[[str], Tensor],
    metadata: Mapping[str, str] | None = None,
    *,
    makes_folder: bool = True,
    replaces: bool = True,
) -> None:
    """`write_tensors` for more than fits in memory: `read(name)` is called once per tensor, in file order."""
    with atomic_writer(path, makes_folder=makes_folder, replaces=replaces) as stream:
        stream.write(encode_header(layout, metadata))
        for name in file_order(layout):
            tensor = read(name)
            assert (tensor.dtype, tuple(tensor.shape)) == layout[name], name
            for piece in tensor_bytes(tensor):
                stream.write(piece)


def tensor_bytes(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor as a file holds them; nothing for an empty one."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    if flat.numel():
        yield flat.view(torch.uint8).numpy().data


def encode_header(
    layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], metadata: Mapping[str, str] | None = None
) -> bytes:
    """Everything that comes before the tensor data in a file with these tensors."""
    header: dict[str, object] = {}
    if metadata:
        header["__metadata__"] = {key: metadata[key] for key in sorted(metadata)}
    offset = 0
    for name in file_order(layout):
        dtype, shape = layout[name]
        end = offset + _count(shape) * dtype.itemsize
        header[name] = {
            "dtype": _CODE_BY_DTYPE[dtype],
            "shape": list(shape),
            "data_offsets": [offset, end],
        }
        offset = end
    encoded = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode("utf-8")
    encoded += b" " * (-len(encoded) % 8)
    return struct.pack("<Q", len(encoded)) + encoded


def file_order(layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]) -> list[str]:
    """The order in which a file with these tensors holds them."""
    # Widest dtype first keeps every tensor aligned to its element size.
    return sorted(layout, key=lambda name: (-layout[name][0].itemsize, name))
