"""Asks what is to be trained and writes the files for it: `python -m kandinsky5.configure FOLDER`."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from dataset.geometry import PIXEL_STEP, round_frames
from dataset.media.files import is_hidden, media_kind, natural_order
from kandinsky5.cli.caching import parse_cache_latents, parse_cache_text
from kandinsky5.recipes import (
    RECIPES,
    RunPlaces,
    dataset_lines,
    default_places,
    run_lines,
    toml_text,
)
from kandinsky5.tasks import LITE_PARAMS, Task, get_task
from modules.command_line import Parser, user_errors
from modules.errors import ConfigError, UserError
from modules.file_names import name_problem
from modules.files import disk_errors, write_text
from modules.logs import get_logger, print_report
from modules.messages import counted, names_in_short
from modules.options import positive_int

log = get_logger(__name__)

DATASET, RUN, PROMPTS = "dataset.toml", "run.toml", "prompts.txt"
_MODELS = ("dit", "vae", "text_encoder_qwen", "text_encoder_clip")
_QUESTIONS: dict[str, tuple[str, Callable[[str], Any], str | None]] = {
    "clips": ("folder of clips and pictures, with a .txt caption beside each", Path, None),
    "teach": (f"what the LoRA is to teach: {', '.join(RECIPES)}", str, "style"),
    "task": ("task (docs/kandinsky5.md lists them)", str, "k5-pro-t2v-5s-sd"),
    "card": ("GB of memory of the graphics card", positive_int, "24"),
    "weights": (
        "folder of the models, with model, vae, text_encoder and text_encoder2",
        Path,
        "weights",
    ),
    "trigger": ("trigger word that the captions begin with, or nothing", str, ""),
}
"""Option -> question, reader of the answer, default; None: must be answered."""


def main(argv: Sequence[str] | None = None) -> None:
    """Ask what the command line leaves open, write the files, check the dataset and print the commands."""
    with user_errors(argv):
        args = _parse(argv)
        task = _complete(args)
        folders = _media_folders(args.clips, args.folder)
        places = _places(args, task)
        with disk_errors(args.folder):
            _write_files(args, task, folders, places)
        _report_missing_models(places)
        is_fit = _check(args, places)
        print_report("\n".join(_commands(args, task, places)))
        if not is_fit:
            log.warning("the dataset has problems, see above: correct it before the first command")


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.configure",
        f"Write {DATASET}, {RUN} and {PROMPTS} for a LoRA, check the dataset, and print the four commands "
        "that make it. Asks for what is not given; nothing is overwritten.",
    )
    parser.add_argument(
        "folder", type=Path, metavar="FOLDER", help="for the files, the caches and the results"
    )
    for name, (question, read, default) in _QUESTIONS.items():
        hint = "" if not default else f" (default: {default})"
        parser.add_argument(f"--{name}", type=read, metavar=name.upper(), help=f"{question}{hint}")
    for name in _MODELS:
        parser.add_argument(f"--{name}", metavar="PATH", help="instead of the one in --weights")
    parser.add_argument("--name", help="of the LoRA (default: the trigger word, else the name of the folder)")
    parser.add_argument("--steps", type=positive_int, help="steps of training (default: of the recipe)")
    parser.add_argument("--frames", type=positive_int, help="pixel frames of clips (default: of the recipe)")
    parser.add_argument(
        "--resolution", type=positive_int, help="side of a square of pixels (default: by card)"
    )
    parser.add_argument("--yes", action="store_true", help="ask nothing: take the defaults")
    return parser.parse_args(argv)


def _complete(args: argparse.Namespace) -> Task:
    """Fill in what was not given, and check everything.

    Raises:
        ConfigError: all problems together.
    """
    asks = not args.yes and sys.stdin is not None and sys.stdin.isatty()
    missing = []
    for name, (question, read, default) in _QUESTIONS.items():
        if vars(args)[name] is not None:
            continue
        if asks:
            setattr(args, name, _ask(question, read, default))
        elif default is None or not args.yes:
            missing.append(f"--{name}: {question}{f' (default: {default})' if default else ''}")
        else:
            setattr(args, name, read(default))
    if missing:
        hint = [] if args.yes else ["give these options, or --yes for the defaults:"]
        raise ConfigError([*hint, *missing])
    problems = []
    if args.teach not in RECIPES:
        problems.append(f"--teach {args.teach}: use one of {', '.join(RECIPES)}")
    if not args.clips.is_dir():
        problems.append(f"--clips {args.clips}: no such folder")
    args.name = args.name or "_".join(args.trigger.split()) or args.folder.resolve().name
    problem = name_problem(args.name, room=64)
    if problem is not None:
        problems.append(f"--name {args.name!r}: {problem}")
    if args.frames is not None and args.frames != round_frames(args.frames):
        problems.append(f"--frames {args.frames}: use 4k+1, such as {round_frames(args.frames)}")
    if args.resolution is not None and args.resolution % PIXEL_STEP:
        problems.append(f"--resolution {args.resolution}: use a multiple of {PIXEL_STEP}")
    if not 2 <= args.card <= 1024:
        problems.append(f"--card {args.card}: must lie between 2 and 1024 GB")
    problems += [
        f"{args.folder / name}: exists already; delete it or choose another folder"
        for name in (DATASET, RUN, PROMPTS)
        if (args.folder / name).exists()
    ]
    try:
        task = get_task(args.task)
    except ConfigError as error:
        raise ConfigError([*problems, *error.problems]) from error
    if problems:
        raise ConfigError(problems)
    return task


def _ask(question: str, read: Callable[[str], Any], default: str | None) -> Any:
    while True:
        try:
            answer = input(f"{question}{f' [{default}]' if default else ''}: ").strip()
        except EOFError as error:
            raise ConfigError("the questions have no more answers; --help lists the options") from error
        try:
            if answer or default is not None:
                return read(answer or str(default))
        except argparse.ArgumentTypeError as error:
            print(error)


def _media_folders(clips: Path, folder: Path) -> dict[str, tuple[str, str]]:
    """Which media there are -> (their folder, that of their caches).

    Raises:
        ConfigError: none.
    """
    names = [path for path in clips.iterdir() if not is_hidden(path)]
    kinds = {kind for path in names if path.suffix.lower() != ".gif" and (kind := media_kind(path, "video"))}
    found = {
        kind: (clips.resolve().as_posix(), (folder / "cache" / kind).resolve().as_posix())
        for kind in ("video", "image")
        if kind in kinds
    }
    if not found:
        raise ConfigError(f"--clips {clips}: no videos or pictures here; folders within it are not searched")
    return found


def _places(args: argparse.Namespace, task: Task) -> RunPlaces:
    weights = task.folder if task.is_tiny and str(args.weights) == _QUESTIONS["weights"][2] else args.weights
    given = {name: vars(args)[name] for name in _MODELS if vars(args)[name] is not None}
    folder = args.folder.resolve()
    return replace(
        default_places(task, weights.resolve()),
        **given,
        dataset_config=(folder / DATASET).as_posix(),
        output_dir=(folder / "output").as_posix(),
        output_name=args.name,
        sample_prompts=(folder / PROMPTS).as_posix(),
    )


def _resolution(args: argparse.Namespace, task: Task) -> int:
    """A side for the card: 256 for Pro on 24 GB is what musubi-tuner's pull request 774 trained clips in."""
    if args.resolution is not None:
        return args.resolution
    if task.is_tiny:
        return task.resolution
    small, middle = (16, 24) if task.dit_params == LITE_PARAMS else (32, 80)
    return 256 if args.card < small else 384 if args.card < middle else 512


