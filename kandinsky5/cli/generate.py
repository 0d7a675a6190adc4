"""The options of `kandinsky5_generate_video.py`."""

from __future__ import annotations

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from dataset.geometry import FPS, NABLA_STEP, PIXEL_STEP
from kandinsky5.cli.attention_options import (
    ATTENTION_WORDS,
    add_attention_options,
    attention_problems,
    chosen_attention,
)
from kandinsky5.cli.common import (
    DTYPE_CHOICES,
    VRAM_BUDGET_RANGE,
    Parser,
    existing_file,
    float_between,
    int_between,
    local_name,
    non_negative_int,
    positive_int,
)
from kandinsky5.cli.compile_options import add_compile_options, compile_config
from kandinsky5.cli.idle_generate import ACCEPTED, RULES
from kandinsky5.cli.idle_rules import given_options, idle_notes
from kandinsky5.cli.vae_options import add_vae_tiling_options, tile_px
from kandinsky5.cli.weight_options import (
    add_dit_weight_options,
    add_qwen_weight_options,
    dit_weight_problems,
)
from kandinsky5.configs.compilation import CompileConfig
from kandinsky5.configs.generate import (
    OUTPUT_SUFFIXES,
    OUTPUT_TYPES,
    DitConfig,
    GenerateConfig,
    LoraConfig,
    MagCacheConfig,
    ModelPaths,
    OutputConfig,
    TextEncoderConfig,
    VaeConfig,
)
from kandinsky5.configs.text_encoders import qwen_quantization
from kandinsky5.prompts import PromptSpec, text_problems
from kandinsky5.tasks import NablaParams, Task, get_task
from modules.errors import ConfigError, ModelFileError
from modules.file_names import MAX_NAME_BYTES
from modules.logs import get_logger

log = get_logger(__name__)

DEFAULT_TASK = "k5-pro-t2v-5s-sd"
_EPILOG = (
    "Spellings of the sibling scripts are understood too: --video_size H W, --video_length, --infer_steps, "
    "--guidance_scale, --flow_shift, --save_path, --image_path, --end_image_path, --fp8. "
    "--frames counts pixel frames."
)
_ROOM = len("-999_latent.safetensors")
"""What may be added to the name of an output: a number where it is taken, and the kind of the file."""
_MAGCACHE_SETTINGS = ("magcache_threshold", "magcache_k", "magcache_retention_ratio")


def parse_generate(argv: Sequence[str] | None = None) -> GenerateConfig:
    """Turn the command line into a checked config.

    Raises:
        ConfigError: options that contradict each other, are missing or name files that do not exist.
    """
    parser = _parser()
    args = parser.parse_args(argv)
    given = given_options(parser, args)
    task = get_task(args.task)
    problems = attention_problems(args, for_training=False)
    problems += _nabla_problems(args, task)
    problems += _file_problems(args)
    problems += _pattern_problems(args)
    problems += _magcache_problems(args)
    problems += dit_weight_problems(args)
    problems += text_problems({"--prompt": args.prompt, "--negative_prompt": args.negative_prompt})
    if problems:
        raise ConfigError(problems)
    config = _config(args, task)
    for name, why in ACCEPTED.items():
        if name in given:
            log.info("--%s has no effect: %s", name, why)
    for note in idle_notes(RULES, config, given).values():
        log.info("%s", note)
    return config


