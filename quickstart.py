"""Sets up the project and runs the whole pipeline on the small base model: cache, train, generate, check.

    python3 quickstart.py          create .venv, install, train a LoRA of a star, generate videos and a web
    page python3 quickstart.py test     create .venv, install, run every check and test

Requires only Python 3.11 or newer; both commands can be run again.
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
OLDEST_PYTHON = (3, 11)

BASE = ROOT / "kandinsky5" / "small_world" / "base"
TASK = "k5-small-t2v"
TAUGHT = "star"
CLIPS = 12
KNOWN = ("circle", "square", "triangle")
KNOWN_CLIPS = 6
"""Shapes trained together with the new one, so that the LoRA does not turn every shape into it."""
TRAIN_STEPS = 400
PROMPTS = (
    "a red star moves left",
    "a blue star moves right",
    "a green star grows",
    "a yellow star moves up",
    "a purple star stands still",
    "a cyan star moves down",
    "a blue circle moves left",
    "a yellow square moves up",
    "a green triangle grows",
)
"""Six prompts with the new shape, most of them in colours and motions that its clips do not have, and three
with shapes that the base model already knows."""
MARKER = ".k5_quickstart"

CACHE_LATENTS = "kandinsky5_cache_latents.py"
CACHE_TEXT = "kandinsky5_cache_text_encoder_outputs.py"
TRAIN = "kandinsky5_train_network.py"
GENERATE = "kandinsky5_generate_video.py"

CHECKS = (
    ("lint", ("-m", "ruff", "check", ".")),
    ("format", ("-m", "ruff", "format", "--check", ".")),
    ("types", ("-m", "pyright", "--pythonpath", str(PYTHON))),
    ("tests", ("-m", "pytest", "-n", "2", "--dist", "worksteal")),
)


def main(argv: Sequence[str] | None = None) -> int:
    if sys.version_info < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        print(f"Python {wanted} or newer is required, this is {sys.version.split()[0]}", file=sys.stderr)
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
    """Create .venv and install the pinned dependencies, unless exactly these are already installed."""
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
    """Arguments of pip for the tested versions and the development tools."""
    return ["--constraint", str(ROOT / "constraints.txt"), "--editable", f"{ROOT}[dev]"]


# The checks


def run_checks() -> int:
    """Run all checks, also after one has failed; returns 0 only if all pass."""
    failed = []
    # Idle OpenMP threads that spin make the tests several times slower beside other work.
    environment = {"OMP_WAIT_POLICY": "passive", **os.environ}
    for name, arguments in CHECKS:
        say(name)
        if subprocess.run([PYTHON, *arguments], cwd=ROOT, env=environment, check=False).returncode:
            failed.append(name)
    if failed:
        say(f"failed: {', '.join(failed)}")
    return 1 if failed else 0


# The whole path


@dataclass(frozen=True)
class Stage:
    """One completed stage of the pipeline."""

    name: str
    result: Path
    seconds: float


def run_path(output: Path) -> int:
    """Make clips, caches, a LoRA, videos without and with it, and a web page; print a table at the end."""
    start = time.monotonic()
    if (output / MARKER).is_file():
        say(f"removing the results of an earlier run in {output}")
        shutil.rmtree(output)
    elif output.is_dir() and any(output.iterdir()):
        print(f"{output} holds other files: choose an empty folder with --output", file=sys.stderr)
        return 2
    output.mkdir(parents=True, exist_ok=True)
    (output / MARKER).write_text("created by quickstart.py, which may delete this folder\n", encoding="utf-8")
    clips, known = output / "clips" / TAUGHT, output / "clips" / "known"
    dataset, prompts = output / "dataset.toml", output / "prompts.txt"
    dataset.write_text(dataset_text((clips, known), output / "cache"), encoding="utf-8")
    lines = (f"{prompt} --d {seed}\n" for seed, prompt in enumerate(PROMPTS))
    prompts.write_text("".join(lines), encoding="utf-8")
    encoders = (
        "--text_encoder_qwen",
        BASE / "text_encoder",
        "--text_encoder_clip",
        BASE / "text_encoder2",
    )
    lora, page = output / f"{TAUGHT}.safetensors", output / "page"
    draw = ("-m", "kandinsky5.small_world.clips")
    stages = [
        stage(f"{CLIPS} clips of a {TAUGHT}", clips, *draw, clips, "--shape", TAUGHT, "--clips", CLIPS),
        stage(
            f"{KNOWN_CLIPS} of known shapes", known, *draw, known, "--shape", *KNOWN, "--clips", KNOWN_CLIPS
        ),
        stage("latents", output / "cache", CACHE_LATENTS, "--dataset_config", dataset, "--vae", BASE / "vae"),
        stage("captions", output / "cache", CACHE_TEXT, "--dataset_config", dataset, *encoders),
        stage(f"LoRA, {TRAIN_STEPS} steps", lora, *train_command(dataset, lora)),
    ]
    for name, extra in (("without", ()), ("with", ("--lora_weight", lora))):
        folder = output / name
        generate = (GENERATE, "--task", TASK, "--from_file", prompts, "--output", folder, *extra)
        stages.append(stage(f"videos {name} the LoRA", folder, *generate))
    compare = ("--taught", clips, "--without", output / "without", "--with", output / "with")
    stages.append(stage("contact sheet and page", page, "-m", "kandinsky5.small_world.page", page, *compare))
    print_summary(stages, time.monotonic() - start)
    say("how many videos show what their prompt says")
    run(PYTHON, "-m", "kandinsky5.small_world.score", output / "without", output / "with")
    say(f"open {page / 'index.html'}")
    return 0


def dataset_text(folders: Sequence[Path], cache: Path) -> str:
    """Text of a dataset file that uses whole clips of some folders."""
    general = "[general]\nresolution = [64, 64]\nbatch_size = 4\nenable_bucket = true\n"
    sections = (
        "\n[[datasets]]\n"
        f"video_directory = {json.dumps(folder.as_posix())}\n"
        f"cache_directory = {json.dumps((cache / folder.name).as_posix())}\n"
        'target_frames = [17]\nframe_extraction = "head"\ncaption_extension = ".txt"\n'
        for folder in folders
    )
    return general + "".join(sections)


def train_command(dataset: Path, lora: Path) -> tuple[object, ...]:
    """The training command with settings for a model of this size."""
    return (
        *("-m", "accelerate.commands.launch", "--num_cpu_threads_per_process", "2", "--num_processes", "1"),
        *("--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"),
        *(TRAIN, "--task", TASK, "--mixed_precision", "no", "--dataset_config", dataset, "--sdpa"),
        *("--network_module", "networks.lora_kandinsky", "--network_dim", 16, "--network_alpha", 16),
        *("--learning_rate", "2e-3", "--optimizer_type", "AdamW", "--max_train_steps", TRAIN_STEPS),
        *("--timestep_sampling", "shift", "--discrete_flow_shift", "3.0", "--seed", 1),
        *("--max_data_loader_n_workers", 1, "--output_dir", lora.parent, "--output_name", lora.stem),
    )


def stage(name: str, result: Path, *arguments: object) -> Stage:
    """Run one script of the project and time it."""
    say(name)
    start = time.monotonic()
    run(PYTHON, *arguments)
    if not result.exists():
        raise FileNotFoundError(f"the stage '{name}' did not produce {result}")
    return Stage(name, result, time.monotonic() - start)


def print_summary(stages: Sequence[Stage], seconds: float) -> None:
    """Print the results of each stage and the time it took."""
    say("done")
    width = max(len(item.name) for item in stages)
    for item in stages:
        print(f"{item.name.ljust(width)}  {item.seconds:6.1f} s  {item.result}")
    print(f"{'in total'.ljust(width)}  {seconds:6.1f} s")


def run(*command: object) -> None:
    """Print a command and run it in the project's folder."""
    words = [str(word) for word in command]
    print("  $", shlex.join(words), flush=True)
    subprocess.run(words, cwd=ROOT, check=True)


def say(text: str) -> None:
    print(f"\n== {text}", flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
