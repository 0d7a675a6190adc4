"""Trains the small base from scratch: `python -m kandinsky5.small_world.train OUTPUT`.

Stages: VAE on pictures, VAE on clips, latents and captions into caches, DiT. OUTPUT gets the models in the
file formats of the published ones; OUTPUT/training holds checkpoints, caches and log.jsonl. A stopped run
resumes when it is started again; finished stages are not repeated.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kandinsky5.model.dit import is_float32_island
from kandinsky5.small_world.caches import ClipCache, TextCache
from kandinsky5.small_world.dit_training import DIT, train_dit
from kandinsky5.small_world.vae_training import CLIPS, PICTURES, fold_latent_statistics, train_vae
from kandinsky5.small_world.world import BASE_SCENES
from kandinsky5.tasks import get_task
from kandinsky5.tiny_models import build_clip, build_text_encoder, write_vae_folder
from kandinsky5.vae.video_vae import load_vae
from modules.command_line import Parser, user_errors
from modules.logs import get_logger
from modules.options import positive_int
from modules.tensor_files import write_tensors

log = get_logger(__name__)

TASK = "k5-small-t2v"
CLIPS_PER_SCENE = 8


def train_small_base(out: Path, options: argparse.Namespace) -> None:
    """Run or resume all stages, and write the models."""
    work = out / "training"
    work.mkdir(parents=True, exist_ok=True)
    if not (out / "vae" / "config.json").is_file():
        vae = train_vae(
            work,
            replace(PICTURES, steps=options.vae_picture_steps),
            replace(CLIPS, steps=options.vae_clip_steps),
        )
        fold_latent_statistics(vae)
        write_vae_folder(out / "vae", vae, dtype=torch.float16)
    _write_caches(out, work, options.clips_per_scene)
    clips, texts = ClipCache.load(work / "latents.pt"), TextCache.load(work / "text.pt")
    task = get_task(TASK)
    dit = train_dit(work, task, clips, texts, replace(DIT, steps=options.dit_steps))
    path = out / "model" / task.checkpoint
    write_tensors(path, dit_file_tensors(dit.state_dict()))


def _write_caches(out: Path, work: Path, clips_per_scene: int) -> None:
    """What the DiT is trained on, unless it is there."""
    texts, clips = work / "text.pt", work / "latents.pt"
    if not texts.is_file():
        log.info("text encoders and captions")
        build_text_encoder(out / "text_encoder")
        build_clip(out / "text_encoder2")
        TextCache.make(out / "text_encoder", out / "text_encoder2").save(texts)
    if not clips.is_file():
        vae = load_vae(out / "vae", dtype=torch.float32, device="cpu")
        generator = torch.Generator().manual_seed(1)
        ClipCache.make(vae, BASE_SCENES, clips_per_scene, generator).save(clips)


def dit_file_tensors(state: dict[str, Any]) -> dict[str, Tensor]:
    """The dtypes of the published files: float32 where the DiT computes in float32, else bfloat16."""
    return {
        name: tensor.to(torch.float32 if is_float32_island(name) else torch.bfloat16).contiguous()
        for name, tensor in state.items()
    }


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        options = _parse(argv)
        torch.set_num_threads(options.threads)
        train_small_base(options.out, options)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.small_world.train",
        "Train the small base from scratch; a stopped run resumes when started again.",
    )
    parser.add_argument("out", type=Path, help="folder for model/, vae/, text encoders and training/")
    steps = {"vae_picture_steps": PICTURES, "vae_clip_steps": CLIPS, "dit_steps": DIT}
    for name, config in steps.items():
        parser.add_argument(
            f"--{name}", type=positive_int, default=config.steps, help=f"length of the stage {config.name}"
        )
    parser.add_argument(
        "--clips_per_scene", type=positive_int, default=CLIPS_PER_SCENE, help="clips the DiT sees per scene"
    )
    parser.add_argument("--threads", type=positive_int, default=2, help="CPU threads")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
