"""Checks from its header whether a cache matches the dataset file and the run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dataset.buckets import Size, bucket_sizes, choose_bucket, nabla_size
from dataset.cache.files import LatentCacheInfo, TextCacheInfo, upstream_latent_problem
from dataset.cache.names import LatentName, parse_latent_name
from dataset.config.config import AnyDatasetConfig, ImageDatasetConfig, VideoDatasetConfig
from dataset.geometry import pixel_size
from dataset.media.frames import fps_rules


@dataclass(frozen=True, kw_only=True, slots=True)
class MatchOptions:
    """Requirements of a run on its caches, and permitted deviations."""

    needs_image_latents: bool = False
    """An image-to-video task: clips must hold their first and last frame."""
    allow_missing: bool = False
    """Leave out items of which one of the two caches is missing."""
    allow_upstream_text_cache: bool = False
    """Use musubi-tuner's text caches for videos too."""
    strict: bool = False
    """Any item that was skipped is an error."""
    use_masks: bool = False
    """Read the masks of clips that have one."""
    use_prior: bool = False
    """Read the captions of the prior term."""
    text_limits: tuple[int, int] | None = None
    """At how many tokens (Qwen's, CLIP's) generation cuts captions; None does not compare."""


@dataclass(frozen=True, slots=True)
class CacheRules:
    """Requirements on the caches of a dataset; methods return the reason to reject one, or None."""

    dataset: AnyDatasetConfig
    options: MatchOptions

    def text_problem(self, info: TextCacheInfo) -> str | None:
        """Of a text cache."""
        template = self.dataset.template
        if info.is_ours:
            found = info.metadata["template"]
            if found != template:
                return f"template was {found!r}, is {template!r}"
            return self._limit_problem(info)
        if template == "video" and not self.options.allow_upstream_text_cache:
            return (
                "made by musubi-tuner with the prompt template for images "
                "(--allow_upstream_text_cache accepts it)"
            )
        return None

    def _limit_problem(self, info: TextCacheInfo) -> str | None:
        """A caption that is not cut as generation cuts it. CLIP's tokens cannot be counted in a cache."""
        limits = self.options.text_limits
        if limits is None:
            return None
        qwen, clip = (info.metadata.get(name) for name in ("qwen_max_length", "clip_max_length"))
        if qwen != str(limits[0]) and (info.num_tokens > limits[0] or str(info.num_tokens) == qwen):
            return (
                f"qwen_max_length was {qwen}, is {limits[0]} in generation, which cuts this caption of "
                f"{info.num_tokens} tokens elsewhere"
            )
        return None if clip == str(limits[1]) else f"clip_max_length was {clip}, is {limits[1]} in generation"

    def latents_problem(self, path: Path, info: LatentCacheInfo) -> str | None:
        """Of a latent cache."""
        name = parse_latent_name(path.name, self.dataset.content)
        assert name is not None  # `inspect_latent_cache`, which made `info`, refuses such a file
        if not info.is_ours:
            problem = upstream_latent_problem(path, self.dataset.content)
            if problem is not None:
                return problem
        if self.options.needs_image_latents and (name.num_frames or 1) > 1:
            if not info.is_ours:
                return "made by musubi-tuner, whose latents_image cannot be used for image-to-video"
            if info.image_key is None:
                return "holds no latents_image, which image-to-video needs"
        return self._size_problem(name, info) or self._frames_problem(name, info)

    def _size_problem(self, name: LatentName, info: LatentCacheInfo) -> str | None:
        allowed = self._allowed_sizes(name)
        found = pixel_size(*info.shape[1:])
        if found in allowed:
            return None
        sizes = " or ".join(f"{width}x{height}" for width, height in dict.fromkeys(allowed))
        return f"resolution was {found[0]}x{found[1]}, is {sizes or 'another'} by the dataset file"

    def _allowed_sizes(self, name: LatentName) -> tuple[Size, ...]:
        """The pixel sizes that the dataset file gives an item, without and with --nabla_resize."""
        dataset = self.dataset
        buckets = bucket_sizes(dataset.resolution, enable_bucket=dataset.enable_bucket)
        size = (name.width, name.height)
        if isinstance(dataset, ImageDatasetConfig):
            bucket = choose_bucket(
                size, dataset.resolution, buckets, bucket_no_upscale=dataset.bucket_no_upscale
            )
        elif size in buckets or dataset.bucket_no_upscale:
            bucket = size  # the name of a video's cache holds the bucket
        else:
            return (dataset.resolution,) if not dataset.enable_bucket else ()
        return bucket, nabla_size(bucket)

    def _frames_problem(self, name: LatentName, info: LatentCacheInfo) -> str | None:
        dataset = self.dataset
        if not isinstance(dataset, VideoDatasetConfig):
            return None
        if dataset.frame_extraction == "full":
            if (name.num_frames or 1) > dataset.max_frames:
                return f"frame_count was {name.num_frames}, is at most {dataset.max_frames} (max_frames)"
        elif name.num_frames not in dataset.target_frames:
            return f"frame_count was {name.num_frames}, is one of {list(dataset.target_frames)}"
        rules = fps_rules(dataset.resampling)
        if info.is_ours and info.metadata.get("fps") not in rules:
            return f"fps was {info.metadata.get('fps')!r}, is {rules[0]!r} by source_fps and target_fps"
        return None
