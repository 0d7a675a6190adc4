"""The cache format: tensor keys, metadata, and checks that a file is up to date.

Keys and names are musubi-tuner's; its files are read where their content is known to be correct.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from dataset.cache.names import parse_latent_name
from dataset.geometry import LATENT_CHANNELS, PIXELS_PER_LATENT, latent_frame_count, pixel_size
from dataset.media.files import Content
from modules.dtypes import dtype_from_word, dtype_name
from modules.errors import CacheError, DataError, ModelFileError, NewerCacheError
from modules.messages import counted
from modules.parsing import whole_number
from modules.tensor_files import TensorFile, TensorFileHeader, read_header, write_tensors

if TYPE_CHECKING:  # training reads caches and needs no media libraries
    from dataset.clips import PlannedClip

ARCHITECTURE = "kandinsky5"
FORMAT_VERSION = "1.0.1"
"""musubi-tuner's, which its readers expect."""
CACHE_VERSION = 1
"""Ours: incremented when the meaning of the content changes; older caches are then rebuilt."""

_SINGLE_ENCODES = "single_image_encodes"
_UPSTREAM_MAX_FRAMES = 24
"""Above this musubi-tuner's time tiles shift the content of a clip."""
_DTYPES = ("float8_e4m3fn", "float8_e5m2", "bfloat16", "float16", "float32")
_LATENT_KEY = re.compile(rf"(?P<name>latents(?:_image)?)_\d+x\d+x\d+_(?:{'|'.join(_DTYPES)})")
_TYPED_KEY = re.compile(rf"(?P<name>.+?)_(?:{'|'.join(_DTYPES)})")


class CacheMeta:
    """Dataclasses whose fields are written into a cache's metadata as strings of the same name."""

    __slots__ = ()

    def to_strings(self) -> dict[str, str]:
        """The metadata entries."""
        return {f.name: str(getattr(self, f.name)) for f in fields(self)}  # type: ignore[arg-type]

    def difference(self, found: Mapping[str, str]) -> str | None:
        """The first field in which a file's metadata differ from this, for a message; None if none does."""
        for name, expected in self.to_strings().items():
            if found.get(name) != expected:
                return f"{name} was {_short(found.get(name))}, is {_short(expected)}"
        return None


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCacheMeta(CacheMeta):
    """Everything that a latent cache depends on; equal metadata means equal latents."""

    width: int
    height: int
    """As in the file name: the source's size for an image, the bucket's for a video."""
    frame_count: int
    """Pixel frames."""
    frame_start: int
    crop: str
    """Encoded pixel size, "672x384"."""
    fps: str
    """How the frame rate was changed."""
    dtype: str
    """torch's word for the stored dtype."""
    vae_tile: str
    """Tile side in pixels, or "none"."""
    source_fingerprint: str
    encoder_fingerprint: str
    latents_image: str = _SINGLE_ENCODES


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCacheMeta(CacheMeta):
    """Everything that a text cache depends on."""

    caption1: str
    more_captions: tuple[str, ...] = ()
    """Recorded as caption2, caption3, ..."""
    template: Content
    qwen_max_length: int
    clip_max_length: int
    encoder_fingerprint: str

    @property
    def captions(self) -> tuple[str, ...]:
        return self.caption1, *self.more_captions

    def to_strings(self) -> dict[str, str]:
        """The metadata entries."""
        entries = CacheMeta.to_strings(self)
        del entries["more_captions"]
        return entries | {f"caption{n}": text for n, text in enumerate(self.captions, start=1)}

    def difference(self, found: Mapping[str, str]) -> str | None:
        """The first field in which a file's metadata differ from this, for a message; None if none does."""
        recorded = _num_captions(found)
        if recorded > len(self.captions):
            return f"captions were {recorded}, are {len(self.captions)}"
        return CacheMeta.difference(self, found)


def _num_captions(metadata: Mapping[str, str]) -> int:
    return sum(re.fullmatch(r"caption\d+", name) is not None for name in metadata)


