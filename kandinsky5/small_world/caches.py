"""Training data of the small base's DiT: latents of drawn clips and encoded captions, in two files."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from dataset.geometry import FRAMES_PER_LATENT
from kandinsky5.configs.text_encoders import TextEncodersConfig
from kandinsky5.model.conditioning import TextConditioning
from kandinsky5.small_world.world import ALL_SCENES, WORDINGS, Scene, draw
from kandinsky5.text.encoders import load_text_encoders
from kandinsky5.vae.video_vae import VideoVAE
from modules.logs import get_logger

log = get_logger(__name__)

_CLIPS_AT_ONCE = 8


@dataclass(frozen=True, slots=True)
class ClipCache:
    """Posteriors of drawn clips, scaled as the DiT takes them."""

    mean: Tensor
    """[N, 16, 5, 8, 8]."""
    deviation: Tensor
    """The same shape."""
    singles: Tensor
    """[N, 16, 5, 8, 8], the pixel frames 0, 4, ... 16, encoded each on its own."""
    scenes: Sequence[Scene]

    def __len__(self) -> int:
        return len(self.scenes)

    @classmethod
    def make(
        cls, vae: VideoVAE, scenes: Sequence[Scene], clips_per_scene: int, generator: torch.Generator
    ) -> Self:
        """Draw and encode `clips_per_scene` clips of every scene."""
        wanted = [scene for scene in scenes for _ in range(clips_per_scene)]
        means, deviations, singles = [], [], []
        for start in range(0, len(wanted), _CLIPS_AT_ONCE):
            pixels = draw(wanted[start : start + _CLIPS_AT_ONCE], generator)
            mean, logvar = vae.encode_moments(pixels).chunk(2, dim=1)
            means.append(mean)
            deviations.append((0.5 * logvar).exp())
            frames = pixels[:, :, ::FRAMES_PER_LATENT].transpose(1, 2).flatten(0, 1)[:, :, None]
            alone = vae.encode_moments(frames)[:, : mean.shape[1], 0]
            singles.append(alone.unflatten(0, (len(pixels), -1)).transpose(1, 2))
            if start % (50 * _CLIPS_AT_ONCE) == 0:
                log.info("clip latents: %d of %d", start, len(wanted))
        scale = vae.scaling_factor
        return cls(
            torch.cat(means) * scale, torch.cat(deviations) * scale, torch.cat(singles) * scale, wanted
        )

    def draw_latents(self, rows: Tensor, latent_frames: int, generator: torch.Generator) -> Tensor:
        """One posterior draw per row, [B, 16, F, 8, 8]: the beginning of each clip.

        The VAE is causal but for its norms, whose statistics run over the clip: the beginning of an encoded
        clip is within a hundredth of a deviation of the encoded beginning.
        """
        mean = self.mean[rows, :, :latent_frames]
        noise = torch.randn(mean.shape, generator=generator)
        return mean + self.deviation[rows, :, :latent_frames] * noise

    def save(self, path: Path) -> None:
        numbers = torch.tensor([ALL_SCENES.index(scene) for scene in self.scenes])
        torch.save(
            {"mean": self.mean, "deviation": self.deviation, "singles": self.singles, "scenes": numbers}, path
        )

    @classmethod
    def load(cls, path: Path) -> Self:
        stored = torch.load(path, weights_only=True)
        scenes = [ALL_SCENES[number] for number in stored["scenes"].tolist()]
        return cls(stored["mean"], stored["deviation"], stored["singles"], scenes)


@dataclass(frozen=True, slots=True)
class TextCache:
    """Every caption of the world with both prompt templates, the empty one and the negative prompt."""

    entries: dict[str, TextConditioning]
    negative_prompt: str

    @classmethod
    def make(cls, qwen: Path, clip: Path) -> Self:
        """Encode all wordings of all scenes."""
        config = TextEncodersConfig(text_encoder_qwen=str(qwen), text_encoder_clip=str(clip))
        encoders = load_text_encoders(config, device="cpu", dtype=torch.bfloat16)
        negative = encoders.templates.negative_prompt
        captions = [
            *(scene.caption(wording) for scene in ALL_SCENES for wording in range(len(WORDINGS))),
            "",
            negative,
        ]
        entries = {}
        for is_image in (False, True):
            content = "image" if is_image else "video"
            for start in range(0, len(captions), 32):
                part = captions[start : start + 32]
                for caption, encoded in zip(part, encoders.encode(part, content), strict=True):
                    entries[_key(caption, is_image)] = TextConditioning(
                        encoded.text_embeds.float(), encoded.pooled_embed
                    )
        return cls(entries, negative)

    def find(self, caption: str, is_image: bool) -> TextConditioning:
        """The encoded caption, with the template of images or of videos."""
        return self.entries[_key(caption, is_image)]

    def all_captions(self) -> list[TextConditioning]:
        """What describes a scene: neither the empty caption nor the negative prompt."""
        left_out = {_key(text, is_image) for text in ("", self.negative_prompt) for is_image in (False, True)}
        return [entry for key, entry in self.entries.items() if key not in left_out]

    def save(self, path: Path) -> None:
        stored = {key: (entry.text_embeds, entry.pooled_embed) for key, entry in self.entries.items()}
        torch.save({"entries": stored, "negative_prompt": self.negative_prompt}, path)

    @classmethod
    def load(cls, path: Path) -> Self:
        stored = torch.load(path, weights_only=True)
        entries = {key: TextConditioning(*pair) for key, pair in stored["entries"].items()}
        return cls(entries, stored["negative_prompt"])


def _key(caption: str, is_image: bool) -> str:
    return f"{'image' if is_image else 'video'}: {caption}"