def _config(args: argparse.Namespace, task: Task) -> GenerateConfig:
    return GenerateConfig(
        task=task,
        models=ModelPaths(
            dit=args.dit or task.dit_path,
            vae=args.vae or task.vae_path,
            text_encoder_qwen=args.text_encoder_qwen or local_name(task.text_encoder_qwen_path),
            text_encoder_clip=args.text_encoder_clip or local_name(task.text_encoder_clip_path),
        ),
        spec=_spec(args),
        from_file=args.from_file,
        interactive=args.interactive,
        latent_path=args.latent_path,
        dry_run=args.dry_run,
        vram_budget=args.vram_budget,
        device=args.device,
        dit=DitConfig(
            dtype=args.dtype,
            fp8_base=args.fp8_base or args.fp8_scaled,
            fp8_fast=args.fp8_fast,
            int8_base=args.int8_base,
            int8_fast=args.int8_fast,
            blocks_to_swap=args.blocks_to_swap,
            use_pinned_memory_for_block_swap=args.use_pinned_memory_for_block_swap,
            offload_dit_during_sampling=args.offload_dit_during_sampling,
            disable_numpy_memmap=args.disable_numpy_memmap,
            no_weight_check=args.no_weight_check,
            nabla=_nabla(args, task),
            attention=chosen_attention(args),
            magcache=_magcache(args),
            cpu_noise=args.cpu_noise,
            compile=_compile(args, task),
        ),
        text=TextEncoderConfig(
            text_encoder_cpu=args.text_encoder_cpu,
            quantization=qwen_quantization(fp8_llm=args.fp8_llm, quantized_qwen=args.quantized_qwen),
            prompt_templates=args.prompt_templates,
        ),
        vae=VaeConfig(vae_dtype=args.vae_dtype, tile_px=tile_px(args)),
        lora=LoraConfig(
            lora_weight=tuple(args.lora_weight),
            lora_multiplier=tuple(args.lora_multiplier),
            lora_mode=args.lora_mode,
            include_patterns=tuple(args.include_patterns),
            exclude_patterns=tuple(args.exclude_patterns),
            lora_allow_partial=args.lora_allow_partial,
            no_lora_trigger=args.no_lora_trigger,
            save_merged_model=args.save_merged_model,
        ),
        output=_output(args),
    )


def check_model_paths(config: GenerateConfig) -> None:
    """Find out about mistyped paths before torch is imported, which takes seconds.

    Raises:
        ModelFileError: with all files and folders that are not there.
    """
    paths = [("--vae", config.models.vae)] if config.lora.save_merged_model is None else []
    if config.latent_path is None:
        paths += [
            ("--dit", config.models.dit),
            *(("--lora_weight", path) for path in config.lora.lora_weight),
        ]
    missing = [f"{flag} {path}: no such file or folder" for flag, path in paths if not path.exists()]
    if missing:
        raise ModelFileError(missing)


def _output(args: argparse.Namespace) -> OutputConfig:
    is_folder = args.output is not None and args.output.endswith(("/", "\\"))
    path = None if args.output is None else Path(args.output)
    if path is not None:
        _check_length(path, is_folder=is_folder or args.from_file is not None or args.interactive)
    if path is not None and not is_folder and not path.is_dir():
        suffix = path.suffix.lower()
        makes_files = args.from_file is None and not args.interactive
        if makes_files and suffix and suffix not in OUTPUT_SUFFIXES and not suffix[1:].isdigit():
            raise ConfigError(
                f"--output {path}: {suffix} is not one of {', '.join(OUTPUT_SUFFIXES)} or a folder"
            )
    return OutputConfig(
        output=path,
        output_is_folder=is_folder,
        output_type=args.output_type,
        fps=args.fps,
        crf=args.crf,
        trim_tail_frames=args.trim_tail_frames,
        overwrite=args.overwrite,
        no_metadata=args.no_metadata,
    )


def _check_length(path: Path, *, is_folder: bool) -> None:
    """Refuse a name that leaves no room, which would be found out after sampling only."""
    longest = max((len(os.fsencode(part)) for part in path.parts), default=0)
    if longest > MAX_NAME_BYTES:
        raise ConfigError(
            f"--output {path}: a name of {longest} bytes; at most {MAX_NAME_BYTES} are possible"
        )
    stem = path.stem if path.suffix.lower() in OUTPUT_SUFFIXES else path.name
    if len(os.fsencode(stem)) + _ROOM > MAX_NAME_BYTES and not is_folder and not path.is_dir():
        raise ConfigError(
            f"--output {path}: the name is {len(os.fsencode(stem))} bytes long; at most "
            f"{MAX_NAME_BYTES - _ROOM} leave room for what is added to it"
        )


def _spec(args: argparse.Namespace) -> PromptSpec:
    height, width = args.video_size or (None, None)
    return PromptSpec(
        prompt=args.prompt,
        negative_prompt=args.negative_prompt,
        width=args.width if args.width is not None else width,
        height=args.height if args.height is not None else height,
        frames=args.frames,
        steps=args.steps,
        guidance=args.guidance,
        scheduler_scale=args.scheduler_scale,
        seed=args.seed,
        image=args.image,
        image_last=args.image_last,
    )