def _short(text: str | None) -> str:
    if text is None:
        return "not recorded"
    return repr(text if len(text) <= 60 else text[:57] + "...")


def latent_meta(
    clip: PlannedClip, *, encoder_fingerprint: str, dtype: str, tile_px: int | None
) -> LatentCacheMeta:
    """Metadata that an up-to-date cache of this clip has; dtype by torch's name, "float16"."""
    width, height = clip.source_size if clip.is_image else clip.bucket
    return LatentCacheMeta(
        width=width,
        height=height,
        frame_count=clip.num_frames,
        frame_start=clip.start,
        crop=f"{clip.crop[0]}x{clip.crop[1]}",
        fps=clip.fps,
        dtype=dtype,
        vae_tile="none" if tile_px is None else str(tile_px),
        source_fingerprint=clip.source_fingerprint,
        encoder_fingerprint=encoder_fingerprint,
    )


# ------------------------------------------------------------------------------------------------ headers


def cache_origin(header: TensorFileHeader) -> str:
    """Identifies the inputs and shapes of a cache; equal for a cache that is rebuilt from the same inputs."""
    tensors = [[name, dtype_name(info.dtype), list(info.shape)] for name, info in header.tensors.items()]
    named = json.dumps([sorted(header.metadata.items()), sorted(tensors)])
    return hashlib.sha256(named.encode("utf-8")).hexdigest()[:32]


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCacheInfo:
    """The contents of a latent cache by its header."""

    latents_key: str
    image_key: str | None
    shape: tuple[int, int, int]
    """(latent_frames, latent_height, latent_width)."""
    metadata: Mapping[str, str]
    is_ours: bool
    """Written by this program, not by musubi-tuner."""
    origin: str
    """See `cache_origin`."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCacheInfo:
    """The contents of a text cache by its header."""

    keys: tuple[tuple[str, str], ...]
    """For each caption the keys of its token embeddings and of its pooled one."""
    embed_dims: tuple[int, int]
    """Width of the token embeddings and of the pooled one."""
    num_tokens: int
    """Of its longest caption."""
    metadata: Mapping[str, str]
    is_ours: bool
    origin: str
    """See `cache_origin`."""


def checked_header(path: Path) -> tuple[TensorFileHeader, bool]:
    """The header of a cache, and whether this program wrote it.

    Raises:
        CacheError: it is damaged, foreign or of another version.
    """
    try:
        header = read_header(path)
    except ModelFileError as error:
        raise CacheError(str(error)) from error
    architecture = header.metadata.get("architecture")
    if architecture != ARCHITECTURE:
        raise CacheError(f"{path}: is no Kandinsky 5 cache (architecture {architecture!r})")
    version = header.metadata.get("k5_cache_version")
    if version is None:
        return header, False
    number = whole_number(version)
    if number is None or number > CACHE_VERSION:
        raise NewerCacheError(
            f"{path}: made by a newer version of this program "
            f"(cache version {version}, this one knows {CACHE_VERSION})"
        )
    if number < CACHE_VERSION:
        raise CacheError(f"{path}: made by an older version of this program (cache version {version})")
    return header, True


def _plain_name(key: str) -> str:
    """A tensor's name without `varlen_`, size and dtype."""
    key = key.removeprefix("varlen_")
    if key.endswith("_mask"):
        return key
    match = _LATENT_KEY.fullmatch(key) or _TYPED_KEY.fullmatch(key)
    return match["name"] if match else key


def _keys_by_name(path: Path, header: TensorFileHeader) -> dict[str, str]:
    keys: dict[str, str] = {}
    for key in header.tensors:
        if keys.setdefault(_plain_name(key), key) != key:
            raise CacheError(f"{path}: holds {_plain_name(key)} twice: {keys[_plain_name(key)]} and {key}")
    return keys


