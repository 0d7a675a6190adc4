"""Mistakes of new users, and what the four scripts answer: `python tests/mistakes.py` prints every message.

Each runs in a folder of small random models, clips and caches (see `prepare`). A message says what is wrong,
where, and what to type; `tests/test_mistakes.py` checks the parts that say so.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import shutil
import sys
import tempfile
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import kandinsky5_cache_latents
import kandinsky5_cache_text_encoder_outputs
import kandinsky5_generate_video
import kandinsky5_train_network
from tests.kandinsky5.training.training_runs import write_dataset

SCRIPTS = {
    "latents": kandinsky5_cache_latents.main,
    "text": kandinsky5_cache_text_encoder_outputs.main,
    "train": kandinsky5_train_network.main,
    "generate": kandinsky5_generate_video.main,
}
MEDIA = Path(__file__).parent / "media"
LATENTS = "--vae vae --device cpu"
TEXT = "--text_encoder_qwen text_encoder --text_encoder_clip text_encoder2 --device cpu"
TRAIN = (
    "--task k5-tiny-t2v --dit model/tiny.safetensors --output_dir out --output_name my --max_train_steps 2"
)
CACHED = f"{TRAIN} --dataset_config cached/dataset.toml --learning_rate 1e-4"
GENERATE = (
    "--task k5-tiny-t2v --dit model/tiny.safetensors --vae vae --text_encoder_qwen text_encoder "
    "--text_encoder_clip text_encoder2 --width 64 --height 64 --frames 5 --steps 1 --device cpu"
)
DATASET = """[general]
resolution = [64, 64]
caption_extension = ".txt"

