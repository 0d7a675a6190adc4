"""Draws validation_example.png, sample_grid_example.png and lora_effect_example.txt of docs/ from a real run.

python tests/training_pictures.py [FOLDER]

The small random models learn clips and photos of tests/media with the scripts themselves: a part of the files
is held out, and one prompt is sampled on the way. Such models have nothing to show in samples but change:
the point is what a run writes.
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # the project's packages, when run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from kandinsky5.tiny_models import build_tiny_models
from kandinsky5_cache_latents import main as cache_latents
from kandinsky5_cache_text_encoder_outputs import main as cache_text
from kandinsky5_train_network import main as train

ROOT = Path(__file__).resolve().parent.parent
NAME = "example"
CAPTIONS = {
    "bunny_25fps_49f.mp4": "a rabbit stretches in front of its burrow",
    "coffee_pan_24fps_49f.mp4": "a cup of coffee on a wooden table",
    "chelsea.jpg": "a cat looks into the camera",
    "coffee.jpg": "a cup of coffee and a spoon",
    "rocket.jpg": "a rocket on its launch pad",
}
PROMPT = "a rabbit stretches --w 128 --h 96 --f 9 --s 8 --g 1 --d 1"


def write_dataset(folder: Path) -> Path:
    """Media with captions, and the dataset file."""
    for name, caption in CAPTIONS.items():
        place = folder / ("videos" if name.endswith(".mp4") else "photos") / name
        place.parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / "tests" / "media" / name, place)
        place.with_suffix(".txt").write_text(caption, encoding="utf-8")
    path = folder / "dataset.toml"
    path.write_text(
        '[general]\nresolution = [128, 96]\nenable_bucket = true\ncaption_extension = ".txt"\n\n'
        f"[[datasets]]\nvideo_directory = '{folder / 'videos'}'\ncache_directory = '{folder / 'cache0'}'\n"
        'target_frames = [9]\nframe_extraction = "uniform"\nframe_sample = 4\n\n'
        f"[[datasets]]\nimage_directory = '{folder / 'photos'}'\ncache_directory = '{folder / 'cache1'}'\n",
        encoding="utf-8",
    )
    return path


def run(folder: Path) -> Path:
    """Cache and train; returns the output folder."""
    models, output = folder / "models", folder / "output"
    build_tiny_models(models)
    data = ("--dataset_config", write_dataset(folder))
    encoders = (
        "--text_encoder_qwen",
        models / "text_encoder",
        "--text_encoder_clip",
        models / "text_encoder2",
    )
    vae = ("--vae", models / "vae")
    cache_latents([str(word) for word in (*data, *vae)])
    cache_text([str(word) for word in (*data, *encoders)])
    prompts = folder / "prompts.txt"
    prompts.write_text(PROMPT, encoding="utf-8")
    words = (
        *(*data, *vae, *encoders, "--task", "k5-tiny-t2v", "--dit", models / "model" / "tiny.safetensors"),
        *("--output_dir", output, "--output_name", NAME, "--seed", 1, "--max_data_loader_n_workers", 0),
        *("--network_dim", 8, "--network_alpha", 8, "--learning_rate", 1e-3),
        *("--lr_scheduler", "cosine", "--lr_warmup_steps", "10%", "--max_train_steps", 160),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 5.0),
        *("--validation_split", 0.4, "--validate_every_n_steps", 8),
        *("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", 40),
    )
    train([str(word) for word in words])
    return output


def draw(folder: Path) -> None:
    """Make the run and put its pictures and its report into `folder`."""
    torch.set_num_threads(1)  # sums depend on the number of threads
    with tempfile.TemporaryDirectory() as scratch:
        output = run(Path(scratch))
        for source, target in (
            (output / f"{NAME}_validation.png", "validation_example.png"),
            (output / "sample" / f"{NAME}_grid_00.png", "sample_grid_example.png"),
        ):
            with Image.open(source) as image:
                image.convert("RGB").quantize(64).save(folder / target, optimize=True)
        shutil.copy(output / f"{NAME}_effect.txt", folder / "lora_effect_example.txt")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Draw the pictures of a training run of the small models.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    draw(parser.parse_args().folder)
