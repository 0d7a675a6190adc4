"""Decodes and writes sampled latents; keeps the latents of clips that cannot be written."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.outputs import (
    UNFINISHED_ENDING,
    WRITE_ERRORS,
    Content,
    OutputNames,
    keep_latents,
    write_outputs,
    write_spare_latents,
)
from kandinsky5.generation.settings import latent_metadata, settings_metadata
from kandinsky5.sampling.pipeline import decode_frames
from kandinsky5.sampling.requests import VideoRequest
from kandinsky5.vae.video_vae import VideoVAE
from modules.dtypes import dtype_name
from modules.errors import ResourceError, UserError
from modules.logs import get_logger

log = get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Sampled:
    """A finished sampling."""

    request: VideoRequest
    latents: Tensor
    """[1, 16, F, H, W] float32 on the CPU."""
    copy: Path | None = None
    """A file with the latents, until the clip is written."""


class ClipWriter:
    """Decodes and writes sampled clips; failed clips are kept as latents."""

    def __init__(self, config: GenerateConfig, names: OutputNames, compute_dtype: torch.dtype) -> None:
        self._config, self._names, self._dtype = config, names, dtype_name(compute_dtype)

    @property
    def needs_pixels(self) -> bool:
        return self._config.output.output_type != "latent"

    def decode_all(self, load_vae: Callable[[], VideoVAE], finished: deque[Sampled]) -> list[UserError]:
        """Decode and write the finished clips and remove them from the queue; returns the errors.

        A full disk or a failed encoder does not cost the other clips.
        """
        vae = load_vae() if finished and self.needs_pixels else None
        failures: list[UserError] = []
        while finished:
            try:
                self._write(vae, finished[0])
            except ResourceError as error:  # what can be kept of it is kept by now
                failures.append(error)
            finished.popleft()
        return failures

    def copied(self, sampled: Sampled) -> Sampled:
        """Save the latents at once: whatever ends the process before the clip is written leaves them."""
        paths = self._names.rescue_paths(sampled.request.seed)
        metadata = self._latent_metadata(sampled.request)
        try:
            place = write_spare_latents(paths, UNFINISHED_ENDING, sampled.latents, metadata)
        except WRITE_ERRORS as error:
            log.warning("%s: a copy of the latents could not be saved: %s", paths.folder, error)
            return sampled
        return replace(sampled, copy=place)

    @contextmanager
    def keeping(self, finished: deque[Sampled]) -> Iterator[None]:
        """Save the latents of clips still in `finished` when the block ends, even by an error."""
        try:
            yield
        finally:
            while finished:
                log.warning("%s", self._keep(finished.popleft()))

    def _keep(self, sampled: Sampled) -> str:
        paths = self._names.rescue_paths(sampled.request.seed)
        return keep_latents(paths, sampled.latents, self._latent_metadata(sampled.request), sampled.copy)

    def _write(self, vae: VideoVAE | None, sampled: Sampled) -> None:
        config, request = self._config, sampled.request
        frames: np.ndarray | None = None
        if vae is not None:
            try:
                frames = decode_frames(vae, sampled.latents, tile_px=config.vae.tile_px)
            except ResourceError as error:
                raise ResourceError([*error.problems, self._keep(sampled)]) from error
            frames = frames[: len(frames) - config.output.trim_tail_frames]
        content = Content(
            frames=frames,
            latents=sampled.latents,
            fps=config.output.fps,
            crf=config.output.crf,
            metadata=self._metadata(request),
            latent_metadata=self._latent_metadata(request),
            copy=sampled.copy,
        )
        written = write_outputs(lambda: self._names.paths(request.seed, request.num_frames), content)
        for path in written:
            log.info("wrote %s", path)

    def _metadata(self, request: VideoRequest) -> dict[str, str]:
        if self._config.output.no_metadata:
            return {}
        return settings_metadata(self._config, request, dtype=self._dtype)

    def _latent_metadata(self, request: VideoRequest) -> dict[str, str]:
        settings = self._metadata(request)
        return latent_metadata(request, settings) if settings else {}