def inspect_latent_cache(path: Path, content: Content) -> LatentCacheInfo:
    """Check a latent cache by its header: whole, ours or musubi-tuner's, and of the shape in its name.

    Raises:
        CacheError: it is damaged, foreign, of another version, or its frame count does not fit its name.
    """
    header, is_ours = checked_header(path)
    keys = _keys_by_name(path, header)
    if "latents" not in keys:
        raise CacheError(f"{path}: holds no latents")
    shape = header.tensors[keys["latents"]].shape
    if len(shape) != 4 or shape[0] != LATENT_CHANNELS or min(shape) < 1:
        raise CacheError(f"{path}: latents have the shape {list(shape)}, expected [16, F, H, W]")
    image_key = keys.get("latents_image")
    if image_key is not None and header.tensors[image_key].shape != (LATENT_CHANNELS, 2, *shape[2:]):
        found = list(header.tensors[image_key].shape)
        raise CacheError(f"{path}: latents_image has the shape {found}, expected [16, 2, H, W]")
    _check_frame_count(path, content, shape[1])
    return LatentCacheInfo(
        latents_key=keys["latents"],
        image_key=image_key,
        shape=(shape[1], shape[2], shape[3]),
        metadata=header.metadata,
        is_ours=is_ours,
        origin=cache_origin(header),
    )


def _check_frame_count(path: Path, content: Content, latent_frames: int) -> None:
    name = parse_latent_name(path.name, content)
    if name is None:
        raise CacheError(f"{path}: the name is not that of the cache of {content}s")
    expected = latent_frame_count(name.num_frames or 1)
    if latent_frames != expected:
        raise CacheError(
            f"{path}: holds {latent_frames} latent frames, but {name.num_frames or 1} pixel frames "
            f"in its name make {expected}"
        )


def upstream_latent_problem(path: Path, content: Content) -> str | None:
    """Reason not to use a latent cache of musubi-tuner, or None."""
    name = parse_latent_name(path.name, content)
    if name is not None and (name.num_frames or 1) > _UPSTREAM_MAX_FRAMES:
        return f"made by musubi-tuner, which shifts the content of clips over {_UPSTREAM_MAX_FRAMES} frames"
    return None


def inspect_text_cache(path: Path) -> TextCacheInfo:
    """Check a text cache by its header.

    Raises:
        CacheError: it is damaged, foreign or of another version.
    """
    header, _ = checked_header(path)
    keys = _keys_by_name(path, header)
    captions = tuple(
        _caption_keys(path, header, keys, number)
        for number in range(1, max(1, _num_captions(header.metadata)) + 1)
    )
    dims = {(header.tensors[embeds].shape[1], header.tensors[pooled].shape[0]) for embeds, pooled in captions}
    if len(dims) > 1:
        raise CacheError(f"{path}: its captions have different widths: {sorted(dims)}")
    return TextCacheInfo(
        keys=captions,
        embed_dims=dims.pop(),
        num_tokens=max(header.tensors[embeds].shape[0] for embeds, _ in captions),
        metadata=header.metadata,
        # musubi-tuner writes no template, because it knows only one.
        is_ours="template" in header.metadata,
        origin=cache_origin(header),
    )


def _caption_keys(
    path: Path, header: TensorFileHeader, keys: Mapping[str, str], number: int
) -> tuple[str, str]:
    """The keys of one caption's two tensors, their shapes checked."""
    prefix = _caption_prefix(number)
    missing = [name for name in ("text_embeds", "pooled_embed") if prefix + name not in keys]
    if missing:
        raise CacheError(f"{path}: holds no {' and no '.join(prefix + name for name in missing)}")
    embeds_key, pooled_key = keys[f"{prefix}text_embeds"], keys[f"{prefix}pooled_embed"]
    embeds, pooled = header.tensors[embeds_key].shape, header.tensors[pooled_key].shape
    mask_key = keys.get(f"{prefix}attention_mask")
    mask = embeds[:1] if mask_key is None else header.tensors[mask_key].shape
    if len(embeds) != 2 or len(pooled) != 1 or min(*embeds, *pooled) < 1 or mask != embeds[:1]:
        raise CacheError(
            f"{path}: unexpected shapes: {prefix}text_embeds {list(embeds)}, "
            f"{prefix}pooled_embed {list(pooled)}, {prefix}attention_mask {list(mask)}"
        )
    return embeds_key, pooled_key


