"""The settings that make a video: as the file's metadata, without paths, and as a command that repeats it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict

from kandinsky5.cli.generate import repeat_argv
from kandinsky5.configs.generate import DitConfig, GenerateConfig
from kandinsky5.memory.bases import BASE_OPTIONS
from kandinsky5.sampling.pipeline import full_prompt
from kandinsky5.sampling.requests import VideoRequest, full_multipliers
from modules.files import last_part

SCRIPT = "kandinsky5_generate_video.py"
_OF_ONE_CALL = ("from_file", "interactive", "vram_budget", "overwrite", "traceback", "verbose")
"""Options that a repetition of one video does not have."""


def used_multipliers(config: GenerateConfig, request: VideoRequest) -> tuple[float, ...]:
    """One per LoRA: the request's own, else the command line's, else 1."""
    own = request.lora_multiplier or ()
    usual = full_multipliers(config.lora.lora_multiplier, len(config.lora.lora_weight))
    return (*own, *usual[len(own) :])


def settings_metadata(config: GenerateConfig, request: VideoRequest, *, dtype: str) -> dict[str, str]:
    """The settings that make the video, as text; of files only the names, so nothing private gets out."""
    settings: dict[str, str] = {
        "task": config.task.name,
        "prompt": full_prompt(request),
        "negative_prompt": request.negative_prompt,
        "width": str(request.width),
        "height": str(request.height),
        "frames": str(request.num_frames),
        "steps": str(request.steps),
        "guidance": f"{request.guidance:g}",
        "scheduler_scale": f"{request.scheduler_scale:g}",
        "seed": str(request.seed),
        "dit": last_part(config.models.dit),
        "vae": last_part(config.models.vae),
        "dtype": _weight_words(config.dit) + dtype,
    }
    if config.dit.nabla is not None:
        settings["nabla"] = " ".join(f"{key}={value}" for key, value in asdict(config.dit.nabla).items())
    if config.dit.attention != "sdpa":
        settings["attention"] = config.dit.attention
    if config.dit.magcache is not None:
        settings["magcache"] = " ".join(
            f"{key}={value}" for key, value in asdict(config.dit.magcache).items()
        )
    if config.dit.cpu_noise:
        settings["cpu_noise"] = "true"
    if request.image is not None:
        settings["image"] = last_part(request.image)
    if request.image_last is not None:
        settings["image_last"] = last_part(request.image_last)
    if config.lora.lora_weight:
        multipliers = used_multipliers(config, request)
        pairs = zip(config.lora.lora_weight, multipliers, strict=True)
        settings["lora"] = ", ".join(f"{last_part(path)} x {multiplier:g}" for path, multiplier in pairs)
    return settings


def latent_metadata(request: VideoRequest, settings: Mapping[str, str]) -> dict[str, str]:
    """The settings under the keys that saved latents carry in the sibling scripts, and the rest of ours."""
    theirs = {
        "seeds": str(request.seed),
        "video_length": str(request.num_frames),
        "infer_steps": str(request.steps),
        "guidance_scale": f"{request.guidance:g}",
    }
    return {**settings, **theirs}


def repeat_command(config: GenerateConfig, request: VideoRequest) -> str:
    """The command line that makes this video again; for the console, with paths as they were given."""
    options = {
        **{name: value for name, value in config.options.items() if name not in _OF_ONE_CALL},
        "prompt": request.prompt,
        "negative_prompt": request.negative_prompt,
        "width": request.width if request.has_own_size else None,  # else the image gives the size again
        "height": request.height if request.has_own_size else None,
        "frames": request.num_frames,
        "steps": request.steps,
        "guidance": request.guidance,
        "scheduler_scale": request.scheduler_scale,
        "seed": request.seed,
        "image": request.image,
        "image_last": request.image_last,
        "lora_multiplier": list(used_multipliers(config, request)),
        # --vram_budget may have added these.
        **{name: getattr(config.dit, name) for name in BASE_OPTIONS},
        "blocks_to_swap": config.dit.blocks_to_swap,
    }
    words = ["python", SCRIPT, *repeat_argv(options)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _weight_words(dit: DitConfig) -> str:
    if dit.fp8_base:
        return "fp8 weights, "
    if dit.nf4_base:
        return "nf4 weights, "
    return "int8 weights, " if dit.int8_base else ""