def _nabla(args: argparse.Namespace, task: Task) -> NablaParams | None:
    if task.nabla is None and not args.force_nabla_attention:
        return None
    values = {"P": args.nabla_P, "wT": args.nabla_wT, "wH": args.nabla_wH, "wW": args.nabla_wW}
    values |= {"method": args.nabla_method, "add_sta": args.nabla_add_sta}
    return replace(task.nabla or NablaParams(), **{k: v for k, v in values.items() if v is not None})


def _nabla_problems(args: argparse.Namespace, task: Task) -> list[str]:
    given = {
        "--nabla_method": args.nabla_method,
        "--nabla_P": args.nabla_P,
        "--nabla_wT": args.nabla_wT,
        "--nabla_wH": args.nabla_wH,
        "--nabla_wW": args.nabla_wW,
        "--nabla_add_sta": args.nabla_add_sta,
    }
    flags = [flag for flag, value in given.items() if value is not None]
    if flags and task.nabla is None and not args.force_nabla_attention:
        return [f"{flags[0]}: --task {task.name} has full attention; add --force_nabla_attention"]
    if args.nabla_P is not None and args.nabla_method != "topk" and args.nabla_P > 1:
        return [f"--nabla_P {args.nabla_P:g}: a share of at most 1 is wanted with topcdf"]
    return []


def _magcache(args: argparse.Namespace) -> MagCacheConfig | None:
    if not args.magcache:
        return None
    given = {name: vars(args)[name] for name in _MAGCACHE_SETTINGS if vars(args)[name] is not None}
    if args.magcache_mag_ratios is not None:
        given["magcache_mag_ratios"] = tuple(args.magcache_mag_ratios)
    return MagCacheConfig(**given)


def _magcache_problems(args: argparse.Namespace) -> list[str]:
    given = [name for name in (*_MAGCACHE_SETTINGS, "magcache_mag_ratios") if vars(args)[name] is not None]
    problems = [f"--{name} acts with --magcache only: add it" for name in given if not args.magcache]
    ratios = args.magcache_mag_ratios
    if ratios is not None and len(ratios) % 2:
        problems.append(f"--magcache_mag_ratios: pairs are wanted, got {len(ratios)} numbers")
    return problems


def _file_problems(args: argparse.Namespace) -> list[str]:
    files = (
        ("--from_file", args.from_file),
        ("--latent_path", args.latent_path),
        ("--prompt_templates", args.prompt_templates),
    )
    problems = [existing_file(path, flag) for flag, path in files if path is not None]
    return [problem for problem in problems if problem is not None]


def _pattern_problems(args: argparse.Namespace) -> list[str]:
    problems = []
    for flag, patterns in (
        ("--include_patterns", args.include_patterns),
        ("--exclude_patterns", args.exclude_patterns),
    ):
        for pattern in patterns:
            try:
                re.compile(pattern)
            except re.error as error:
                problems.append(f"{flag} {pattern}: not a regular expression: {error}")
    return problems


def _parser() -> Parser:
    parser = Parser("kandinsky5_generate_video.py", "Make videos and images with Kandinsky 5 and LoRAs.")
    parser.epilog = _EPILOG
    _add_prompt_options(parser)
    _add_sampling_options(parser)
    _add_model_options(parser)
    _add_dit_options(parser)
    _add_lora_options(parser)
    _add_encoder_options(parser)
    _add_output_options(parser)
    add_compile_options(parser)
    parser.add_argument("--compile_args", nargs=4, metavar=("B", "M", "D", "F"), help=argparse.SUPPRESS)
    return parser


def _add_prompt_options(parser: Parser) -> None:
    group = parser.add_argument_group("what to make")
    add = group.add_argument
    add("--task", default=DEFAULT_TASK, help="which checkpoint and its settings (default: %(default)s)")
    add("--prompt", help="what the video shows")
    add("--negative_prompt", help='what it should not look like (default: the official list; "" for none)')
    add(
        "--i",
        "--image",
        dest="image",
        type=Path,
        metavar="PATH",
        help="first frame, for image-to-video tasks",
    )
    add("--image_path", dest="image", type=Path, help=argparse.SUPPRESS)
    add("--image_last", type=Path, metavar="PATH", help="last frame, beside --image (experimental)")
    add("--end_image_path", dest="image_last", type=Path, help=argparse.SUPPRESS)
    add(
        "--from_file",
        type=Path,
        metavar="PATH",
        help="a .txt, .json or .toml file of prompts; --output is a folder",
    )
    add("--interactive", action="store_true", help="read prompts from the console; models stay loaded")
    add(
        "--dry_run",
        action="store_true",
        help="check everything, print what memory and work each prompt needs, and end",
    )
    add("--latent_path", type=Path, metavar="PATH", help="decode a saved latent instead of sampling")


