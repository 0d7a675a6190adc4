"""Scores on the small world: what a LoRA teaches, guidance and steps, faults. JSON lines; 2 s of one core for 4 clips.

    python bench_small_world.py lora --concept star [--seeds 20] [-- --lora_weight star.safetensors --fp8_base]
    python bench_small_world.py sampling [--seeds 1]
    python bench_small_world.py faults [--seeds 1]

What follows `--` are options of the generation script, which chooses and loads the model by them. The prompts of
`lora` are neither among those of quickstart.py nor, with its settings, among the captions that a LoRA is trained on;
settings were chosen on the prompts and seeds of `--tuning` and measured on the others.
"""

import argparse
import json
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from kandinsky5.cli.generate import check_model_paths, parse_generate
from kandinsky5.generation.models import ModelLoader, check_models, read_loras
from kandinsky5.small_world.judge import judge
from kandinsky5.small_world.score import Shares
from kandinsky5.small_world.world import Scene, draw
from tests.kandinsky5.small_world.base_kit import PROMPTS, TASK, Sampling, sample, small_base, velocity_error
from tests.kandinsky5.small_world.faults import FAULTS, IMAGE_FAULTS

BATCH = 20
TUNING_SEED = 100
STEPS = (4, 8, 16, 32, 50)
GUIDANCE = (1.0, 2.0, 3.0, 4.0, 6.0)


def scenes_of(shape, *pairs):
    return tuple(Scene(shape, *pair.split()) for pair in pairs)


@dataclass(frozen=True)
class Concept:
    """Something that the base has not seen: what a verdict must name, and scenes that have it."""

    parts: dict
    test: tuple
    tuning: tuple = ()

    def appears(self, verdict):
        return all(getattr(verdict, name) == value for name, value in self.parts.items())


_SHAPE_TEST = (
    "red right", "red grows", "yellow down", "yellow still", "green up",
    "cyan left", "cyan grows", "blue down", "blue shrinks", "purple left",
)  # fmt: skip
_SHAPE_TUNING = (
    "red shrinks", "yellow right", "yellow shrinks", "green still", "cyan up", "blue grows", "purple right",
)  # fmt: skip
_MOTIONS = ("left", "right", "up", "down", "grows", "shrinks", "still")

CONCEPTS = {
    "star": Concept({"shape": "star"}, scenes_of("star", *_SHAPE_TEST), scenes_of("star", *_SHAPE_TUNING)),
    "ring": Concept({"shape": "ring"}, scenes_of("ring", *_SHAPE_TEST), scenes_of("ring", *_SHAPE_TUNING)),
    "spins": Concept(
        {"motion": "spins"},
        tuple(
            Scene(shape, colour, "spins")
            for colour in ("red", "yellow", "green", "cyan", "blue")
            for shape in ("square", "triangle")
            if (colour, shape) != ("red", "triangle")
        ),
    ),
    "red triangle": Concept(
        {"shape": "triangle", "colour": "red"}, scenes_of("triangle", *(f"red {name}" for name in _MOTIONS))
    ),
}
TUNING_CONTROLS = (
    *scenes_of("circle", "cyan right", "yellow grows", "purple down"),
    *scenes_of("square", "cyan left", "green up", "red shrinks"),
    *scenes_of("triangle", "purple left", "blue right", "yellow still"),
)


def base_with(options):
    """The small base with the DiT that the generation script loads for these options."""
    here = ("--task", TASK.name, "--prompt", "", "--output", "unused.mp4")
    config = parse_generate([*here, *options])
    check_model_paths(config)
    check_models(config, torch.device("cpu"))
    model = ModelLoader(config, read_loras(config), torch.device("cpu"), None).dit()
    return replace(small_base(), dit=model.dit)


def judge_prompts(base, scenes, seeds, how=None, with_image=False):
    """One clip per scene and seed -> the scenes and their verdicts."""
    pairs = [(scene, seed) for scene in scenes for seed in seeds]
    verdicts = []
    for start in range(0, len(pairs), BATCH):
        part, numbers = zip(*pairs[start : start + BATCH])
        ends = draw(part, torch.Generator().manual_seed(start))[:, :, [0, -1]] if with_image else None
        verdicts += [judge(clip) for clip in sample(base, part, numbers, how, images=ends)]
    return [scene for scene, _ in pairs], verdicts


def score_lora(args):
    concept, base = CONCEPTS[args.concept], base_with(args.options)
    if args.tuning:
        taught, controls = concept.tuning, TUNING_CONTROLS
        seeds = range(TUNING_SEED, TUNING_SEED + args.seeds)
    else:
        taught, controls, seeds = concept.test, PROMPTS, range(args.seeds)
    scenes, verdicts = judge_prompts(base, taught, seeds)
    share = sum(map(concept.appears, verdicts)) / len(verdicts)
    yield {"prompts": args.concept, "appears": round(share, 3), **row(scenes, verdicts)}
    scenes, verdicts = judge_prompts(base, controls, seeds)
    leaks = sum(map(concept.appears, verdicts)) / len(verdicts)
    yield {"prompts": "controls", "appears": round(leaks, 3), **row(scenes, verdicts)}


def score_sampling(args):
    for guidance in GUIDANCE:
        for steps in STEPS:
            how = Sampling(steps=steps, guidance=guidance)
            judged = judge_prompts(small_base(), PROMPTS, range(args.seeds), how)
            yield {"guidance": guidance, "steps": steps, **row(*judged)}


def score_faults(args):
    """The error on drawn clips over that of the right model, and the shares of generated clips."""
    base = small_base()
    for with_image, faults in ((False, FAULTS), (True, IMAGE_FAULTS)):
        right = velocity_error(base, with_image=with_image)
        for name, fault in {"none": lambda base: base, **faults}.items():
            error = velocity_error(fault(base), with_image=with_image) / right
            judged = judge_prompts(fault(base), PROMPTS, range(args.seeds), with_image=with_image)
            yield {"fault": name, "with_image": with_image, "error": round(error, 3), **row(*judged)}


def row(scenes, verdicts):
    return Shares.of_verdicts(scenes, verdicts).as_dict()


def parse(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(required=True)
    for name, run in (("lora", score_lora), ("sampling", score_sampling), ("faults", score_faults)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--seeds", type=int, default=1)
        if run is score_lora:
            command.add_argument("--concept", choices=CONCEPTS, default="star")
            command.add_argument("--tuning", action="store_true")
            command.add_argument("options", nargs="*")
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(1)
    start = time.process_time()
    for record in args.run(args):
        now = time.process_time()
        print(json.dumps({**record, "cpu_seconds": round(now - start)}), flush=True)
        start = now


if __name__ == "__main__":
    main()