def _write_files(
    args: argparse.Namespace, task: Task, folders: dict[str, tuple[str, str]], places: RunPlaces
) -> None:
    recipe = RECIPES[args.teach]
    size = _resolution(args, task)
    tables = dataset_lines(recipe, task, folders, resolution=size, frames=args.frames)
    sections = run_lines(recipe, task, places, card=args.card, steps=args.steps)
    captions = _captions(args.clips)
    if args.trigger:
        without = [name for name, text in captions if args.trigger.casefold() not in text.casefold()]
        if without:
            log.warning(
                "%s without the trigger word %s: %s",
                counted(len(without), "caption"), args.trigger, names_in_short(without),
            )  # fmt: skip
    prompt = captions[0][1] if captions else args.trigger or "a video"
    frames = args.frames or task.frames or recipe.frames
    prompts = (
        "# one prompt per line; --f frames, --w width, --h height, --d seed\n"
        f"{prompt} --f {frames} --w {size} --h {size} --d 1\n"
    )
    files = ((DATASET, tables), (RUN, sections))
    texts = {name: toml_text(recipe.advice, tables_of) for name, tables_of in files} | {PROMPTS: prompts}
    for name, text in texts.items():
        write_text(args.folder / name, text)
        log.info("wrote %s", args.folder / name)


