"""The safetensors files of one model, whether it comes as one file, as shards or as a folder, read as one."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

from torch import Tensor

from modules.errors import ModelFileError
from modules.messages import names_in_short
from modules.parsing import parse_json
from modules.tensor_files import SAFETENSORS_SUFFIXES, TensorFile, TensorInfo

DOWNLOAD_INSTEAD = (
    "Download the model's .safetensors checkpoint in bfloat16, in float8 or in ComfyUI's int8 layout "
    "(docs/kandinsky5.md, Download); --fp8_base and --int8_base make it smaller while it loads."
)
"""The way on from a checkpoint in a format that is not read."""

_SHARD = re.compile(r"(?P<stem>.+)-(?P<index>\d{5})-of-(?P<count>\d{5})\.safetensors")
_INDEX_SUFFIX = ".safetensors.index.json"
_GGUF_MAGIC = b"GGUF"
_PICKLES = (".bin", ".ckpt", ".pt", ".pth", ".pkl")
_MAX_INDEX_BYTES = 64 * 2**20


def find_weight_files(path: Path, *, subfolder: str) -> tuple[Path, ...]:
    """The files that together hold the model at `path`.

    Args:
        path: a .safetensors file, one shard of several (`name-00001-of-00003.safetensors`), their
            `.safetensors.index.json`, or a folder with one of these; a folder may hold them in `subfolder`.
    Raises:
        ModelFileError: nothing there, nothing usable, more than one choice, or a shard is missing.
    """
    if path.is_dir():
        inner = path / subfolder
        return _files_of_folder(inner if inner.is_dir() else path)
    if not path.is_file():
        raise ModelFileError(f"{path}: no such file or folder")
    if path.name.endswith(_INDEX_SUFFIX):
        return _files_of_index(path)
    if path.suffix.lower() not in SAFETENSORS_SUFFIXES or _is_gguf(path):
        raise ModelFileError(f"{path}: {_unread_format(path)}. {DOWNLOAD_INSTEAD}")
    return _files_of_shard(path) if _SHARD.fullmatch(path.name) else (path,)


def key_prefix(names: Iterable[str], marker: str) -> str | None:
    """What stands before the model's own keys in a file: the text before `marker`, the shortest there is.

    Args:
        marker: a key that every such model has. A prefix ends at a dot.
    Returns:
        "" if nothing stands there, None if no name ends with the marker.
    """
    found = [name.removesuffix(marker) for name in names if name.endswith(marker)]
    return min((prefix for prefix in found if prefix == "" or prefix.endswith(".")), key=len, default=None)


def _is_gguf(path: Path) -> bool:
    """By its first bytes: people rename files."""
    try:
        with path.open("rb") as stream:
            return stream.read(len(_GGUF_MAGIC)) == _GGUF_MAGIC
    except OSError:
        return False  # its header reports it


def _unread_format(path: Path) -> str:
    """What a file is that is not read, for a message."""
    if path.suffix.lower() == ".gguf" or _is_gguf(path):
        return "a GGUF file, whose blocks of a few bits are not read here"
    if path.suffix.lower() in _PICKLES:
        return "not a .safetensors file: a pickle, which can run programs when it is opened"
    return "not a .safetensors file"


def _files_of_folder(folder: Path) -> tuple[Path, ...]:
    indices = sorted(folder.glob(f"*{_INDEX_SUFFIX}"))
    if len(indices) == 1:
        return _files_of_index(indices[0])
    files = sorted(file for file in folder.iterdir() if file.suffix.lower() in SAFETENSORS_SUFFIXES)
    stems = {match["stem"] if (match := _SHARD.fullmatch(file.name)) else file.name for file in files}
    if not files:
        others = [path for path in sorted(folder.iterdir()) if path.suffix.lower() in (".gguf", *_PICKLES)]
        found = f" ({others[0].name} is {_unread_format(others[0])}). {DOWNLOAD_INSTEAD}" if others else ""
        raise ModelFileError(
            f"{folder}: a folder without .safetensors files{found or '; name the model file itself'}"
        )
    if len(stems) > 1 or len(indices) > 1:
        names = names_in_short([file.name for file in files])
        raise ModelFileError(f"{folder}: holds several models; name one file ({names})")
    return _files_of_shard(files[0]) if _SHARD.fullmatch(files[0].name) else (files[0],)


def _files_of_shard(path: Path) -> tuple[Path, ...]:
    match = _SHARD.fullmatch(path.name)
    assert match is not None
    count = int(match["count"])
    names = [f"{match['stem']}-{index:05d}-of-{count:05d}.safetensors" for index in range(1, count + 1)]
    return _existing(path.parent, names)


def _files_of_index(path: Path) -> tuple[Path, ...]:
    if path.stat().st_size > _MAX_INDEX_BYTES:
        raise ModelFileError(f"{path}: too large for an index of shards")
    try:
        names = set(parse_json(path.read_bytes())["weight_map"].values())
        outside = [name for name in names if Path(name).name != name]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelFileError(f"{path}: not a usable index of shards ({error})") from error
    if outside or not names:
        raise ModelFileError(f"{path}: must name files of its own folder, got {outside or 'none'}")
    return _existing(path.parent, sorted(names))


def _existing(folder: Path, names: list[str]) -> tuple[Path, ...]:
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ModelFileError(
            f"{folder}: {len(missing)} of {len(names)} shards are missing: {names_in_short(missing)}. "
            "Download them again."
        )
    return tuple(folder / name for name in names)


class WeightSource(Protocol):
    """Source of the tensors of a model, by name."""

    tensors: Mapping[str, TensorInfo]
    metadata: Mapping[str, str]

    def read(self, name: str) -> Tensor:
        """A private copy of one tensor in the dtype that `tensors` gives."""
        ...

    def view(self, name: str) -> Tensor:
        """One tensor that is only valid until the next is asked for."""
        ...


class WeightFiles:
    """Open safetensors files, addressed by tensor name; see `open_weight_files`."""

    def __init__(self, files: Mapping[Path, TensorFile]) -> None:
        self._file_by_tensor: dict[str, TensorFile] = {}
        metadata: dict[str, str] = {}
        for path, file in files.items():
            repeated = self._file_by_tensor.keys() & file.header.tensors.keys()
            if repeated:
                raise ModelFileError(
                    f"{path}: tensor {min(repeated)} is in another file of the model as well"
                )
            self._file_by_tensor |= dict.fromkeys(file.header.tensors, file)
            metadata |= file.header.metadata
        self.metadata: Mapping[str, str] = metadata
        self.tensors: Mapping[str, TensorInfo] = {
            name: file.header.tensors[name] for name, file in self._file_by_tensor.items()
        }

    def read(self, name: str) -> Tensor:
        """A private copy of one tensor, on the CPU, in the file's dtype."""
        return self._file_by_tensor[name].read(name)

    def view(self, name: str) -> Tensor:
        """A tensor as a view of its file, see `TensorFile.view`."""
        return self._file_by_tensor[name].view(name)


@contextmanager
def open_weight_files(paths: tuple[Path, ...], *, use_mmap: bool = True) -> Iterator[WeightFiles]:
    """Open the files for the length of the block; only their headers are read at first."""
    files: dict[Path, TensorFile] = {}
    try:
        for path in paths:
            files[path] = TensorFile(path, use_mmap=use_mmap)
        yield WeightFiles(files)
    finally:
        for file in files.values():
            file.close()
