"""Training in-process on the small DiT and random caches."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch

from dataset.cache.files import LatentCacheMeta, TextCacheMeta, write_latent_cache, write_text_cache
from dataset.cache.names import text_cache_name, video_cache_name
from kandinsky5.model import assembly
from kandinsky5_train_network import main
from modules.tensor_files import read_tensors, write_tensors
from tests.tiny import tiny_dit

Clip = tuple[int, int, int, int]
CLIPS: tuple[Clip, ...] = ((2, 4, 4, 5), (2, 4, 4, 7), (2, 4, 4, 6), (3, 2, 8, 5), (3, 2, 8, 9))
"""(latent_frames, latent_height, latent_width, text tokens) of the clips of a small dataset."""
BLOCKS = {"num_text_blocks": 1, "num_visual_blocks": 1}
CURVE = Path(__file__).parent / "loss_curve.json"
"""Losses of the steps of `loss_curve`, as they were."""
SMALLER = ("--override_dit", json.dumps(BLOCKS))


def write_dit(folder: Path) -> Path:
    """A DiT of one block of each kind as a file, for the tiny tasks with `SMALLER`."""
    path = folder / "tiny.safetensors"
    write_tensors(path, {key: value.detach() for key, value in tiny_dit(**BLOCKS).state_dict().items()})
    return path


def write_dataset(
    folder: Path, clips: Sequence[Clip] = CLIPS, *, batch_size: int = 1, resolution: int = 32
) -> Path:
    """Caches with random tensors, and the dataset file for them; the clips themselves do not exist."""
    cache = folder / "cache"
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(5)
    for number, (frames, height, width, tokens) in enumerate(clips):
        name = f"clip{number}"
        meta = LatentCacheMeta(
            width=width * 8,
            height=height * 8,
            frame_count=4 * frames - 3,
            frame_start=0,
            crop=f"{width * 8}x{height * 8}",
            fps="all",
            dtype="float32",
            vae_tile="none",
            source_fingerprint="none",
            encoder_fingerprint="none",
        )
        write_latent_cache(
            cache / video_cache_name(name, 0, 4 * frames - 3, width * 8, height * 8),
            torch.randn(16, frames, height, width, generator=generator),
            torch.randn(16, 2, height, width, generator=generator),
            meta,
        )
        text_meta = TextCacheMeta(
            caption1=name,
            template="video",
            qwen_max_length=256,
            clip_max_length=77,
            encoder_fingerprint="none",
        )
        write_text_cache(
            cache / text_cache_name(name),
            torch.randn(tokens, 64, generator=generator),
            torch.randn(32, generator=generator),
            text_meta,
        )
    path = folder / "dataset.toml"
    path.write_text(
        f"[general]\nresolution = [{resolution}, {resolution}]\nenable_bucket = true\n\n[[datasets]]\n"
        f"video_directory = {json.dumps((folder / 'clips').as_posix())}\n"
        f"cache_directory = {json.dumps(cache.as_posix())}\n"
        f'caption_extension = ".txt"\ntarget_frames = [5, 9]\nbatch_size = {batch_size}\n',
        encoding="utf-8",
    )
    return path


def train(
    dit: Path, dataset: Path, output: Path, *extra: object, task: str = "k5-tiny-t2v"
) -> list[dict[str, Any]]:
    """Run the training script; returns the records of its metrics."""
    base = ("--task", task, "--dit", dit, "--dataset_config", dataset, "--output_dir", output)
    settings = (
        *("--output_name", "lora", "--network_dim", 4, "--network_alpha", 4, "--learning_rate", 1e-3),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 5.0, "--seed", 3),
        *("--max_data_loader_n_workers", 0, *SMALLER),
    )
    main([str(word) for word in (*base, *settings, *extra)])
    return metrics(output)


def write_word_while_loading(output: Path, word: str, patch: pytest.MonkeyPatch) -> None:
    """What a user writes into the control file of a run whose model loads."""
    plain = assembly.load_model

    def load_model(*given: Any, **named: Any) -> Any:
        (output / "lora.control").write_text(word, encoding="utf-8")
        return plain(*given, **named)

    patch.setattr(assembly, "load_model", load_model)


def exit_code(*arguments: Any, **named: str) -> int | str | None:
    """What a run of `train` that ends before its end says to the shell."""
    with pytest.raises(SystemExit) as caught:
        train(*arguments, **named)
    return caught.value.code


def metrics(output: Path, kind: str | None = None) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl, of one kind or all."""
    lines = (output / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    return [record for record in records if kind is None or record["kind"] == kind]


def lora_bytes(path: Path) -> dict[str, bytes]:
    """Tensor name -> its bytes."""
    tensors = read_tensors(path)[0]
    return {name: value.reshape(-1).view(torch.uint8).numpy().tobytes() for name, value in tensors.items()}


def loss_curve(dit: Path, dataset: Path, output: Path) -> list[float]:
    """The losses of 20 steps with all that draws: noise, timesteps, order, dropout."""
    words = ("--max_train_steps", 20, "--gradient_accumulation_steps", 2, "--network_dropout", 0.1)
    records = train(dit, dataset, output, *words, "--lr_scheduler", "cosine", "--lr_warmup_steps", 3)
    return [record["loss"] for record in records if record["kind"] == "step"]


def _write_curve() -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as name:
        folder = Path(name)
        losses = loss_curve(write_dit(folder), write_dataset(folder / "data"), folder / "out")
    CURVE.write_text(json.dumps({"losses": losses}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _write_curve()