def _captions(clips: Path) -> list[tuple[str, str]]:
    """(name, first line) of the captions, in the order of a person."""
    found = []
    for path in sorted(clips.glob("*.txt"), key=natural_order):
        if not is_hidden(path):
            text = path.read_text(encoding="utf-8-sig", errors="replace").strip()
            found.append((path.name, text.splitlines()[0] if text else ""))
    return [(name, text) for name, text in found if text]


def _report_missing_models(places: RunPlaces) -> None:
    for name in _MODELS:
        place = getattr(places, name)
        if not Path(place).exists() and (Path(place).is_absolute() or place.count("/") != 1):
            log.warning("--%s %s is not there yet: see Download in docs/kandinsky5.md", name, place)


def _check(args: argparse.Namespace, places: RunPlaces) -> bool:
    """Run `--check` of both cache scripts; whether they found nothing that stops them."""
    from kandinsky5.caching.captions import cache_text  # imported late: --help must not wait for torch
    from kandinsky5.caching.latents import cache_latents

    words = ["--dataset_config", str(args.folder / DATASET), "--check"]
    encoders = [
        word
        for name in ("text_encoder_qwen", "text_encoder_clip")
        if Path(place := getattr(places, name)).exists()
        for word in (f"--{name}", place)
    ]
    is_fit = True
    for run in (
        lambda: cache_latents(parse_cache_latents(words)),
        lambda: cache_text(parse_cache_text([*words, *encoders])),
    ):
        try:
            run()
        except UserError as error:
            log.error("%s", "\n".join(error.problems))
            is_fit = False
    return is_fit


def _commands(args: argparse.Namespace, task: Task, places: RunPlaces) -> list[str]:
    dataset = ("--dataset_config", args.folder / DATASET)
    encoders = [word for name in _MODELS[2:] for word in (f"--{name}", getattr(places, name))]
    lora = Path(places.output_dir or "") / f"{args.name}.safetensors"
    memory = () if task.is_tiny else ("--vram_budget", args.card - 1)
    prompt = ("--prompt", args.trigger or "a video", "--seed", 1)
    video = ("--output", args.folder / f"{args.name}.mp4")
    commands = (
        ("kandinsky5_cache_latents.py", *dataset, "--vae", places.vae),
        ("kandinsky5_cache_text_encoder_outputs.py", *dataset, *encoders),
        ("kandinsky5_train_network.py", "--config_file", args.folder / RUN),
        (
            *("kandinsky5_generate_video.py", "--task", task.name, "--dit", places.dit, "--vae", places.vae),
            *(*encoders, *memory, "--lora_weight", lora, *prompt, *video),
        ),
    )
    return ["", *(f"python {shlex.join(map(str, words))}" for words in commands)]


if __name__ == "__main__":
    main()
