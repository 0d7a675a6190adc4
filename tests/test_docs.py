"""The documents say what the code does: help texts, options, links, examples, recipes and packages.

python tests/test_docs.py --write      renew the generated parts of README.md and docs/
"""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

if __name__ == "__main__":  # the project's packages, when run as a script
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from dataset.buckets import bucket_sizes, choose_bucket, plan_crop
from dataset.config.config import load_dataset_config
from dataset.config.keys import (
    GENERAL_KEYS,
    IGNORED_IMAGE_KEYS,
    IGNORED_VIDEO_KEYS,
    IMAGE_KEYS,
    OLD_SPELLINGS,
    VIDEO_KEYS,
)
from dataset.media.frames import CutRule, cut_frames
from kandinsky5.cli.train import parse_train
from kandinsky5.configs.train import TrainConfig
from kandinsky5.prompts import read_prompt_file
from kandinsky5.tasks import TASKS

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
GUIDE = ROOT / "docs" / "kandinsky5.md"
HELP = ROOT / "docs" / "help.md"
SCRIPTS = sorted(path.name for path in ROOT.glob("kandinsky5_*.py"))
RECIPES = sorted((ROOT / "docs" / "recipes").glob("*.toml"))
PACKAGES = ("kandinsky5", "dataset", "networks", "modules")

# Options of other programs that the documents name.
FOREIGN_OPTIONS = {
    "--num_cpu_threads_per_process", "--multi_gpu", "--num_processes", "--num_machines", "--cpu",
    "--write", "--seed", "--output", "--step", "--memory", "--config", "--shape", "--text", "--rounds",
    "--warmup", "--nproc_per_node", "--index-url", "--local-dir", "--format", "--check",
    "--budget", "--only", "--estimate", "--rehearse", "--name", "--clips", "--teach", "--card", "--weights",
    "--trigger", "--yes", "--part", "--tokens", "--rows", "--bases",
}  # fmt: skip
# Settings inside a prompt line.
PROMPT_OPTIONS = {f"--{name}" for name in ("w", "h", "f", "d", "s", "g", "l", "fs", "n", "i", "ei", "m")}
PROMPT_OPTIONS |= {"--cn", "--ci", "--of"}

_GENERATED = re.compile(r"(<!-- generated: (?P<what>[^>]+?) -->\n)(?P<text>.*?)(<!-- end -->)", re.DOTALL)
_OPTION = re.compile(r"(?<![\w-])--[A-Za-z](?:[\w-]*[A-Za-z0-9])?(?![\w*])")
_FENCE = re.compile(r"^```(?P<language>[^\n]*)\n(?P<text>.*?)^```", re.DOTALL | re.MULTILINE)


# ------------------------------------------------------------------------------------------ generated parts


@cache
def help_text(script: str) -> str:
    """What `python SCRIPT --help` prints, the same in every terminal."""
    environment = {**os.environ, "COLUMNS": "110", "NO_COLOR": "1", "PYTHONIOENCODING": "utf-8"}
    result = subprocess.run(
        [sys.executable, str(ROOT / script), "--help"],
        cwd=ROOT, env=environment, capture_output=True, check=True,
    )  # fmt: skip
    return result.stdout.decode("utf-8").replace("\r\n", "\n")


def render(what: str) -> str:
    """The text of a generated part."""
    kind, _, name = what.partition(" ")
    if kind == "help":
        return f"```text\n{help_text(name).rstrip()}\n```\n"
    if kind == "tasks":
        return _task_table()
    if kind == "packages":
        return _package_list()
    raise ValueError(f"unknown generated part {what!r}")


