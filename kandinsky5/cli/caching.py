"""The command lines of the two cache scripts: argv -> one checked config. The Namespaces end here."""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from dataset.geometry import NABLA_STEP
from kandinsky5.cli.common import DTYPE_CHOICES, Parser, existing_file, positive_int
from kandinsky5.cli.vae_options import add_vae_tiling_options, tile_px
from kandinsky5.cli.weight_options import add_qwen_weight_options
from kandinsky5.configs.caching import (
    CacheLatentsConfig,
    CacheRunConfig,
    CacheTextConfig,
    DebugConfig,
)
from kandinsky5.configs.text_encoders import qwen_quantization
from modules.errors import ConfigError
from modules.logs import get_logger

log = get_logger(__name__)


def parse_cache_latents(argv: Sequence[str] | None = None) -> CacheLatentsConfig:
    """Read the command line of `kandinsky5_cache_latents.py`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = Parser("kandinsky5_cache_latents.py", "Encode the images and videos of a dataset for training.")
    _add_shared(parser)
    _add_latent_options(parser)
    args = parser.parse_args(argv)
    problems = _shared_problems(args)
    if args.debug_mode is None and args.vae is None:
        problems.append("--vae is required (unless --debug_mode is given)")
    if args.vae is not None and not args.vae.exists():
        problems.append(f"--vae {args.vae}: no such file or folder")
    if args.debug_mode == "image":
        problems.append(
            "--debug_mode image opens windows, which is not supported; --debug_mode video writes files to "
            "look at, --debug_mode console prints characters"
        )
    _raise(problems)
    _log_without_effect(args)
    return CacheLatentsConfig(
        run=_run_config(args),
        vae=args.vae,
        vae_dtype=args.vae_dtype,
        nabla_resize=args.nabla_resize,
        tile_px=tile_px(args),
        disable_cudnn_backend=args.disable_cudnn_backend,
        debug=_debug_config(args),
    )


def parse_cache_text(argv: Sequence[str] | None = None) -> CacheTextConfig:
    """Read the command line of `kandinsky5_cache_text_encoder_outputs.py`.

    Raises:
        ConfigError: everything that is wrong with the options, listed together.
    """
    parser = Parser(
        "kandinsky5_cache_text_encoder_outputs.py", "Encode the captions of a dataset for training."
    )
    _add_shared(parser)
    _add_text_options(parser)
    args = parser.parse_args(argv)
    problems = _shared_problems(args)
    if args.prompt_templates is not None:
        problems.append(existing_file(args.prompt_templates, "--prompt_templates"))
    _raise(problems)
    if args.num_workers is not None:
        log.info("--num_workers has no effect here: captions are read before anything is encoded")
    return CacheTextConfig(
        run=_run_config(args),
        text_encoder_qwen=args.text_encoder_qwen,
        text_encoder_clip=args.text_encoder_clip,
        qwen_max_length=args.qwen_max_length,
        clip_max_length=args.clip_max_length,
        quantization=qwen_quantization(fp8_llm=args.fp8_llm, quantized_qwen=args.quantized_qwen),
        prompt_templates=args.prompt_templates,
    )


def _add_shared(parser: Parser) -> None:
    add = parser.add_argument
    add("--dataset_config", type=Path, required=True, metavar="PATH", help="dataset file, .toml or .json")
    add("--batch_size", type=positive_int, help="items per encoder call (default: the dataset's batch_size)")
    add("--num_workers", type=positive_int, help="decoding threads (default: CPU count - 1)")
    add("--device", help="where to compute (default: cuda if there is one, else cpu)")
    add("--skip_existing", action="store_true", help="encode only what has no cache that still fits")
    add("--prune", action="store_true", help="delete caches that no dataset file uses any more")
    add("--keep_cache", action="store_true", help="keep such caches; accepted, because that is the default")
    add("--strict", action="store_true", help="any item that cannot be used is an error")
    add("--skip_bad", action="store_true", help="leave damaged items out without an error at the end")
    add(
        "--confine_paths",
        action="store_true",
        help="refuse folders, files and links that lead out of the dataset file's folder",
    )


def _add_latent_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--vae", type=Path, metavar="PATH", help="HunyuanVideo's VAE: a file or a diffusers folder")
    add("--vae_dtype", choices=DTYPE_CHOICES, help="dtype of the VAE (default: float16, on a CPU float32)")
    add(
        "--nabla_resize",
        action="store_true",
        help=f"round sizes up to multiples of {NABLA_STEP} pixels, as tasks with NABLA attention need them",
    )
    add_vae_tiling_options(add, "encode")
    add("--disable_cudnn_backend", action="store_true", help="compute convolutions without cuDNN")
    add("--debug_mode", choices=("image", "console", "video"), help="show what would be encoded, then stop")
    add("--console_width", type=positive_int, default=80, help="characters per line of --debug_mode console")
    add("--console_back", metavar="COLOR", help="accepted; characters are printed without colours")
    add(
        "--console_num_images", type=positive_int, metavar="N", help="show N items per dataset without asking"
    )


def _add_text_options(parser: Parser) -> None:
    add = parser.add_argument
    add("--text_encoder_qwen", required=True, metavar="PATH", help="Qwen2.5-VL-7B-Instruct: folder or hub id")
    add("--text_encoder_clip", required=True, metavar="PATH", help="CLIP ViT-L/14: folder or hub id")
    add(
        "--qwen_max_length",
        type=positive_int,
        default=256,
        help="tokens kept after the prompt template; training refuses captions that generation, with 256, "
        "would cut elsewhere (default: 256)",
    )
    add("--clip_max_length", type=positive_int, default=77, help="CLIP's tokens (default: 77)")
    add_qwen_weight_options(add)
    add(
        "--prompt_templates",
        type=Path,
        metavar="PATH",
        help="read the official prompt templates from this file instead of the installed diffusers",
    )


def _shared_problems(args: argparse.Namespace) -> list[str | None]:
    problems = [existing_file(args.dataset_config, "--dataset_config")]
    if args.keep_cache and args.prune:
        problems.append("--keep_cache and --prune contradict each other: give one of them")
    return problems


def _raise(problems: Sequence[str | None]) -> None:
    found = [problem for problem in problems if problem is not None]
    if found:
        raise ConfigError(found)


def _run_config(args: argparse.Namespace) -> CacheRunConfig:
    return CacheRunConfig(
        dataset_config=args.dataset_config,
        batch_size=args.batch_size,
        num_workers=args.num_workers or max(1, (os.cpu_count() or 2) - 1),
        device=args.device,
        skip_existing=args.skip_existing,
        prune=args.prune,
        strict=args.strict,
        skip_bad=args.skip_bad,
        confine_paths=args.confine_paths,
    )


def _debug_config(args: argparse.Namespace) -> DebugConfig | None:
    if args.debug_mode is None:
        return None
    return DebugConfig(
        mode=args.debug_mode,
        console_width=args.console_width,
        console_num_images=args.console_num_images,
    )


def _log_without_effect(args: argparse.Namespace) -> None:
    if args.vae_chunk_size is not None:
        log.info(
            "--vae_chunk_size has no effect: the VAE always works in windows of 17 frames, as officially"
        )
    if args.console_back is not None:
        log.info("--console_back has no effect: characters are printed without colours")
