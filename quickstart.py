"""Sets up the project and runs the whole path on small random models: cache, train, generate.

    python3 quickstart.py          make .venv, install, teach small models a real clip, make videos
    python3 quickstart.py test     make .venv, install, run every check and test

Needs Python 3.11 or newer and nothing else; both commands may be run again.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
MEDIA = ROOT / "tests" / "media"
OLDEST_PYTHON = (3, 11)

TAUGHT = ("bunny_25fps_49f.mp4", "a grey rabbit stretches in front of its burrow on a green hill")
UNTAUGHT = ("coffee_pan_24fps_49f.mp4", "the camera pans right and moves in on a cup of coffee")
TRAIN_STEPS = 60
MARKER = ".k5_quickstart"

CACHE_LATENTS = "kandinsky5_cache_latents.py"
CACHE_TEXT = "kandinsky5_cache_text_encoder_outputs.py"
TRAIN = "kandinsky5_train_network.py"
GENERATE = "kandinsky5_generate_video.py"

CHECKS = (
    ("lint", ("-m", "ruff", "check", ".")),
    ("format", ("-m", "ruff", "format", "--check", ".")),
    ("types", ("-m", "pyright", "--pythonpath", str(PYTHON))),
    ("tests", ("-m", "pytest")),
)


def main(argv: Sequence[str] | None = None) -> int:
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        print(f"Python {wanted} or newer is needed, this is {sys.version.split()[0]}", file=sys.stderr)
        return 5
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", nargs="?", default="run", choices=["run", "test"], help="default: run")
    parser.add_argument(
        "--output", type=Path, default=ROOT / "quickstart_output", help="folder for models, caches and videos"
    )
    args = parser.parse_args(argv)
    try:
        install()
        return run_checks() if args.what == "test" else run_path(args.output.resolve())
    except subprocess.CalledProcessError as error:
        print(f"\nfailed (exit code {error.returncode}): {' '.join(map(str, error.cmd))}", file=sys.stderr)
        return error.returncode or 1


# Installation


def install() -> None:
    """Make .venv and install the pinned dependencies, unless this very state is installed already."""
    state = hashlib.sha256(sys.version.encode())
    for name in ("pyproject.toml", "constraints.txt"):
        state.update((ROOT / name).read_bytes())
    marker = VENV / "k5_installed"
    if marker.is_file() and marker.read_text(encoding="utf-8") == state.hexdigest():
        say(f"{VENV.name} is up to date")
        return
    if not PYTHON.is_file():
        say(f"making {VENV.name}")
        run(sys.executable, "-m", "venv", VENV)
    say("installing the dependencies (a few minutes the first time)")
    run(PYTHON, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_arguments())
    marker.write_text(state.hexdigest(), encoding="utf-8")


def pip_arguments() -> list[str]:
    """The exact versions that were tested, development tools included."""
    return ["--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[dev]"]


# The checks


def run_checks() -> int:
    """Every check, to the end even when one fails; 0 only if all pass."""
    failed = []
    for name, arguments in CHECKS:
        say(name)
        if subprocess.run([PYTHON, *arguments], cwd=ROOT, check=False).returncode:
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


# The whole path


@dataclass(frozen=True)
class Stage:
    """One finished step of the path."""

    name: str
    result: Path
    seconds: float


def run_path(output: Path) -> int:
    """Models, caches, LoRA, videos; ends with a table."""
    start = time.monotonic()
    if (output / MARKER).is_file():
        say(f"removing the results of an earlier run in {output}")
        shutil.rmtree(output)
    elif output.is_dir() and any(output.iterdir()):
        print(f"{output} holds other files: choose an empty folder with --output", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("made by quickstart.py, which may delete this folder\n", encoding="utf-8")
    taught, both = write_datasets(output)
    models, results = output / "models", output / "results"
    encoders = (
        "--text_encoder_qwen",
        models / "text_encoder",
        "--text_encoder_clip",
        models / "text_encoder2",
    )
    vae = ("--vae", models / "vae")
    dit = ("--task", "k5-tiny-t2v", "--dit", models / "model" / "tiny.safetensors")
    lora = results / "rabbit.safetensors"
    stages = [
        stage("small random models", models, "-m", "kandinsky5.tiny_models", models),
        stage("latents", output / "cache", CACHE_LATENTS, "--dataset_config", both, *vae),
        stage("captions", output / "cache", CACHE_TEXT, "--dataset_config", both, *encoders),
        stage(
            f"LoRA, {TRAIN_STEPS} steps",
            lora,
            *("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "1"),
            *(
                "--num_processes",
                "1",
                "--num_machines",
                "1",
                "--mixed_precision",
                "bf16",
                "--dynamo_backend",
                "no",
            ),
            *(TRAIN, "--mixed_precision", "bf16", *dit, "--dataset_config", taught),
            *("--validation_dataset_config", both, "--max_train_steps", TRAIN_STEPS, "--seed", 1),
            *(
                "--learning_rate",
                "2e-3",
                "--optimizer_type",
                "AdamW",
                "--network_module",
                "networks.lora_kandinsky",
            ),
            *("--network_dim", 16, "--network_alpha", 16, "--gradient_checkpointing", "--sdpa"),
            *(
                "--timestep_sampling",
                "shift",
                "--discrete_flow_shift",
                "5.0",
                "--max_data_loader_n_workers",
                1,
            ),
            *("--output_dir", results, "--output_name", lora.stem),
        ),
    ]
    for name, extra in (("without", ()), ("with", ("--lora_weight", lora))):
        video = results / f"{name}_lora.mp4"
        size = ("--width", 128, "--height", 128, "--frames", 17, "--seed", 7, "--prompt", TAUGHT[1])
        generate = (GENERATE, *dit, *vae, *encoders, *size, "--output", video, *extra)
        stages.append(stage(f"video {name} the LoRA", video, *generate))
    print_summary(stages, results / "metrics.jsonl", time.monotonic() - start)
    return 0


def write_datasets(output: Path) -> tuple[Path, Path]:
    """Copy two clips with captions; one dataset file with the taught clip and one with both."""
    sections = []
    for name, (clip, caption) in (("taught", TAUGHT), ("untaught", UNTAUGHT)):
        folder = output / "clips" / name
        folder.mkdir(parents=True)
        shutil.copy(MEDIA / clip, folder)
        (folder / clip).with_suffix(".txt").write_text(caption, encoding="utf-8")
        sections.append(
            "[[datasets]]\n"
            f"video_directory = {json.dumps(folder.as_posix())}\n"
            f"cache_directory = {json.dumps((output / 'cache' / name).as_posix())}\n"
            "target_frames = [1, 17]\n"
            'frame_extraction = "uniform"\n'
            "frame_sample = 3\n"
            f"source_fps = {25.0 if name == 'taught' else 24.0}\n"
        )
    general = '[general]\nresolution = [128, 128]\ncaption_extension = ".txt"\nenable_bucket = true\n\n'
    taught, both = output / "taught.toml", output / "taught_and_untaught.toml"
    taught.write_text(general + sections[0], encoding="utf-8")
    both.write_text(general + "\n".join(sections), encoding="utf-8")
    return taught, both


def stage(name: str, result: Path, *arguments: object) -> Stage:
    """Run one script of the project and time it."""
    say(name)
    start = time.monotonic()
    run(PYTHON, *arguments)
    if not result.exists():
        raise FileNotFoundError(f"the stage '{name}' should have made {result}")
    return Stage(name, result, time.monotonic() - start)


def print_summary(stages: Sequence[Stage], metrics: Path, seconds: float) -> None:
    """What was made and whether the LoRA learnt the clip it was shown."""
    say("done")
    width = max(len(item.name) for item in stages)
    for item in stages:
        print(f"{item.name.ljust(width)}  {item.seconds:6.1f} s  {item.result}")
    print(f"{'in total'.ljust(width)}  {seconds:6.1f} s")
    records = [json.loads(line) for line in metrics.read_text(encoding="utf-8").splitlines()]
    last = [record for record in records if record["kind"] == "validation"][-1]
    print("\nloss on fixed noise       LoRA off   LoRA on    change")
    for row, name in zip(last["datasets"], ("taught clip", "untaught clip"), strict=True):
        change = row["loss"] / row["base_loss"] - 1
        print(f"{name.ljust(22)}  {row['base_loss']:9.5f} {row['loss']:9.5f}  {change:+8.2%}")
    print("\nThe small models are random: the videos are noise. The path they took is the real one.")


def run(*command: object) -> None:
    """Run a command in the project's folder, showing it first."""
    words = [str(word) for word in command]
    print("  $", shlex.join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