def _add_sampling_options(parser: Parser) -> None:
    group = parser.add_argument_group("size and sampling")
    add = group.add_argument
    add(
        "--width",
        type=int,
        help=f"pixels, a multiple of {PIXEL_STEP} ({NABLA_STEP} with NABLA); default: the task's, or the "
        "image's",
    )
    add("--height", type=int, help="pixels, as --width")
    add("--video_size", type=int, nargs=2, metavar=("H", "W"), help=argparse.SUPPRESS)
    add("--frames", type=int, help="pixel frames, 4k+1 (default: the task's; 1 when --output is a .png)")
    add("--video_length", dest="frames", type=int, help=argparse.SUPPRESS)
    add("--steps", type=positive_int, help="sampling steps (default: the task's)")
    add("--infer_steps", dest="steps", type=positive_int, help=argparse.SUPPRESS)
    guidance = float_between(0, 100)
    add("--guidance", type=guidance, help="guidance weight (default: the task's); 1 means no second pass")
    add("--guidance_scale", dest="guidance", type=guidance, help=argparse.SUPPRESS)
    scale = float_between(1e-3, 1e3)
    add("--scheduler_scale", type=scale, help="shift of the noise schedule (default: the task's)")
    add("--flow_shift", dest="scheduler_scale", type=scale, help=argparse.SUPPRESS)
    add("--seed", type=non_negative_int, help="seed of the starting noise (default: 42)")
    add("--cpu_noise", action="store_true", help="draw the noise on the CPU: the same video on every GPU")


def _add_model_options(parser: Parser) -> None:
    group = parser.add_argument_group("models")
    add = group.add_argument
    add("--dit", type=Path, metavar="PATH", help="DiT: .safetensors, shards or a diffusers folder")
    add("--vae", type=Path, metavar="PATH", help="HunyuanVideo VAE: a file or a folder")
    add("--text_encoder_qwen", metavar="ID", help="Qwen2.5-VL: a folder or a hub id")
    add("--text_encoder_clip", metavar="ID", help="CLIP ViT-L/14: a folder or a hub id")
    add(
        "--vram_budget",
        type=float_between(*VRAM_BUDGET_RANGE),
        metavar="GB",
        help="add --fp8_base and --blocks_to_swap as far as sampling needs them to fit",
    )
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")


def _add_dit_options(parser: Parser) -> None:
    group = parser.add_argument_group("DiT")
    add = group.add_argument
    add("--dtype", choices=DTYPE_CHOICES, help="compute dtype (default: bfloat16, on a CPU float32)")
    add("--fp8", dest="fp8_base", action="store_true", help=argparse.SUPPRESS)
    add_dit_weight_options(add, "the same as --fp8_base")
    add("--blocks_to_swap", type=non_negative_int, default=0, metavar="N", help="blocks kept in host memory")
    add(
        "--use_pinned_memory_for_block_swap",
        action="store_true",
        help="page-locked host memory for --blocks_to_swap",
    )
    add(
        "--offload_dit_during_sampling",
        action="store_true",
        help="DiT in host memory while encoders and VAE work (matters with --interactive)",
    )
    add("--disable_numpy_memmap", action="store_true", help="read model files without memory mapping")
    add("--no_weight_check", action="store_true", help="skip the search for non-finite weights while loading")
    add(
        "--magcache",
        action="store_true",
        help="skip blocks by the task's official ratios: faster, less exact",
    )
    add(
        "--magcache_threshold",
        type=float_between(0, 10),
        metavar="X",
        help="largest error that skipping may add up to (default: 0.12)",
    )
    add("--magcache_k", type=positive_int, metavar="N", help="longest run of skipped passes (default: 2)")
    add(
        "--magcache_retention_ratio",
        type=float_between(0, 1),
        metavar="X",
        help="share of steps at the start that are never skipped (default: 0.2)",
    )
    add(
        "--magcache_mag_ratios",
        type=float_between(0, 100),
        nargs="+",
        metavar="X",
        help="own ratios, conditional and unconditional in turn from the second step on",
    )
    add_attention_options(add)
    add("--attn_mode", choices=ATTENTION_WORDS, help="another spelling of the attention options")
    add("--split_attn", action="store_true", help="accepted; changes nothing")
    add("--img_in_txt_in_offloading", action="store_true", help="accepted; changes nothing")
    add("--force_nabla_attention", action="store_true", help="block-sparse attention whatever the task says")
    add("--nabla_method", choices=("topcdf", "topk"), help="how blocks are chosen")
    add("--nabla_P", type=float_between(1e-6, 1e6), metavar="P", help="kept share; with topk also a count")
    for axis in ("wT", "wH", "wW"):
        add(f"--nabla_{axis}", type=positive_int, metavar="N", help="window of always kept blocks")
    add("--nabla_add_sta", action="store_true", default=None, help="always keep the window")
    add("--no_nabla_add_sta", dest="nabla_add_sta", action="store_false", default=None, help="no window")