def _task_table() -> str:
    lines = [
        "| task | checkpoint | size | frames | steps | guidance | schedule | attention |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for task in TASKS.values():
        nabla = task.nabla
        attention = "full" if nabla is None else f"NABLA P {nabla.P:g}, {nabla.wT}/{nabla.wH}/{nabla.wW}"
        lines.append(
            f"| `{task.name}` | `{task.checkpoint}` | {task.resolution} | {task.default_num_frames} "
            f"| {task.steps} | {task.guidance:g} | {task.scheduler_scale:g} | {attention} |"
        )
    return "\n".join(lines) + "\n"


def _package_list() -> str:
    """One line per script and package, from their docstrings."""
    rows = [(path.name, path) for path in sorted(ROOT.glob("*.py"))]
    for top in PACKAGES:
        for path in sorted([*(ROOT / top).glob("__init__.py"), *(ROOT / top).glob("*/__init__.py")]):
            rows.append((f"{path.parent.relative_to(ROOT).as_posix()}/", path))
    lines = ["| | |", "|---|---|", *(f"| `{name}` | {_phrase(path)} |" for name, path in rows)]
    return "\n".join(lines) + "\n"


def _phrase(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    first = " ".join(text.split("\n\n", maxsplit=1)[0].split())
    return re.split(r"(?<=[a-z)`])\. ", first)[0].rstrip(".")


def write_generated() -> None:
    """Renew every generated part of every document."""
    for path in DOCUMENTS:
        old = path.read_text(encoding="utf-8")
        new = _GENERATED.sub(lambda match: match[1] + render(match["what"]) + match[4], old)
        if new != old:
            path.write_text(new, encoding="utf-8", newline="\n")
            print(f"renewed {path.relative_to(ROOT)}")


def _same_words(text: str) -> str:
    """Without what differs between Python versions: line breaks, and a metavar after every spelling."""
    joined = " ".join(text.split())
    return re.sub(r"(--\w+) (\w+), (--\w+) \2\b", r"\1, \3 \2", joined)


def generated_parts() -> Iterator[tuple[Path, str, str]]:
    for path in DOCUMENTS:
        for match in _GENERATED.finditer(path.read_text(encoding="utf-8")):
            yield path, match["what"], match["text"]


@pytest.mark.parametrize(
    ("path", "what", "text"),
    [pytest.param(*part, id=f"{part[0].name} {part[1]}") for part in generated_parts()],
)
def test_generated_parts_are_what_the_code_gives(path: Path, what: str, text: str) -> None:
    assert _same_words(text) == _same_words(render(what)), (
        f"{path.name}: {what}: run  python tests/test_docs.py --write"
    )


def test_the_help_of_every_script_is_a_document() -> None:
    carried = {what.partition(" ")[2] for path, what, _ in generated_parts() if path == HELP}
    assert set(SCRIPTS) <= carried


# ------------------------------------------------------------------------------------------------- options


def prose(path: Path) -> str:
    """A document without its generated parts."""
    return _GENERATED.sub("", path.read_text(encoding="utf-8"))


def options_of(script: str) -> set[str]:
    return set(_OPTION.findall(help_text(script)))


@cache
def known_options() -> frozenset[str]:
    """Every option of the four scripts (hidden spellings too), of the tools, and of quickstart.py."""
    sources = [*(ROOT / "networks").glob("*.py"), *(ROOT / "kandinsky5").glob("*.py"), ROOT / "quickstart.py"]
    sources.append(ROOT / "dataset" / "caption.py")
    sources += (ROOT / "kandinsky5" / "cli").glob("*.py")
    sources += (ROOT / "kandinsky5" / "small_world").glob("*.py")
    written = {name for path in sources for name in _OPTION.findall(path.read_text(encoding="utf-8"))}
    return frozenset(written.union(*map(options_of, SCRIPTS)) | FOREIGN_OPTIONS | PROMPT_OPTIONS)


@pytest.mark.parametrize("script", SCRIPTS)
def test_the_guide_explains_every_option(script: str) -> None:
    explained = set(_OPTION.findall(prose(GUIDE)))
    missing = sorted(options_of(script) - explained - {"--help"})
    assert not missing, f"docs/kandinsky5.md does not mention {' '.join(missing)} of {script}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_documents_name_only_options_that_exist(path: Path) -> None:
    unknown = sorted(set(_OPTION.findall(prose(path))) - known_options())
    assert not unknown


def example_commands() -> Iterator[tuple[str, str, list[str]]]:
    """(document, script, words after it) of every command line in the documents."""
    for path in DOCUMENTS:
        for fence in _FENCE.finditer(prose(path)):
            if fence["language"] not in ("bash", "sh"):
                continue
            for line in fence["text"].replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                for position, word in enumerate(words):
                    if word in SCRIPTS or re.fullmatch(r"kandinsky5_\w+\.py", word):
                        yield path.name, word, words[position + 1 :]


@pytest.mark.parametrize(("document", "script", "words"), list(example_commands()))
def test_example_commands_use_options_of_their_script(document: str, script: str, words: list[str]) -> None:
    assert (ROOT / script).is_file(), f"{document}: {script} does not exist"
    unknown = {word.partition("=")[0] for word in words if _OPTION.match(word)} - options_of(script)
    assert not unknown


# ------------------------------------------------------------------------------------------ links and files


def test_training_commands_can_be_resumed() -> None:
    training = [(document, words) for document, script, words in example_commands() if "_train_" in script]
    named = [(document, words) for document, words in training if "--output_name" in words]
    assert len(named) >= 4
    assert not [document for document, words in named if "--save_state" not in words]


def _slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"[^\w\- ]", "", re.sub(r"`|\[|\]\([^)]*\)", "", heading).strip().lower())
    return text.replace(" ", "-")


def _without_fences(text: str) -> str:
    return _FENCE.sub("", text)


@cache
def anchors(path: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", _without_fences(path.read_text(encoding="utf-8")), re.MULTILINE)
    return {_slug(heading) for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_relative_links_lead_somewhere(path: Path) -> None:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", _without_fences(path.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        file = (path.parent / name).resolve() if name else path
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(target)
    assert not broken


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_of_the_project_that_are_mentioned_exist(path: Path) -> None:
    spans = re.findall(r"`([^`\n]+)`", _without_fences(path.read_text(encoding="utf-8")))
    tops = {entry.name for entry in ROOT.iterdir()} - {"weights", "quickstart_output"}
    mentioned = {
        span
        for span in spans
        if re.fullmatch(r"[\w./-]+", span) and (span.split("/")[0] in tops or span in SCRIPTS)
    }
    dotted = re.compile(r"(kandinsky5|dataset|networks|modules)(\.(?!toml$|json$|py$)\w+)+")
    modules = {span for span in spans if dotted.fullmatch(span)}
    missing = {name for name in mentioned if not (ROOT / name).exists()}
    for name in modules - mentioned:
        parts = name.split(".")
        found = any(
            (ROOT / "/".join(parts[:n])).with_suffix(".py").is_file() for n in (len(parts), len(parts) - 1)
        )
        if not found:
            missing.add(name)
    assert not missing


# ------------------------------------------------------------------------------------------------ examples


def blocks(language: str) -> list[object]:
    return [
        pytest.param(fence["text"], id=f"{path.name} {number}")
        for path in DOCUMENTS
        for number, fence in enumerate(_FENCE.finditer(path.read_text(encoding="utf-8")))
        if fence["language"] == language
    ]


@pytest.mark.parametrize("text", blocks("toml"))
def test_toml_examples_are_read_by_what_they_are_for(text: str, tmp_path: Path) -> None:
    values = tomllib.loads(text)
    path = tmp_path / "example.toml"
    path.write_text(text, encoding="utf-8")
    if "datasets" in values:
        load_dataset_config(path)
    elif "wandb" in values:
        words = [
            "--task",
            "k5-tiny-t2v",
            "--dataset_config",
            "d.toml",
            "--output_dir",
            "o",
            "--output_name",
            "n",
        ]
        config = parse_train([*words, "--log_with", "wandb", "--log_tracker_config", str(path)])
        assert isinstance(config, TrainConfig)
        assert config.tracking.log_tracker_settings == values
    elif "prompt" in values:
        read_prompt_file(path).checked()
    else:
        assert isinstance(parse_train(["--config_file", str(path)]), TrainConfig)


@pytest.mark.parametrize("text", blocks("json"))
def test_json_examples_parse(text: str) -> None:
    for line in [text] if text.lstrip().startswith("[") else text.splitlines():
        json.loads(line)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_recipes_are_accepted_by_the_training_script(path: Path) -> None:
    """With the paths that every user adds; nothing else is needed."""
    words = ["--config_file", str(path), "--dataset_config", "dataset.toml"]
    config = parse_train([*words, "--output_dir", "output", "--output_name", "lora"])
    assert isinstance(config, TrainConfig)
    assert not config.notes, "a recipe holds an option without effect"


def test_every_recipe_is_in_the_guide() -> None:
    text = prose(GUIDE)
    assert RECIPES
    assert not [path.name for path in RECIPES if f"recipes/{path.name}" not in text]


# ------------------------------------------------------------------------------------- the dataset document


DATASET_DOCUMENT = ROOT / "docs" / "dataset_config.md"


def _rows(heading: str) -> list[list[str]]:
    """The cells of the table under a heading of the dataset document."""
    text = DATASET_DOCUMENT.read_text(encoding="utf-8").partition(f"# {heading}\n")[2]
    section = re.split(r"^#+ ", text, maxsplit=1, flags=re.MULTILINE)[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines[2:]]


def test_the_dataset_document_explains_every_key() -> None:
    keys = {*GENERAL_KEYS, *IMAGE_KEYS, *VIDEO_KEYS, *IGNORED_IMAGE_KEYS, *IGNORED_VIDEO_KEYS, *OLD_SPELLINGS}
    text = DATASET_DOCUMENT.read_text(encoding="utf-8")
    assert not sorted(key for key in keys if f"`{key}`" not in text)


def test_the_worked_cuts_of_the_dataset_document_are_right() -> None:
    rows = _rows("Worked cuts")
    assert len(rows) >= 8
    for settings, total, cuts in rows:
        values = tomllib.loads("\n".join(settings.split("; ")))
        if "target_frames" in values:
            values["target_frames"] = tuple(values["target_frames"])
        found = [(cut.start, cut.num_frames) for cut in cut_frames(int(total), CutRule(**values))]
        assert found == [tuple(map(int, pair)) for pair in re.findall(r"\((\d+), (\d+)\)", cuts)], settings


def _pair(cell: str) -> tuple[int, int]:
    first, second = map(int, re.split("x|, ", cell))
    return first, second


def test_the_worked_buckets_of_the_dataset_document_are_right() -> None:
    rows = _rows("Worked buckets")
    assert len(rows) >= 5
    for row in rows:
        area, source, bucket, resized, offset = map(_pair, row)
        chosen = choose_bucket(source, area, bucket_sizes(area, enable_bucket=True), bucket_no_upscale=False)
        plan = plan_crop(source, chosen)
        assert (chosen, plan.resized, plan.offset) == (bucket, resized, offset), row


if __name__ == "__main__":
    if sys.argv[1:] != ["--write"]:
        raise SystemExit(__doc__)
    write_generated()
