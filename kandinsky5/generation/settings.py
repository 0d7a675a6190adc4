"""What made a video, told twice: in the file's metadata without paths, and as a command that repeats it."""

from __future__ import annotations

import os
import shlex
import subprocess
from collections.abc import Mapping
from dataclasses import asdict

from kandinsky5.configs.generate import DitConfig, GenerateConfig
from kandinsky5.sampling.pipeline import full_prompt
from kandinsky5.sampling.requests import VideoRequest, full_multipliers
from modules.files import last_part

SCRIPT = "kandinsky5_generate_video.py"


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
    words = ["python", SCRIPT, "--task", config.task.name]
    words += ["--dit", str(config.models.dit), "--vae", str(config.models.vae)]
    words += ["--text_encoder_qwen", config.models.text_encoder_qwen]
    words += ["--text_encoder_clip", config.models.text_encoder_clip]
    # With "=", because a text may begin with a dash.
    words += [f"--prompt={request.prompt}", f"--negative_prompt={request.negative_prompt}"]
    if request.has_own_size:  # else the image gives the size again, and is not cropped
        words += ["--width", str(request.width), "--height", str(request.height)]
    words += ["--frames", str(request.num_frames), "--steps", str(request.steps)]
    words += ["--guidance", f"{request.guidance:g}", "--scheduler_scale", f"{request.scheduler_scale:g}"]
    words += ["--seed", str(request.seed)]
    words += _image_words(request) + _dit_words(config) + _lora_words(config, request) + _other_words(config)
    words += ["--output", str(config.output.output)]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def _image_words(request: VideoRequest) -> list[str]:
    words = ["--image", str(request.image)] if request.image is not None else []
    return words + (["--image_last", str(request.image_last)] if request.image_last is not None else [])


def _dit_words(config: GenerateConfig) -> list[str]:
    dit, task = config.dit, config.task
    words = _flags({
        "--fp8_base": dit.fp8_base,
        "--fp8_fast": dit.fp8_fast,
        "--int8_base": dit.int8_base,
        "--int8_fast": dit.int8_fast,
        "--cpu_noise": dit.cpu_noise,
    })
    words += ["--dtype", dit.dtype] if dit.dtype else []
    words += [f"--{dit.attention}"] if dit.attention != "sdpa" else []
    words += ["--blocks_to_swap", str(dit.blocks_to_swap)] if dit.blocks_to_swap else []
    if dit.magcache is not None:
        words.append("--magcache")
        for name, value in asdict(dit.magcache).items():
            if value is not None:
                words += [f"--{name}", *(map(str, value) if isinstance(value, tuple) else [str(value)])]
    if dit.nabla is not None and dit.nabla != task.nabla:
        nabla = dit.nabla
        words += _flags({"--force_nabla_attention": task.nabla is None})
        words += ["--nabla_method", nabla.method, "--nabla_P", f"{nabla.P:g}"]
        words += ["--nabla_wT", str(nabla.wT), "--nabla_wH", str(nabla.wH), "--nabla_wW", str(nabla.wW)]
        words.append("--nabla_add_sta" if nabla.add_sta else "--no_nabla_add_sta")
    return words


def _weight_words(dit: DitConfig) -> str:
    if dit.fp8_base:
        return "fp8 weights, "
    return "int8 weights, " if dit.int8_base else ""


def _lora_words(config: GenerateConfig, request: VideoRequest) -> list[str]:
    lora = config.lora
    if not lora.lora_weight:
        return []
    words = ["--lora_weight", *map(str, lora.lora_weight)]
    words += ["--lora_multiplier", *(f"{value:g}" for value in used_multipliers(config, request))]
    words += ["--lora_mode", lora.lora_mode] if lora.lora_mode != "merge" else []
    words += ["--include_patterns", *lora.include_patterns] if lora.include_patterns else []
    words += ["--exclude_patterns", *lora.exclude_patterns] if lora.exclude_patterns else []
    return words + _flags({
        "--lora_allow_partial": lora.lora_allow_partial,
        "--no_lora_trigger": lora.no_lora_trigger,
    })


def _other_words(config: GenerateConfig) -> list[str]:
    words = ["--device", config.device] if config.device else []
    words += _flags({
        "--text_encoder_cpu": config.text.text_encoder_cpu,
        "--fp8_llm": config.text.quantization == "fp8",
        "--quantized_qwen": config.text.quantization == "nf4",
    })
    if config.text.prompt_templates is not None:
        words += ["--prompt_templates", str(config.text.prompt_templates)]
    words += ["--vae_dtype", config.vae.vae_dtype] if config.vae.vae_dtype else []
    if config.vae.tile_px is not None:
        words += ["--vae_spatial_tile_sample_min_size", str(config.vae.tile_px)]
    output = config.output
    words += ["--fps", str(output.fps), "--crf", str(output.crf)]
    words += ["--trim_tail_frames", str(output.trim_tail_frames)] if output.trim_tail_frames else []
    return words + (["--output_type", output.output_type] if output.output_type != "video" else [])


def _flags(given: Mapping[str, bool]) -> list[str]:
    return [flag for flag, is_given in given.items() if is_given]