[[datasets]]
video_directory = "clips"
cache_directory = "cache"
target_frames = [5]
"""


@dataclass(frozen=True)
class Mistake:
    """A command with a mistake, and parts of what must be answered."""

    name: str
    script: str
    words: str
    expected: tuple[str, ...]
    code: int = 2
    files: tuple[tuple[str, str], ...] = ()
    """Texts that are written before, by name."""


def dataset(name: str, script: str, old: str, new: str, *expected: str, code: int = 2) -> Mistake:
    """A mistake in the dataset file."""
    text = DATASET.replace(old, new)
    assert text != DATASET, name
    words = {"latents": LATENTS, "text": TEXT}[script]
    return Mistake(name, script, f"--dataset_config d.toml {words}", expected, code, (("d.toml", text),))


MISTAKES = (
    # The dataset file.
    Mistake(
        "dataset file misspelt",
        "latents",
        f"--dataset_config datset.toml {LATENTS}",
        ("--dataset_config", "datset.toml", "dataset.toml"),
    ),
    dataset(
        "[[dataset]] for [[datasets]]", "latents", "[[datasets]]", "[[dataset]]", "[[datasets]]", "line 5"
    ),
    dataset(
        "a Windows path in double quotes", "latents", '"clips"', '"C:\\Users\\me\\clips"', "single quotes"
    ),
    dataset("resolution as text", "latents", "[64, 64]", '"64x64"', "resolution", "[width, height]"),
    dataset("a key misspelt", "latents", "target_frames", "target_frame", "did you mean target_frames"),
    dataset("frames that are no 4k + 1", "latents", "[5]", "[16]", "target_frames", code=0),
    dataset("folder misspelt", "latents", '"clips"', '"clip"', "clip", "clips"),
    dataset("no dataset at all", "latents", DATASET[DATASET.index("[[") :], "", "[[datasets]]"),
    dataset("images named as videos", "latents", '"clips"', '"photos"', "image_directory", code=3),
    # Caching.
    Mistake(
        "VAE misspelt",
        "latents",
        "--dataset_config dataset.toml --vae vaes --device cpu",
        ("--vae", "vaes", "vae"),
    ),
    Mistake(
        "the DiT as VAE",
        "latents",
        "--dataset_config dataset.toml --vae model/tiny.safetensors --device cpu",
        ("DiT", "VAE"),
        4,
    ),
    Mistake(
        "CLIP as Qwen",
        "text",
        "--dataset_config dataset.toml --text_encoder_qwen text_encoder2 --text_encoder_clip text_encoder",
        ("--text_encoder_qwen", "CLIP"),
        4,
    ),
    Mistake(
        "no encoders",
        "text",
        "--dataset_config dataset.toml",
        ("--text_encoder_qwen", "--text_encoder_clip", "required"),
    ),
    # Training.
    Mistake(
        "DiT misspelt",
        "train",
        f"{CACHED} --dit model/tyni.safetensors",
        ("--dit", "tyni.safetensors", "tiny.safetensors"),
        4,
    ),
    Mistake(
        "nothing cached",
        "train",
        f"{TRAIN} --dataset_config dataset.toml",
        ("kandinsky5_cache_latents.py",),
        3,
    ),
    Mistake(
        "a task of another size", "train", f"{CACHED} --task k5-lite-t2v-5s-sd", ("k5-tiny-t2v", "--task"), 4
    ),
    Mistake("a task misspelt", "train", f"{CACHED} --task k5-pro-t2v-5s", ("k5-pro-t2v-5s-sd",)),
    Mistake("an option misspelt", "train", f"{CACHED} --lerning_rate 1", ("did you mean --learning_rate",)),
    Mistake(
        "Prodigy by its short name", "train", f"{CACHED} --optimizer_type Prodigy", ("prodigyopt.Prodigy",)
    ),
    Mistake("an optimizer misspelt", "train", f"{CACHED} --optimizer_type AdmW", ("AdamW",)),
    Mistake(
        "a comma after an argument",
        "train",
        f"{CACHED} --optimizer_args weight_decay=0.001,",
        ("--optimizer_args", "weight_decay"),
    ),
    Mistake("betas as a dictionary", "train", f"{CACHED} --optimizer_args betas={{'a':1}}", ("betas",)),
    Mistake(
        "a value that is no Python",
        "train",
        f"{CACHED} --optimizer_args weight_decay={{[]:1}}",
        ("weight_decay",),
    ),
    Mistake(
        "REX without a curve",
        "train",
        f"{CACHED} --lr_scheduler rex --lr_scheduler_args rex_alpha=0 rex_beta=0",
        ("rex_alpha", "rex_beta"),
    ),
    Mistake(
        "a negative step in step_rules",
        "train",
        f"{CACHED} --lr_scheduler piecewise_constant --lr_scheduler_args step_rules=1:-5,0.1",
        ("step_rules",),
    ),
    Mistake(
        "a warm-up longer than the run",
        "train",
        f"{CACHED} --lr_scheduler constant_with_warmup --lr_warmup_steps 100",
        ("--lr_warmup_steps", "100"),
        0,
    ),
    Mistake("a learning rate of 1", "train", f"{CACHED} --learning_rate 1.0", ("--learning_rate", "1e-4"), 0),
    Mistake("half precision", "train", f"{CACHED} --mixed_precision fp16", ("fp16", "bf16")),
    Mistake(
        "more blocks than there are",
        "train",
        f"{CACHED} --gradient_checkpointing --blocks_to_swap 99",
        ("--blocks_to_swap", "99"),
    ),
    Mistake(
        "swap without checkpointing", "train", f"{CACHED} --blocks_to_swap 1", ("--gradient_checkpointing",)
    ),
    Mistake(
        "another program's network module",
        "train",
        f"{CACHED} --network_module networks.lora_wan",
        ("networks.lora_kandinsky",),
    ),
    Mistake("a rank of 0", "train", f"{CACHED} --network_dim 0", ("--network_dim",)),
    Mistake(
        "prompts without the VAE",
        "train",
        f"{CACHED} --sample_prompts p.txt --sample_at_first",
        ("--vae", "--text_encoder_qwen", "--text_encoder_clip"),
        4,
        files=(("p.txt", "a cat --w 64\n"),),
    ),
    Mistake("a folder that is a file", "train", f"{CACHED} --output_dir dataset.toml", ("--output_dir",), 5),
    Mistake(
        "a state that is not there", "train", f"{CACHED} --resume out/my-state", ("--resume", "my-state"), 4
    ),
    Mistake(
        "a configuration with a mistake",
        "train",
        "--config_file run.toml",
        ("run.toml", "line 2"),
        files=(("run.toml", 'task = "k5-tiny-t2v"\ndit = model/tiny\n'),),
    ),
    # Generation.
    Mistake("no prompt", "generate", f"{GENERATE} --output a.mp4", ("--prompt",)),
    Mistake(
        "the DiT as LoRA",
        "generate",
        f"{GENERATE} --prompt cat --output a.mp4 --lora_weight model/tiny.safetensors",
        ("DiT",),
        4,
    ),
    Mistake(
        "frames that are no 4k + 1, in generation",
        "generate",
        f"{GENERATE} --prompt cat --output a.mp4 --frames 16",
        ("16 frames", "17"),
        0,
    ),
    Mistake(
        "a width that is no multiple",
        "generate",
        f"{GENERATE} --prompt cat --output a.mp4 --width 100",
        ("--width", "96"),
    ),
    Mistake(
        "an image for a text task",
        "generate",
        f"{GENERATE} --prompt cat --output a.mp4 --image photos/coffee.jpg",
        ("--image", "i2v"),
    ),
    Mistake(
        "no image for an image task",
        "generate",
        f"{GENERATE} --task k5-tiny-i2v --prompt cat --output a.mp4",
        ("--image",),
    ),
    Mistake(
        "a prompt file misspelt",
        "generate",
        f"{GENERATE} --from_file promts.txt --output a",
        ("--from_file", "prompts.txt"),
    ),
    Mistake(
        "an output that is there",
        "generate",
        f"{GENERATE} --prompt cat --output there.mp4",
        ("there.mp4", "--overwrite"),
        0,
    ),
)


def prepare(folder: Path, models: Path) -> None:
    """Copy models, two clips with captions, photos, and caches of other clips into `folder`."""
    shutil.copytree(models, folder, dirs_exist_ok=True)
    for name, paths in (("clips", MEDIA.glob("*.mp4")), ("photos", MEDIA.glob("*.jpg"))):
        (folder / name).mkdir()
        for path in paths:
            shutil.copy(path, folder / name)
            (folder / name / path.with_suffix(".txt").name).write_text("a caption", encoding="utf-8")
    write_dataset(folder / "cached")
    (folder / "dataset.toml").write_text(DATASET, encoding="utf-8")
    (folder / "prompts.txt").write_text("a cat\n", encoding="utf-8")
    (folder / "there.mp4").write_bytes(b"x")


@contextlib.contextmanager
def inside(folder: Path) -> Iterator[None]:
    """Within the block `folder` is the working directory."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def captured() -> Iterator[io.StringIO]:
    """What is printed and logged within the block."""
    text = io.StringIO()
    handler, logger = logging.StreamHandler(text), logging.getLogger("k5")
    logger.addHandler(handler)
    try:
        with contextlib.redirect_stderr(text), contextlib.redirect_stdout(text):
            yield text
    finally:
        logger.removeHandler(handler)


def run(mistake: Mistake) -> tuple[int, str]:
    """Exit code and output of a command, in the working directory."""
    shutil.rmtree("out", ignore_errors=True)
    for name, text in mistake.files:
        Path(name).write_text(text, encoding="utf-8")
    with captured() as output:
        try:
            SCRIPTS[mistake.script](mistake.words.split())
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
        except Exception:  # the fault that this table is to find
            traceback.print_exc()
            code = 1
    return code, output.getvalue()


def main() -> None:
    """Print every command and its answer."""
    from kandinsky5.tiny_models import build_tiny_models

    with tempfile.TemporaryDirectory() as name:
        build_tiny_models(Path(name) / "models")
        prepare(Path(name) / "work", Path(name) / "models")
        with inside(Path(name) / "work"):
            for number, mistake in enumerate(MISTAKES, 1):
                code, output = run(mistake)
                missing = [part for part in mistake.expected if part not in output]
                print(f"{number}. {mistake.name}: {mistake.script} {mistake.words}\n{output.rstrip()}")
                unmet = f" MISSING {missing}" if missing or code != mistake.code else ""
                print(f"[exit code {code}]{unmet}\n")


if __name__ == "__main__":
    main()