def _caption_prefix(number: int) -> str:
    """Starts the tensor names of a caption; the first one's are musubi-tuner's."""
    return "" if number == 1 else f"caption{number}_"


# ---------------------------------------------------------------------------------------------- freshness


def latent_cache_problem(path: Path, expected: LatentCacheMeta) -> str | None:
    """Reason to (re)build the latent cache at `path`; None if it is complete and up to date.

    Raises:
        NewerCacheError: it was made by a newer version of this program.
    """
    if not path.is_file():
        return "no file"
    as_video = parse_latent_name(path.name, "video")
    is_video = as_video is not None and as_video.num_frames == expected.frame_count
    try:
        info = inspect_latent_cache(path, "video" if is_video else "image")
    except NewerCacheError:
        raise
    except CacheError as error:
        return str(error)
    if not info.is_ours:
        return "made by musubi-tuner"
    if info.image_key is None:
        return "holds no latents_image"
    width, height = (int(side) // PIXELS_PER_LATENT for side in expected.crop.split("x"))
    if info.shape[1:] != (height, width):
        return f"latents are {info.shape[2]}x{info.shape[1]}, should be {width}x{height}"
    return expected.difference(info.metadata)


def text_cache_problem(path: Path, expected: TextCacheMeta) -> str | None:
    """Reason to (re)build the text cache at `path`; None if it is complete and up to date.

    Raises:
        NewerCacheError: it was made by a newer version of this program.
    """
    if not path.is_file():
        return "no file"
    try:
        info = inspect_text_cache(path)
    except NewerCacheError:
        raise
    except CacheError as error:
        return str(error)
    return expected.difference(info.metadata)


# ------------------------------------------------------------------------------------------------ writing


def write_latent_cache(path: Path, latents: Tensor, latents_image: Tensor, meta: LatentCacheMeta) -> None:
    """Write one latent cache as a whole file.

    Args:
        latents: [16, F, H, W], scaled; stored in meta.dtype.
        latents_image: [16, 2, H, W], the single-image encodes of the first and the last pixel frame.
    Raises:
        DataError: a number is not finite, before or after the change of dtype; nothing is written.
    """
    dtype = dtype_from_word(meta.dtype)
    frames, height, width = latents.shape[1:]
    assert latents.shape[0] == LATENT_CHANNELS
    assert frames == latent_frame_count(meta.frame_count)
    assert "{}x{}".format(*pixel_size(height, width)) == meta.crop
    assert latents_image.shape == (LATENT_CHANNELS, 2, height, width)
    tensors = {
        f"latents_{frames}x{height}x{width}_{dtype_name(dtype)}": _finite(path, "latents", latents.to(dtype)),
        f"latents_image_2x{height}x{width}_{dtype_name(dtype)}": _finite(
            path, "latents_image", latents_image.to(dtype)
        ),
    }
    write_tensors(path, tensors, written_metadata(meta))


def write_text_cache(
    path: Path,
    text_embeds: Tensor,
    pooled_embed: Tensor,
    meta: TextCacheMeta,
    more: Sequence[tuple[Tensor, Tensor]] = (),
) -> None:
    """Write one text cache as a whole file. With one caption it is what musubi-tuner writes and reads.

    Args:
        text_embeds: [L, dim], real tokens only; stored as bfloat16.
        pooled_embed: [dim2]; stored as float32.
        more: the same two for each of meta.more_captions.
    Raises:
        DataError: a number is not finite; nothing is written.
    """
    assert len(more) == len(meta.more_captions)
    tensors = {}
    for number, (embeds, pooled) in enumerate([(text_embeds, pooled_embed), *more], start=1):
        assert embeds.ndim == 2
        assert pooled.ndim == 1
        prefix = _caption_prefix(number)
        tensors |= {
            f"{prefix}text_embeds_bfloat16": _finite(path, "text_embeds", embeds.to(torch.bfloat16)),
            f"{prefix}pooled_embed_float32": _finite(path, "pooled_embed", pooled.to(torch.float32)),
            f"{prefix}attention_mask": torch.ones(embeds.shape[0], dtype=torch.bool),
        }
    write_tensors(path, tensors, written_metadata(meta))


def written_metadata(meta: CacheMeta) -> dict[str, str]:
    """The metadata of a new cache: its own and our mark."""
    return {
        **meta.to_strings(),
        "architecture": ARCHITECTURE,
        "format_version": FORMAT_VERSION,
        "k5_cache_version": str(CACHE_VERSION),
    }


def _finite(path: Path, name: str, tensor: Tensor) -> Tensor:
    if not torch.isfinite(tensor).all():
        bad = int((~torch.isfinite(tensor)).sum())
        raise DataError(
            f"{path.name}: {bad} of {tensor.numel()} {name} are not finite numbers in "
            f"{dtype_name(tensor.dtype)}; nothing was written. If the encoder overflows in half precision, "
            "use --vae_dtype bfloat16 or float32"
        )
    return tensor


# ------------------------------------------------------------------------------------------------ reading


@dataclass(frozen=True, kw_only=True, slots=True)
class LatentCache:
    """The tensors of a latent cache, float32."""

    latents: Tensor
    """[16, F, H, W], scaled."""
    latents_image: Tensor | None
    """[16, 2, H, W], first and last pixel frame encoded alone; None where a file has none to be used."""


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCache:
    """The tensors of a text cache."""

    text_embeds: Tensor
    """[L, dim], as stored (bfloat16)."""
    pooled_embed: Tensor
    """[dim2], float32."""


def read_latent_cache(path: Path, content: Content) -> LatentCache:
    """Read a latent cache.

    Raises:
        CacheError: as `inspect_latent_cache`, or a number is not finite.
    """
    info = inspect_latent_cache(path, content)
    # musubi-tuner's latents_image are slices of the clip's latents, which is something else.
    image_key = info.image_key if info.is_ours else None
    keys = [info.latents_key] if image_key is None else [info.latents_key, image_key]
    tensors = [tensor.float() for tensor in read_cached(path, *keys)]
    return LatentCache(latents=tensors[0], latents_image=tensors[1] if image_key is not None else None)


def read_text_cache(path: Path, caption: int = 0) -> TextCache:
    """Read the caption at a zero-based index of a text cache.

    Raises:
        CacheError: as `inspect_text_cache`, a number is not finite, or the index is out of range.
    """
    info = inspect_text_cache(path)
    if caption >= len(info.keys):
        found = counted(len(info.keys), "caption")
        raise CacheError(f"{path}: holds {found}, not {caption + 1}: it was replaced")
    tensors = read_cached(path, *info.keys[caption])
    return TextCache(text_embeds=tensors[0], pooled_embed=tensors[1].float())


def read_cached(path: Path, *keys: str) -> list[Tensor]:
    """Read tensors of a cache by key.

    Raises:
        CacheError: the file is damaged, or a number is not finite.
    """
    try:
        # Plain reads: a cache file that is replaced while it is mapped would end the process.
        with TensorFile(path, use_mmap=False) as file:
            tensors = [file.read(key) for key in keys]
    except ModelFileError as error:
        raise CacheError(str(error)) from error
    for key, tensor in zip(keys, tensors, strict=True):
        if not torch.isfinite(tensor.float()).all():
            raise CacheError(f"{path}: {key} holds numbers that are not finite; cache this item again")
    return tensors
