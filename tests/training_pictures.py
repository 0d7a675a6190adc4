"""Draws the pictures of docs/ that show what a run writes, from a real run on the small base.

python tests/training_pictures.py [FOLDER] [--keep OUTPUT]

A LoRA of a star, as the quick start teaches it, with a fifth of the clips held out and two prompts sampled on
the way: validation_example.png, sample_grid_example.png, lora_effect_example.txt and, where Chromium is
installed, report_example.png.
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

if __name__ == "__main__":  # the project's packages, when run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from PIL import Image

from kandinsky5.small_world.clips import main as draw_clips
from kandinsky5.tasks import SMALL_BASE_FOLDER
from kandinsky5_cache_latents import main as cache_latents
from kandinsky5_cache_text_encoder_outputs import main as cache_text
from kandinsky5_train_network import main as train
from quickstart import CLIPS, KNOWN, KNOWN_CLIPS, TASK, TAUGHT, dataset_text

ROOT = Path(__file__).resolve().parent.parent
NAME = TAUGHT
STEPS = 400
PROMPTS = "a red star moves left --d 0\na blue circle moves left --d 6\n"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")


def run(folder: Path, device_options: tuple[object, ...] = ()) -> Path:
    """Draw clips, cache and train; returns the output folder."""
    clips, known, output = folder / "clips" / TAUGHT, folder / "clips" / "known", folder / "output"
    _call(draw_clips, clips, "--shape", TAUGHT, "--clips", CLIPS)
    _call(draw_clips, known, "--shape", *KNOWN, "--clips", KNOWN_CLIPS)
    dataset, prompts = folder / "dataset.toml", folder / "prompts.txt"
    dataset.write_text(dataset_text((clips, known), folder / "cache"), encoding="utf-8")
    prompts.write_text(PROMPTS, encoding="utf-8")
    data, vae = ("--dataset_config", dataset), ("--vae", SMALL_BASE_FOLDER / "vae")
    encoders = (
        *("--text_encoder_qwen", SMALL_BASE_FOLDER / "text_encoder"),
        *("--text_encoder_clip", SMALL_BASE_FOLDER / "text_encoder2"),
    )
    _call(cache_latents, *data, *vae)
    _call(cache_text, *data, *encoders)
    _call(
        *(train, *data, "--task", TASK, "--output_dir", output, "--output_name", NAME, "--seed", 1),
        *("--network_dim", 16, "--network_alpha", 16, "--learning_rate", 2e-3, "--max_train_steps", STEPS),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", 3.0, "--max_data_loader_n_workers", 1),
        *("--lr_scheduler", "constant_with_warmup", "--lr_warmup_steps", "5%"),
        *("--validation_split", 0.2, "--validate_every_n_steps", STEPS // 20),
        *("--sample_prompts", prompts, "--sample_at_first", "--sample_every_n_steps", STEPS // 4),
        *("--save_every_n_steps", STEPS // 4, "--save_state_on_train_end", *device_options),
    )
    return output


def _call(main: object, *words: object) -> None:
    main([str(word) for word in words])  # type: ignore[operator]


def draw(folder: Path, output: Path) -> None:
    """Put the pictures and the report of a run into `folder`."""
    for source, target in (
        (output / f"{NAME}_validation.png", "validation_example.png"),
        (output / "sample" / f"{NAME}_grid_00.png", "sample_grid_example.png"),
    ):
        _shrink(source, folder / target)
    shutil.copy(output / f"{NAME}_effect.txt", folder / "lora_effect_example.txt")
    photograph(output / f"{NAME}_report.html", folder / "report_example.png")


def photograph(page: Path, target: Path) -> None:
    """Show a page in a browser without a window and keep the picture; needs Chromium."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        print(f"no Chromium: {target.name} is not drawn", file=sys.stderr)
        return
    with tempfile.TemporaryDirectory() as scratch:
        shot = Path(scratch) / "page.png"
        subprocess.run(
            [
                *(browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"),
                *(
                    f"--user-data-dir={scratch}/profile",
                    "--window-size=1280,3400",
                    "--virtual-time-budget=8000",
                ),
                *(f"--screenshot={shot}", page.resolve().as_uri()),
            ],
            check=True,
            timeout=120,
            capture_output=True,
        )
        _shrink(shot, target)


def _shrink(source: Path, target: Path) -> None:
    with Image.open(source) as image:
        image.convert("RGB").quantize(256).save(target, optimize=True)


def main() -> None:
    """Make the run, or take one that is kept, and draw."""
    parser = argparse.ArgumentParser(description="Draw the pictures of a training run on the small base.")
    parser.add_argument("folder", type=Path, nargs="?", default=ROOT / "docs")
    parser.add_argument("--keep", type=Path, help="folder of the run; one that is there is drawn again")
    options = parser.parse_args()
    torch.set_num_threads(1)  # sums depend on the number of threads
    with tempfile.TemporaryDirectory() as scratch:
        place = options.keep or Path(scratch)
        output = place / "output"
        draw(options.folder, output if output.is_dir() else run(place))


if __name__ == "__main__":
    main()
