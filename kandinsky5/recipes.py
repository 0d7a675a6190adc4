"""Settings to begin with, by what a LoRA is to teach: for docs/recipes and for `kandinsky5.configure`.

Every value has its reason or its source beside it. Where no source is named it is a starting point that has
not been measured on Kandinsky 5.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kandinsky5.tasks import WEIGHTS_FOLDER, Task, get_task
from kandinsky5.training.results.saved_config import toml_value

OFFICIAL = "the official trainer, kandinskylab/kandinsky-5-lora-train"
MUSUBI = "musubi-tuner's guide for Kandinsky 5"


@dataclass(frozen=True, slots=True)
class Line:
    """One setting of a TOML file."""

    name: str
    value: Any
    why: str
    is_idle: bool = False
    """Written as a comment: a suggestion to try."""

    def __str__(self) -> str:
        return f"{'# ' if self.is_idle else ''}{self.name} = {toml_value(self.value)}  # {self.why}"


@dataclass(frozen=True, slots=True)
class Recipe:
    """What is special about one thing to teach."""

    name: str
    advice: tuple[str, ...]
    """Lines at the top of the files: what to collect, and where that is known from."""
    frames: int
    """Pixel frames of the clips."""
    with_stills: bool
    """Whether the first frame of every clip is learned as a picture too."""
    steps: int
    extra: tuple[Line, ...] = ()


RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe(
            "style",
            (
                "Style: many different subjects in one style, as clips and as pictures. Captions describe",
                "what is seen, not the style, and begin with the trigger word. An example of another",
                "model with 240 clips and 120 pictures, trained with musubi-tuner on 24 GB:",
                "https://civitai.com/models/1404755",
            ),
            frames=33,
            with_stills=True,
            steps=2000,
        ),
        Recipe(
            "subject",
            (
                "Subject: one person, animal or thing in different places, lights and angles. Captions",
                "name the trigger word and what is around the subject. Everything of its kind may begin",
                "to look like it; prior_loss_weight holds that back (the idea is that of DreamBooth,",
                "arXiv 2208.12242).",
            ),
            frames=17,
            with_stills=True,
            steps=1500,
            extra=(
                Line(
                    "prior_loss_weight",
                    0.5,
                    "other captions keep their meaning; a step takes about twice the time",
                    is_idle=True,
                ),
            ),
        ),
        Recipe(
            "motion",
            (
                "Motion: one movement by different subjects in different places, each clip with the whole",
                "of it. Captions describe the movement. It is decided at high noise (Wan-Video/Wan2.2 has",
                "an expert of its own for these steps), which the official distribution of timesteps",
                "draws most often.",
            ),
            frames=49,
            with_stills=False,
            steps=2000,
        ),
    )
}


@dataclass(frozen=True, kw_only=True, slots=True)
class RunPlaces:
    """Files and folders of a run."""

    dit: str
    vae: str
    text_encoder_qwen: str
    text_encoder_clip: str
    dataset_config: str | None = None
    output_dir: str | None = None
    output_name: str | None = None
    sample_prompts: str | None = None


def run_lines(
    recipe: Recipe, task: Task, places: RunPlaces, *, card: int, steps: int | None = None
) -> dict[str, list[Line]]:
    """The options of a training by section.

    Args:
        card: GB of the graphics card.
        steps: None takes those of the recipe.
    """
    total = steps or recipe.steps
    every = max(1, total // 8)
    own = "the setting of quickstart.py for a model of this size"
    lines = {
        "model": [
            Line("task", task.name, "architecture and sampling defaults"),
            Line("dit", places.dit, "the model to train on"),
        ],
        "memory": [] if task.is_tiny else [
            Line("mixed_precision", "bf16", "activations overflow fp16"),
            Line("vram_budget", card - 1, f"GiB of a {card} GB card; float8 and swapped blocks as needed"),
        ],
        "lora": [
            Line("network_module", "networks.lora_kandinsky", "plain LoRA"),
            *(Line(name, 16, own) for name in ("network_dim", "network_alpha") if task.is_tiny),
            *(Line(name, 32, OFFICIAL) for name in ("network_dim", "network_alpha") if not task.is_tiny),
        ],
        "optimizer": [
            Line("optimizer_type", "AdamW", own),
            Line("learning_rate", 2e-3, own),
        ] if task.is_tiny else [
            Line("optimizer_type", "AdamW8bit", f"8 bits: {MUSUBI}"),
            Line("optimizer_args", ["weight_decay=0.001", "betas=(0.9,0.95)"], OFFICIAL),
            Line("learning_rate", 1e-4, OFFICIAL),
            Line("lr_scheduler", "constant_with_warmup", OFFICIAL),
            Line("lr_warmup_steps", 100, f"{MUSUBI}; the official trainer warms up for 1000"),
            Line("max_grad_norm", 1.0, OFFICIAL),
        ],
        "timesteps": [
            Line("timestep_sampling", "shift", "a logit-normal draw, moved to high noise"),
            Line("discrete_flow_shift", 3.0 if task.is_tiny else 5.0, own if task.is_tiny else OFFICIAL),
        ],
        "loss": list(recipe.extra),
        "run": [
            Line("max_train_steps", total, "look at the samples: the best LoRA is often an earlier one"),
            Line("max_data_loader_n_workers", 1, "caches are small to read"),
            Line("save_every_n_steps", every, "a LoRA to compare at every sample"),
            Line("save_state", True, "--resume auto continues a stopped run"),
            Line("save_last_n_steps_state", 1, "states are large: only the last is kept"),
        ],
    }  # fmt: skip
    lines["run"] += _own_places(places)
    if places.sample_prompts is not None:
        lines["samples"] = [
            Line("sample_prompts", places.sample_prompts, "one prompt per line"),
            Line("sample_at_first", True, "what the model makes without the LoRA"),
            Line("sample_every_n_steps", every, "as often as a LoRA is saved"),
            Line("vae", places.vae, "decodes samples"),
            Line("text_encoder_qwen", places.text_encoder_qwen, "reads sample prompts"),
            Line("text_encoder_clip", places.text_encoder_clip, "reads sample prompts"),
        ]
    return {section: entries for section, entries in lines.items() if entries}


def _own_places(places: RunPlaces) -> Iterator[Line]:
    for name, why in (
        ("dataset_config", "what is learned from"),
        ("output_dir", "results, samples and the report"),
        ("output_name", "the beginning of every file of this run"),
    ):
        value = getattr(places, name)
        if value is not None:
            yield Line(name, value, why)


def dataset_lines(
    recipe: Recipe, task: Task, folders: Mapping[str, tuple[str, str]], *, resolution: int, frames: int | None
) -> dict[str, list[Line]]:
    """The dataset file by table.

    Args:
        folders: "video" and "image", as far as there are such media -> (folder of media, of caches).
        resolution: side of a square; buckets keep its area.
        frames: None takes those of the recipe, or of a small model.
    """
    count = frames or task.frames or recipe.frames
    stills = [1] if recipe.with_stills and count > 1 else []
    tables = {
        "[general]": [
            Line("resolution", [resolution, resolution], "area in pixels; the shape of each clip is kept"),
            Line("enable_bucket", True, "clips of any shape, in groups of equal size"),
            Line("bucket_no_upscale", True, "small media stay as they are"),
            Line("caption_extension", ".txt", "clip.mp4 has its caption in clip.txt"),
            Line("batch_size", 1, "clips per step"),
        ]
    }
    if "video" in folders:
        media, caches = folders["video"]
        tables["[[datasets]] # clips"] = [
            Line("video_directory", media, "the clips"),
            Line("cache_directory", caches, "written by the cache scripts"),
            Line("target_frames", [*stills, count], "4k+1 frames, 24 a second; 1 is a picture"),
            Line("frame_extraction", "head", "from the beginning of each clip"),
            Line("source_fps", "auto", "the rate that each file names is converted to 24"),
        ]
    if "image" in folders:
        media, caches = folders["image"]
        tables["[[datasets]] # pictures"] = [
            Line("image_directory", media, "the pictures"),
            Line("cache_directory", caches, "written by the cache scripts"),
        ]
    return tables


def toml_text(head: Sequence[str], sections: Mapping[str, Sequence[Line]]) -> str:
    """A TOML file with a comment per line."""
    parts = ["\n".join(f"# {line}".rstrip() for line in head)]
    for title, lines in sections.items():
        name = title if title.startswith("[") else f"[{title}]"
        parts.append("\n".join([name, *map(str, lines)]))
    return "\n\n".join(parts) + "\n"


def default_places(task: Task, weights: Path) -> RunPlaces:
    """The places of a task's models in a folder of weights, as the guide's downloads leave them."""
    moved = {
        name: (weights / getattr(task, f"{name}_path").relative_to(task.folder)).as_posix()
        for name in ("dit", "vae", "text_encoder_qwen", "text_encoder_clip")
    }
    return RunPlaces(**moved)


def recipe_text(recipe: Recipe) -> str:
    """The file of docs/recipes: Pro T2V on a 24 GB card, without the files of a run."""
    task = get_task("k5-pro-t2v-5s-sd")
    head = (
        *recipe.advice,
        "",
        "Not run on a GPU by us yet. python -m kandinsky5.configure writes this for your files and card, and",
        "a dataset file; this one is for --config_file, and the command line wins over it.",
    )
    return toml_text(head, run_lines(recipe, task, default_places(task, WEIGHTS_FOLDER), card=24))
