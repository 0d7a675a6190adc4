"""The dataset file (TOML or JSON) as frozen dataclasses, with every problem in it reported at once.

Keys and defaults are musubi-tuner's, so that its dataset files load unchanged.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

from dataset.buckets import Size
from dataset.config.keys import (
    EXTRACTION_KEYS,
    GENERAL_KEYS,
    IGNORED_IMAGE_KEYS,
    IGNORED_VIDEO_KEYS,
    IMAGE_KEYS,
    OLD_SPELLINGS,
    VIDEO_KEYS,
    KeyCheck,
    nearest_key,
)
from dataset.config.text import ConfigText, read_config_text
from dataset.geometry import FPS, round_frames
from dataset.media.files import Content
from dataset.media.frames import CutRule, FrameExtraction, Resampling, SceneCuts
from modules.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class _CommonConfig:
    """What image and video datasets share."""

    index: int
    """Number of the [[datasets]] table, from 0."""
    origin: str
    """Position of the source in the dataset file, for messages: "dataset.toml line 7"."""
    cache_directory: Path
    resolution: Size = (960, 544)
    """(width, height): its area is the target, and without buckets it is the size itself."""
    caption_extension: str | None = None
    caption_lines: bool = False
    """Every line of a caption file is a caption of its own, and one is drawn each time."""
    recursive: bool = False
    """Media of subfolders count too; their names then start with the folder's."""
    batch_size: int = 1
    num_repeats: int = 1
    enable_bucket: bool = False
    bucket_no_upscale: bool = False
    """Only ever true together with `enable_bucket`."""
    caption_dropout_rate: float = 0.0
    """Probability of training a clip with the empty caption."""
    mask_directory: Path | None = None
    """Masks for the masked loss, named like the media they belong to."""
    prior_caption: str | None = None
    """On which caption the LoRA is held to the base model; None means the empty one."""
    is_prior: bool = False
    """Its clips are not learned: on their captions the LoRA is held to the base model."""

    def describe(self) -> str:
        """Every setting that differs from its default, on one line."""
        own = [
            f"{item.name} {getattr(self, item.name)}"
            for item in fields(self)
            if item.name not in {"index", "origin"} and getattr(self, item.name) != item.default
        ]
        return ", ".join(own)

    def _text_settings(self, template: Content) -> dict[str, Any]:
        settings: dict[str, Any] = {"template": template, "caption_extension": self.caption_extension}
        if self.caption_lines:
            settings["caption_lines"] = True
        return settings | self._listing_settings()

    def _listing_settings(self) -> dict[str, Any]:
        return {"recursive": True} if self.recursive else {}

    def _size_settings(self) -> dict[str, Any]:
        return {
            "resolution": list(self.resolution),
            "enable_bucket": self.enable_bucket,
            "bucket_no_upscale": self.bucket_no_upscale,
            **self._listing_settings(),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class ImageDatasetConfig(_CommonConfig):
    """Images from a folder or a JSONL file; exactly one of the two is set."""

    image_directory: Path | None = None
    image_jsonl_file: Path | None = None

    @property
    def content(self) -> Content:
        """What the dataset holds, and how its cache names look."""
        return "image"

    @property
    def template(self) -> Content:
        """Which prompt template its captions take."""
        return "image"

    @property
    def directory(self) -> Path | None:
        """The folder of media, unless a JSONL file lists them."""
        return self.image_directory

    @property
    def jsonl_file(self) -> Path | None:
        """The JSONL file, unless a folder holds the media."""
        return self.image_jsonl_file

    @property
    def settings_hash(self) -> str:
        """Names the index entry of this dataset's latents: changes with all that decides what they hold."""
        return _hash({"content": self.content, **self._size_settings()})

    @property
    def text_settings_hash(self) -> str:
        """Names the index entry of this dataset's captions."""
        return _hash(self._text_settings(self.template))


@dataclass(frozen=True, kw_only=True, slots=True)
class VideoDatasetConfig(_CommonConfig):
    """Videos from a folder or a JSONL file; exactly one of the two is set."""

    video_directory: Path | None = None
    video_jsonl_file: Path | None = None
    target_frames: tuple[int, ...] = (1,)
    """Lengths to cut, in pixel frames, each 4k+1, ascending."""
    frame_extraction: FrameExtraction = "head"
    frame_stride: int = 1
    frame_sample: int = 1
    max_frames: int = 129
    source_fps: float | Literal["auto"] | None = None
    """Frames a second of the clips, or "auto" for each file's own rate; None uses every frame as it is."""
    scene_cuts: SceneCuts = "keep"
    """What is done where a video changes its scene, see `cut_scenes`."""
    target_fps: float = float(FPS)
    """Frames are dropped down to this rate when `source_fps` is given."""

    @property
    def content(self) -> Content:
        """What the dataset holds, and how its cache names look."""
        return "video"

    @property
    def template(self) -> Content:
        """Which prompt template its captions take: the image one when only single frames are cut.

        A video has one text cache for all its cuts, so single frames cut beside longer clips share theirs.
        """
        longest = self.max_frames if self.frame_extraction == "full" else max(self.target_frames)
        return "video" if round_frames(longest) > 1 else "image"

    @property
    def directory(self) -> Path | None:
        """The folder of media, unless a JSONL file lists them."""
        return self.video_directory

    @property
    def jsonl_file(self) -> Path | None:
        """The JSONL file, unless a folder holds the media."""
        return self.video_jsonl_file

    @property
    def cut_rule(self) -> CutRule:
        """How each video is cut."""
        return CutRule(
            frame_extraction=self.frame_extraction,
            target_frames=self.target_frames,
            frame_stride=self.frame_stride,
            frame_sample=self.frame_sample,
            max_frames=self.max_frames,
        )

    @property
    def resampling(self) -> Resampling | None:
        """The change of frame rate, in exact fractions; None when every frame is used."""
        if self.source_fps is None:
            return None
        source = None if self.source_fps == "auto" else exact_rate(self.source_fps)
        return Resampling(source, exact_rate(self.target_fps))

    @property
    def settings_hash(self) -> str:
        """Names the index entry of this dataset's latents: changes with all that decides what they hold."""
        settings: dict[str, Any] = {"content": self.content, **self._size_settings()}
        settings["frame_extraction"] = self.frame_extraction
        if self.frame_extraction == "full":
            settings["max_frames"] = round_frames(self.max_frames)
        else:
            settings["target_frames"] = list(self.target_frames)
        if self.frame_extraction == "slide":
            settings["frame_stride"] = self.frame_stride
        if self.frame_extraction == "uniform":
            settings["frame_sample"] = self.frame_sample
        if self.scene_cuts != "keep":
            settings["scene_cuts"] = self.scene_cuts
        change = self.resampling
        settings["rates"] = None if change is None else [change.source_name, str(change.target_fps)]
        return _hash(settings)

    @property
    def text_settings_hash(self) -> str:
        """Names the index entry of this dataset's captions."""
        return _hash(self._text_settings(self.template))


AnyDatasetConfig = ImageDatasetConfig | VideoDatasetConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class DatasetConfig:
    """A whole dataset file."""

    path: Path
    datasets: tuple[AnyDatasetConfig, ...]
    notes: tuple[str, ...] = ()
    """Remarks that require no change: log lines."""

    def describe(self) -> str:
        """The settings of all datasets, one line each."""
        return "\n".join(f"dataset {d.index} ({d.content}): {d.describe()}" for d in self.datasets)


def exact_rate(fps: float) -> Fraction:
    """A frame rate as the intended fraction: 29.97 is 30000/1001, 23.976 is 24000/1001, 30.0 is 30."""
    if fps == int(fps):
        return Fraction(int(fps))
    ntsc = Fraction(math.ceil(fps) * 1000, 1001)
    if abs(ntsc - Fraction(fps)) < Fraction(1, 200):
        return ntsc
    return Fraction(str(fps))


def load_dataset_config(
    path: Path, *, batch_size: int | None = None, caption_dropout_rate: float | None = None
) -> DatasetConfig:
    """Read a dataset file.

    Args:
        path: a `.toml` or `.json` file.
        batch_size, caption_dropout_rate: the command line's, used where the file gives none.
    Raises:
        ConfigError: all problems of the file, in one list.
    """
    text = read_config_text(path)
    options = {"batch_size": batch_size, "caption_dropout_rate": caption_dropout_rate}
    reader = _Reader(text, {key: value for key, value in options.items() if value is not None})
    datasets = reader.read()
    if reader.problems:
        raise ConfigError(reader.problems)
    return DatasetConfig(path=path, datasets=tuple(datasets), notes=tuple(reader.notes))


_TABLES = {"general": "[general]", "datasets": "[[datasets]]"}


class _Reader:
    """Walks the parsed file once and collects problems instead of stopping at the first."""

    def __init__(self, text: ConfigText, options: dict[str, Any]) -> None:
        self.text = text
        self.options = options
        """Of the command line: they count where the file is silent."""
        self.problems: list[str] = []
        self.notes: list[str] = []

    def read(self) -> list[AnyDatasetConfig]:
        root = dict(self.text.value)
        for key in list(root):
            if key not in _TABLES:
                nearest = difflib.get_close_matches(key, _TABLES, n=1)
                meant = nearest[0] if nearest and nearest[0] not in root else None
                hint = f"did you mean {_TABLES[meant]}?" if meant else f"known: {', '.join(_TABLES.values())}"
                line = self.text.table_lines.get(key)
                place = f"{self.text.path} line {line}" if line else str(self.text.path)
                self.problems.append(f"{place}: unknown top-level key {key!r}; {hint}")
                if meant:  # what is wrong in it is reported too
                    root[meant] = root[key]
        general = root.get("general", {})
        if not isinstance(general, dict):
            self.problems.append(f"{self.text.path}: [general] must be a table of settings")
            general = {}
        tables = root.get("datasets", [])
        if not isinstance(tables, list) or not tables or not all(isinstance(t, dict) for t in tables):
            self.problems.append(f"{self.text.path}: needs at least one [[datasets]] table")
            return []
        defaults = self._checked(general, GENERAL_KEYS, None)
        datasets = [self._dataset(index, table, defaults) for index, table in enumerate(tables)]
        complete = [dataset for dataset in datasets if dataset is not None]
        self._check_cache_directories(complete)
        return complete

    def _checked(
        self, table: dict[str, Any], keys: dict[str, KeyCheck], index: int | None, content: str = ""
    ) -> dict[str, Any]:
        """The values of a table that are right; what is wrong goes to the problems."""
        values = {}
        for key, raw in table.items():
            if key not in keys:
                self.problems.append(f"{self._where(index, key)}: {_unknown_key(key, keys, index, content)}")
                continue
            try:
                values[key] = keys[key](raw)
            except ValueError as error:
                self.problems.append(f"{self._where(index, key)}: {key} {error}, got {_shown(raw)}")
        return values

    def _where(self, index: int | None, key: str | None = None) -> str:
        line = self.text.line_of(index, key)
        place = f"{self.text.path} line {line}" if line else str(self.text.path)
        return f"{place}: {'[general]' if index is None else f'dataset {index}'}"

    def _dataset(
        self, index: int, table: dict[str, Any], defaults: dict[str, Any]
    ) -> AnyDatasetConfig | None:
        is_video = "video_directory" in table or "video_jsonl_file" in table
        content: Content = "video" if is_video else "image"
        if not is_video and "image_directory" not in table and "image_jsonl_file" not in table:
            self.problems.append(
                f"{self._where(index)}: has no source; give one of image_directory, image_jsonl_file, "
                "video_directory, video_jsonl_file"
            )
            return None
        problems_before = len(self.problems)
        ignored = IGNORED_VIDEO_KEYS if is_video else IGNORED_IMAGE_KEYS
        table = self._without_old_spellings(index, table) if not is_video else table
        keys = {**GENERAL_KEYS, **(VIDEO_KEYS if is_video else IMAGE_KEYS), **ignored}
        own = self._checked(table, keys, index, content)
        unused = sorted(key for key in own if key in ignored)
        if unused:
            self.notes.append(f"dataset {index}: {', '.join(unused)}: no effect with Kandinsky 5, ignored")
        given = {**self.options, **defaults, **own}
        given = {key: value for key, value in given.items() if key not in ignored}
        if not is_video:
            given.pop("target_fps", None)  # may stand in [general] for the video datasets
        self._check_together(index, given, own, content)
        self._note_idle(index, given, content)
        if len(self.problems) > problems_before:
            return None
        return self._build(index, given, content)

    def _without_old_spellings(self, index: int, table: dict[str, Any]) -> dict[str, Any]:
        table = dict(table)
        for old, new in OLD_SPELLINGS.items():
            if old in table:
                value = table.pop(old)
                table.setdefault(new, value)
                self.notes.append(f"dataset {index}: {old} is an old spelling of {new}")
        return table

    def _check_together(
        self, index: int, given: dict[str, Any], own: dict[str, Any], content: Content
    ) -> None:
        where = self._where(index)
        directory, jsonl = f"{content}_directory", f"{content}_jsonl_file"
        if directory in given and jsonl in given:
            self.problems.append(f"{where}: has both {directory} and {jsonl}; give one of them")
        if jsonl in given and "cache_directory" not in given:
            self.problems.append(f"{where}: {jsonl} needs cache_directory, the folder for its caches")
        if directory in given and "caption_extension" not in given:
            self.problems.append(
                f'{where}: {directory} needs caption_extension, for example caption_extension = ".txt"'
            )
        if given.get("is_prior") and "prior_caption" in own:
            self.problems.append(f"{where}: with is_prior its own captions are the prior; drop prior_caption")
        if jsonl in given and "caption_lines" in own:
            self.problems.append(
                f'{where}: caption_lines is for caption files; in a JSONL file write "caption": ["a", "b"]'
            )
        # In [general] it holds for those video datasets that it can hold for.
        if "target_fps" in own and "source_fps" not in given and content == "video":
            self.problems.append(
                f'{where}: target_fps has an effect only with source_fps: the rate of the clips or "auto"'
            )

    def _note_idle(self, index: int, given: dict[str, Any], content: Content) -> None:
        """Say which settings of a dataset change nothing because of its others."""
        if given.get("bucket_no_upscale") and not given.get("enable_bucket"):
            self.notes.append(
                f"dataset {index}: bucket_no_upscale has no effect without enable_bucket = true"
            )
        if f"{content}_jsonl_file" in given and given.get("recursive"):
            self.notes.append(f"dataset {index}: recursive has no effect with a JSONL file")
        if content == "video" and "target_fps" in given and "source_fps" not in given:
            self.notes.append(f"dataset {index}: target_fps has no effect without source_fps")
        mode = given.get("frame_extraction", "head")
        idle = [key for key, modes in EXTRACTION_KEYS.items() if key in given and mode not in modes]
        if idle:
            self.notes.append(
                f'dataset {index}: {", ".join(idle)}: no effect with frame_extraction = "{mode}"'
            )

    def _build(self, index: int, given: dict[str, Any], content: Content) -> AnyDatasetConfig:
        source_key = f"{content}_directory" if f"{content}_directory" in given else f"{content}_jsonl_file"
        line = self.text.line_of(index, source_key)
        given["origin"] = f"{self.text.path} line {line}" if line else str(self.text.path)
        given["index"] = index
        given.setdefault("cache_directory", given[source_key])
        if not given.get("enable_bucket", False):
            given["bucket_no_upscale"] = False
        if content == "image":
            return ImageDatasetConfig(**given)
        return self._rounded(VideoDatasetConfig(**given), explicit_frames=given.get("target_frames"))

    def _rounded(
        self, dataset: VideoDatasetConfig, explicit_frames: Sequence[int] | None
    ) -> VideoDatasetConfig:
        rounded = tuple(sorted({round_frames(length) for length in dataset.target_frames}))
        if explicit_frames is not None and rounded != tuple(explicit_frames):
            self.notes.append(
                f"dataset {dataset.index}: target_frames {list(explicit_frames)} become {list(rounded)} "
                "(lengths are 4k+1: 1, 5, 9, ...)"
            )
        dataset = replace(dataset, target_frames=rounded)
        if dataset.frame_extraction == "uniform" and dataset.frame_sample == 1:
            self.notes.append(f"dataset {dataset.index}: uniform with frame_sample = 1 is the same as head")
            dataset = replace(dataset, frame_extraction="head")
        return dataset

    def _check_cache_directories(self, datasets: Sequence[AnyDatasetConfig]) -> None:
        first_with: dict[tuple[str, ...], int] = {}
        for dataset in datasets:
            source = dataset.jsonl_file or dataset.directory
            assert source is not None
            places = (os.path.normcase(os.path.realpath(path)) for path in (dataset.cache_directory, source))
            other = first_with.setdefault((dataset.content, *places), dataset.index)
            if other != dataset.index:
                self.problems.append(
                    f"{self.text.path}: datasets {other} and {dataset.index} have the same "
                    f"{dataset.content}s and the same cache_directory ({dataset.cache_directory}), where "
                    "their caches would replace each other; give each its own"
                )


def _unknown_key(key: str, keys: dict[str, KeyCheck], index: int | None, content: str) -> str:
    if index is None and (key in VIDEO_KEYS or key in IMAGE_KEYS):
        return f"{key} belongs in a [[datasets]] table, not in [general]"
    if content == "image" and key in VIDEO_KEYS:
        return f"{key} is a key of video datasets, this one has images"
    if content == "video" and key in IMAGE_KEYS:
        return f"{key} is a key of image datasets, this one has videos"
    hint = nearest_key(key, keys)
    return f"unknown key {key!r}" + (
        f", did you mean {hint}?" if hint else f"; known keys: {', '.join(keys)}"
    )


def _shown(raw: Any) -> str:
    text = json.dumps(raw, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def _hash(settings: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
