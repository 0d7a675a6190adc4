"""Compares generated clips with their prompts: `python -m kandinsky5.small_world.score FOLDER...`.

Every .mp4 that the generation script wrote carries its prompt; the judge says whether the clip shows it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import av

from kandinsky5.small_world.judge import Verdict, judge, read_clip
from kandinsky5.small_world.world import COLOURS, MOTIONS, SHAPES, Scene
from modules.command_line import Parser, user_errors
from modules.errors import DataError


@dataclass(frozen=True, slots=True)
class Judged:
    """A generated clip: its prompt and the judge's verdict."""

    path: Path
    prompt: str
    scene: Scene
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class Shares:
    """The shares of clips that are right."""

    clips: int
    shape: float
    colour: float
    motion: float
    all_three: float

    @classmethod
    def of(cls, judged: Sequence[Judged]) -> Shares:
        """Of generated files."""
        return cls.of_verdicts([item.scene for item in judged], [item.verdict for item in judged])

    @classmethod
    def of_verdicts(cls, scenes: Sequence[Scene], verdicts: Sequence[Verdict]) -> Shares:
        """Of clips whose prompts name `scenes`."""

        def share(name: str) -> float:
            pairs = zip(verdicts, scenes, strict=True)
            return _share([getattr(verdict, name) == getattr(scene, name) for verdict, scene in pairs])

        whole = [verdict.matches(scene) for verdict, scene in zip(verdicts, scenes, strict=True)]
        return cls(len(scenes), share("shape"), share("colour"), share("motion"), _share(whole))

    def as_dict(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("clips", "shape", "colour", "motion", "all_three")}


def _share(right: Sequence[bool]) -> float:
    return round(sum(right) / len(right), 3)


def scene_of_prompt(prompt: str) -> Scene | None:
    """The scene that a prompt names in any of the world's wordings; None if a word is missing."""
    words = set(re.findall(r"[a-z]+", prompt.lower()))
    shape = next((name for name in SHAPES if name in words), None)
    colour = next((name for name in COLOURS if name in words), None)
    motion = next(
        (name for name, verbs in MOTIONS.items() if words & {verb.split()[-1] for verb in verbs}), None
    )
    return Scene(shape, colour, motion) if shape and colour and motion else None


def judge_folder(folder: Path) -> list[Judged]:
    """Judge every .mp4 of a folder whose own prompt names a scene.

    Raises:
        DataError: there is none.
    """
    judged = []
    for path in sorted(folder.glob("*.mp4")):
        prompt = _prompt_of(path)
        scene = scene_of_prompt(prompt)
        if scene is not None:
            judged.append(Judged(path, prompt, scene, judge(read_clip(path))))
    if not judged:
        raise DataError(f"{folder}: no .mp4 there carries a prompt of the small world")
    return judged


def _prompt_of(path: Path) -> str:
    """The prompt in a generated video's comment; empty where there is none."""
    with av.open(str(path)) as container:
        comment = container.metadata.get("comment", "")
    try:
        stored = json.loads(comment)
    except ValueError:
        return ""
    return str(stored.get("prompt", "")) if isinstance(stored, dict) else ""


def by_prompt(judged: Iterable[Judged]) -> dict[str, list[Judged]]:
    """The clips of every prompt, in the order of the prompts' first clips."""
    groups: dict[str, list[Judged]] = {}
    for item in judged:
        groups.setdefault(item.prompt, []).append(item)
    return groups


def main(argv: Sequence[str] | None = None) -> None:
    with user_errors(argv):
        for folder in _parse(argv).folders:
            judged = judge_folder(folder)
            for prompt, items in by_prompt(judged).items():
                _print({"folder": folder.name, "prompt": prompt, **Shares.of(items).as_dict()})
            _print({"folder": folder.name, "prompt": "all", **Shares.of(judged).as_dict()})


def _print(record: dict[str, object]) -> None:
    print(json.dumps(record), file=sys.stdout)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.small_world.score",
        "Print how many generated clips show what their prompts say.",
    )
    parser.add_argument("folders", type=Path, nargs="+", metavar="FOLDER", help="of generated .mp4 files")
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