def _add_lora_options(parser: Parser) -> None:
    group = parser.add_argument_group("LoRA")
    add = group.add_argument
    add(
        "--lora_weight",
        type=Path,
        nargs="+",
        default=[],
        metavar="PATH",
        help="LoRA files of any known layout",
    )
    add(
        "--lora_multiplier",
        type=float_between(-1e3, 1e3),
        nargs="+",
        default=[],
        metavar="X",
        help="strengths in the same order (default: 1.0)",
    )
    add(
        "--lora_mode",
        choices=("merge", "runtime"),
        default="merge",
        help="merge into the weights, or keep beside them (default: %(default)s)",
    )
    add(
        "--include_patterns",
        nargs="+",
        default=[],
        metavar="RE",
        help="use only LoRA keys where one is found",
    )
    add(
        "--exclude_patterns",
        nargs="+",
        default=[],
        metavar="RE",
        help="leave out LoRA keys where one is found",
    )
    add("--lora_allow_partial", action="store_true", help="use a LoRA some of whose keys match nothing")
    add("--no_lora_trigger", action="store_true", help="do not put a LoRA's trigger words before the prompt")
    add(
        "--save_merged_model", type=Path, metavar="PATH", help="write the DiT with the LoRAs merged, and stop"
    )
    add("--lycoris", action="store_true", help="accepted; such files are recognised by themselves")


def _add_encoder_options(parser: Parser) -> None:
    group = parser.add_argument_group("text encoders and VAE")
    add = group.add_argument
    add("--text_encoder_cpu", action="store_true", help="encode prompts on the CPU")
    add_qwen_weight_options(add)
    add(
        "--prompt_templates",
        type=Path,
        metavar="PATH",
        help="read the official prompt templates from this file",
    )
    add("--vae_dtype", choices=DTYPE_CHOICES, help="dtype of the VAE (default: float16, on a CPU float32)")
    add_vae_tiling_options(add, "decode")


def _add_output_options(parser: Parser) -> None:
    group = parser.add_argument_group("output")
    add = group.add_argument
    add("--save_path", dest="output", help=argparse.SUPPRESS)
    add("--output", metavar="PATH", help="a .mp4, a .png (one image) or a folder (named by time)")
    add(
        "--output_type",
        choices=OUTPUT_TYPES,
        default="video",
        help="default: %(default)s; both: video and latent",
    )
    add(
        "--fps",
        type=int_between(1, 1000),
        default=FPS,
        help="frames per second, at most 1000 (default: %(default)s)",
    )
    add(
        "--crf",
        type=int_between(0, 51),
        default=14,
        metavar="N",
        help="constant quality of the video: 0 lossless, 14 default, 51 worst",
    )
    add(
        "--trim_tail_frames",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="leave out the last N frames",
    )
    add("--overwrite", action="store_true", help="replace existing files instead of choosing a new name")
    add("--no_metadata", action="store_true", help="do not store prompt and settings in the files")


def _compile(args: argparse.Namespace, task: Task) -> CompileConfig | None:
    """The compile options; `--compile_args B M D F` is their older spelling in one."""
    if args.compile_args is not None:
        backend, mode, dynamic, fullgraph = args.compile_args
        if dynamic.lower() not in ("true", "false", "auto") or fullgraph.lower() not in ("true", "false"):
            raise ConfigError("--compile_args takes backend, mode, dynamic (true, false, auto) and fullgraph")
        args.compile_backend, args.compile_mode = backend, mode
        args.compile_dynamic, args.compile_fullgraph = dynamic.lower(), fullgraph.lower() == "true"
    return compile_config(args, for_training=False, has_nabla=_nabla(args, task) is not None)
