"""Every option of kandinsky5_train_network.py."""

from __future__ import annotations

import argparse
from pathlib import Path

from kandinsky5.cli.attention_options import add_attention_options
from kandinsky5.cli.common import (
    DTYPE_CHOICES,
    VRAM_BUDGET_RANGE,
    Parser,
    float_between,
    non_negative_int,
    positive_int,
    resolution,
    step_count,
)
from kandinsky5.cli.compile_options import add_accelerate_compile_options, add_compile_options
from kandinsky5.cli.weight_options import add_dit_weight_options, add_qwen_weight_options
from kandinsky5.configs.train import DEFAULT_TRAIN_STEPS, TIMESTEP_SAMPLINGS, WEIGHTING_SCHEMES
from networks.lora_types import DEFAULT_TYPE, NETWORK_MODULES

DESCRIPTION = "Train a LoRA for Kandinsky 5 on cached latents and captions."

ACCEPTED = {
    "no_vae_load": "the VAE is only loaded for samples",
    "guidance_scale": "it belongs to HunyuanVideo; recorded in the metadata",
    "img_in_txt_in_offloading": "it belongs to HunyuanVideo",
    "split_attn": "items of one batch attend to nothing but themselves here",
    "fp8_scaled": "--fp8_base always scales its weights",
    "persistent_data_loader_workers": "threads that read caches live for the whole run",
    "block_swap_h2d_only": "frozen weights only ever travel to the device",
    "keep_cache": "training deletes no caches",
}
"""Options that are taken and change nothing, each with the reason that is logged."""

_positive = float_between(1e-12, 1e12)
_share = float_between(0.0, 1.0)
_any_number = float_between(-1e12, 1e12)


def build_parser() -> argparse.ArgumentParser:
    """The parser with every option; importing nothing heavy."""
    parser = Parser("kandinsky5_train_network.py", DESCRIPTION)
    for add in (
        _add_model,
        _add_conditioning,
        _add_loss,
        _add_data,
        _add_run,
        _add_memory,
        _add_attention_and_compile,
        _add_optimizer,
        _add_network,
        _add_timesteps,
        _add_saving,
        _add_metadata,
        _add_logging,
        _add_samples,
        _add_upload,
    ):
        add(parser)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--task", help="which model: k5-pro-t2v-5s-sd, k5-lite-t2v-5s-sd, ... (required)")
    group.add_argument(
        "--dit", type=Path, help="DiT weights: file, first shard or folder (default: the task's)"
    )
    group.add_argument("--vae", help="VAE, only used for samples")
    group.add_argument("--text_encoder_qwen", help="Qwen2.5-VL folder or model id, only used for samples")
    group.add_argument("--text_encoder_clip", help="CLIP folder or model id, only used for samples")
    group.add_argument(
        "--scheduler_scale", type=_positive, help="shift of the sampling schedule (default: the task's)"
    )
    group.add_argument("--override_dit", help="JSON object of DiT parameters that replace the task's")
    group.add_argument(
        "--dit_dtype", choices=DTYPE_CHOICES, help="compute dtype; wins over --mixed_precision"
    )
    group.add_argument(
        "--mixed_precision",
        choices=("no", "fp16", "bf16"),
        help="bf16, or no for float32 (default: accelerate's bf16, else bf16 on CUDA)",
    )
    group.add_argument("--vae_dtype", choices=DTYPE_CHOICES, help="dtype of the VAE, only used for samples")
    group.add_argument(
        "--base_weights", type=Path, nargs="*", default=[], help="LoRA files merged in before training"
    )
    group.add_argument(
        "--base_weights_multiplier",
        type=_any_number,
        nargs="*",
        default=[],
        help="one strength per file of --base_weights (default: 1.0)",
    )
    group.add_argument(
        "--lora_allow_partial", action="store_true", help="accept LoRA files some of whose keys fit no layer"
    )
    group.add_argument(
        "--no_weight_check",
        action="store_true",
        help="do not search the weights for NaN and Inf while loading",
    )
    group.add_argument(
        "--disable_numpy_memmap", action="store_true", help="read weights without memory mapping"
    )
    group.add_argument("--no_vae_load", action="store_true", help="accepted, no effect")


def _add_conditioning(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("image to video")
    group.add_argument(
        "--i2v_mode",
        choices=("first", "first_last"),
        default="first",
        help="which frames the model is given (default: first; first_last is experimental)",
    )
    group.add_argument(
        "--i2v_conditioning",
        choices=("inference", "channels"),
        default="inference",
        help="clean frames in place of noisy ones, as in generation, or in the condition channels",
    )
    group.add_argument(
        "--visual_cond_prob",
        type=_share,
        default=1.0,
        help="chance per clip of being conditioned (default: 1.0)",
    )


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is learned")
    group.add_argument(
        "--caption_dropout_rate",
        type=_share,
        default=0.0,
        help="chance that a clip is trained with the empty caption; a dataset's own rate wins (default: 0)",
    )
    group.add_argument("--masked_loss", action="store_true", help="count only what the clips' masks show")
    group.add_argument(
        "--mask_min_weight",
        type=_share,
        default=0.0,
        help="what black parts of a mask count all the same, 0 to 1 (default: 0)",
    )
    group.add_argument(
        "--prior_loss_weight",
        type=float_between(0.0, 1e12),
        default=0.0,
        help="hold the LoRA to the base model on other captions, with this weight (default: 0, off)",
    )


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument("--config_file", help="TOML file with options of this script; the command line wins")
    group.add_argument("--dataset_config", type=Path, help="dataset file (required)")
    group.add_argument(
        "--validation_dataset_config",
        type=Path,
        help="dataset whose loss is measured on fixed noise, with and without the LoRA",
    )
    group.add_argument(
        "--validation_split",
        type=float_between(0.001, 0.999),
        metavar="SHARE",
        help="measure this share of the source files and do not train on it",
    )
    group.add_argument(
        "--validate_every_n_steps", type=positive_int, help="measure during training as well as at the end"
    )
    group.add_argument(
        "--validate_every_n_epochs", type=positive_int, help="measure during training as well as at the end"
    )
    group.add_argument(
        "--max_data_loader_n_workers",
        type=non_negative_int,
        default=8,
        help="threads that read caches ahead (default: 8, at most the CPU count); 0: none",
    )
    group.add_argument(
        "--persistent_data_loader_workers",
        action="store_true",
        help="accepted: threads that read caches always live for the whole run",
    )
    group.add_argument("--strict", action="store_true", help="any skipped item is an error")
    group.add_argument("--allow_missing", action="store_true", help="train although some items have no cache")
    group.add_argument(
        "--allow_upstream_text_cache",
        action="store_true",
        help="use text caches of musubi-tuner for videos although their template is the wrong one",
    )
    group.add_argument(
        "--allow_changed_data",
        action="store_true",
        help="resume although dataset, seed or batch settings differ; the run is then not exact",
    )
    group.add_argument("--keep_cache", action="store_true", help="accepted, no effect")


def _add_run(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("run")
    group.add_argument(
        "--max_train_steps",
        type=positive_int,
        help=f"optimizer steps (default: {DEFAULT_TRAIN_STEPS}, or with --resume those of the first run)",
    )
    group.add_argument("--max_train_epochs", type=positive_int, help="epochs; wins over --max_train_steps")
    group.add_argument(
        "--gradient_accumulation_steps",
        type=positive_int,
        default=1,
        help="batches per optimizer step (default: 1); the last step of an epoch may have fewer",
    )
    group.add_argument("--seed", type=non_negative_int, help="start of all random draws (default: random)")
    group.add_argument(
        "--on_nan",
        choices=("stop", "skip"),
        default="stop",
        help="what a loss or gradient that is not finite does; skip stops after 10 in a row",
    )
    group.add_argument(
        "--resume", metavar="DIR|auto", help="state folder to continue from; auto: the newest whole one"
    )
    group.add_argument(
        "--ddp_timeout", type=_positive, help="several processes: minutes to wait for each other"
    )
    group.add_argument(
        "--ddp_gradient_as_bucket_view",
        action="store_true",
        help="several processes: save a copy of the gradients",
    )
    group.add_argument(
        "--ddp_static_graph", action="store_true", help="several processes: every step uses all of the LoRA"
    )
    group.add_argument(
        "--guidance_scale", type=_any_number, default=1.0, help="accepted, goes to the metadata"
    )
    group.add_argument(
        "--dry_run",
        action="store_true",
        help="check everything, print what memory and work each bucket needs, end",
    )
    group.add_argument(
        "--no_probe",
        action="store_true",
        help="on a GPU: do not try the largest batch before the first step",
    )


def _add_memory(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("memory")
    group.add_argument(
        "--gradient_checkpointing", action="store_true", help="recompute blocks in the backward pass"
    )
    group.add_argument(
        "--gradient_checkpointing_cpu_offload", action="store_true", help="keep block inputs in host memory"
    )
    group.add_argument(
        "--gradient_checkpointing_keep_attention",
        type=non_negative_int,
        default=0,
        metavar="N",
        help="visual blocks that keep their attention outputs instead of computing them again",
    )
    add_dit_weight_options(group.add_argument, "accepted beside --fp8_base, same meaning")
    group.add_argument(
        "--blocks_to_swap", type=non_negative_int, default=0, help="blocks whose weights stay in host memory"
    )
    group.add_argument(
        "--use_pinned_memory_for_block_swap", action="store_true", help="page-locked host copies"
    )
    group.add_argument("--block_swap_h2d_only", action="store_true", help="accepted: always so")
    group.add_argument(
        "--block_swap_ring_size",
        type=positive_int,
        default=2,
        help="device buffers for swapped blocks (default: 2)",
    )
    group.add_argument(
        "--vram_budget",
        type=float_between(*VRAM_BUDGET_RANGE),
        metavar="GB",
        help="add the cheapest of these options that make the largest batch fit into so much device memory",
    )
    group.add_argument("--img_in_txt_in_offloading", action="store_true", help="accepted, no effect")
    group.add_argument(
        "--offload_dit_during_sampling",
        action="store_true",
        help="DiT to host memory while the VAE decodes samples",
    )


def _add_attention_and_compile(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("attention")
    add_attention_options(group.add_argument)
    group.add_argument("--split_attn", action="store_true", help="accepted, no effect")
    group = parser.add_argument_group(
        "NABLA, block-sparse attention",
        "Training with it has been tested on CPUs; it has not been run on a GPU yet.",
    )
    group.add_argument("--force_nabla_attention", action="store_true", help="NABLA whatever the task says")
    group.add_argument("--nabla_method", choices=("topcdf", "topk"), help="block selection (default: topcdf)")
    group.add_argument(
        "--nabla_P", type=_positive, help="threshold; topk: a ratio below 1, else a count (default: 0.9)"
    )
    for name, size in (("wT", 11), ("wH", 3), ("wW", 3)):
        group.add_argument(f"--nabla_{name}", type=positive_int, help=f"window in blocks (default: {size})")
    group.add_argument(
        "--nabla_add_sta", action="store_const", const=True, help="add the sliding window (default)"
    )
    group.add_argument(
        "--no_nabla_add_sta",
        dest="nabla_add_sta",
        action="store_const",
        const=False,
        help="leave the sliding window out",
    )
    add_compile_options(parser)
    add_accelerate_compile_options(parser)
    group = parser.add_argument_group("CUDA arithmetic")
    group.add_argument("--cuda_allow_tf32", action="store_true", help="TF32 in float32 products")
    group.add_argument("--cuda_cudnn_benchmark", action="store_true", help="let cuDNN time its algorithms")


def _add_optimizer(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("optimizer and learning rate")
    group.add_argument(
        "--optimizer_type",
        default="AdamW",
        help="AdamW, AdamW8bit, AdaFactor, a class of torch.optim or package.module.Class (default: AdamW)",
    )
    group.add_argument(
        "--optimizer_args",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help='arguments of the optimizer, such as "betas=(0.9,0.95)"',
    )
    group.add_argument("--learning_rate", type=_positive, default=2e-6, help="(default: 2e-6; 1e-4 is usual)")
    group.add_argument(
        "--max_grad_norm", type=float_between(0.0, 1e12), default=1.0, help="0: no clipping (default: 1.0)"
    )
    group.add_argument(
        "--lr_scheduler",
        default="constant",
        help="constant, constant_with_warmup, linear, cosine, cosine_with_restarts, polynomial, "
        "inverse_sqrt, cosine_with_min_lr, warmup_stable_decay, piecewise_constant, adafactor, rex "
        "(default: constant)",
    )
    group.add_argument(
        "--lr_warmup_steps",
        type=step_count,
        default=0,
        help="steps, or a share such as 0.1 or 10%% (default: 0)",
    )
    group.add_argument(
        "--lr_decay_steps",
        type=step_count,
        default=0,
        help="warmup_stable_decay: length of the fall, same form",
    )
    group.add_argument("--lr_scheduler_num_cycles", type=positive_int, default=1, help="(default: 1)")
    group.add_argument("--lr_scheduler_power", type=_positive, default=1.0, help="polynomial (default: 1)")
    group.add_argument(
        "--lr_scheduler_timescale", type=positive_int, help="inverse_sqrt (default: the warm-up)"
    )
    group.add_argument(
        "--lr_scheduler_min_lr_ratio", type=_share, help="lowest rate as a share of the learning rate"
    )
    group.add_argument(
        "--lr_scheduler_type",
        default="",
        help="class of torch.optim.lr_scheduler or package.module.Class; wins",
    )
    group.add_argument(
        "--lr_scheduler_args", nargs="*", default=[], metavar="NAME=VALUE", help="arguments of the schedule"
    )


def _add_network(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("LoRA")
    group.add_argument(
        "--network_module",
        default=DEFAULT_TYPE.network_module,
        help=f"kind of adapter: {', '.join(NETWORK_MODULES)} (default: {DEFAULT_TYPE.network_module})",
    )
    group.add_argument("--network_dim", type=positive_int, default=4, help="rank (default: 4; 32 is usual)")
    group.add_argument(
        "--network_alpha",
        type=float_between(0.0, 1e6),
        default=1.0,
        help="the change is scaled by alpha / rank; 0: alpha = rank (default: 1)",
    )
    group.add_argument(
        "--network_dropout", type=float_between(0.0, 0.999), help="of the rank-sized activations"
    )
    group.add_argument(
        "--network_args",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help="rank_dropout, module_dropout, loraplus_lr_ratio, exclude_patterns, include_patterns, verbose; "
        "LoKr: factor",
    )
    group.add_argument("--network_weights", type=Path, help="start from this LoRA, any format")
    group.add_argument(
        "--dim_from_weights", action="store_true", help="ranks and alphas from --network_weights"
    )
    group.add_argument(
        "--scale_weight_norms", type=_positive, help="limit of the norm of every layer's change"
    )
    group.add_argument(
        "--ema_decay",
        type=_share,
        metavar="D",
        help="save a moving average of the LoRA too: the share of it that stays at every step, such as 0.99",
    )


def _add_timesteps(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("timesteps and loss")
    group.add_argument(
        "--timestep_sampling",
        choices=TIMESTEP_SAMPLINGS,
        default="sigma",
        help="(default: sigma; shift is usual)",
    )
    group.add_argument(
        "--discrete_flow_shift", type=_positive, default=1.0, help="shift mode (default: 1.0; 5.0 is usual)"
    )
    group.add_argument(
        "--sigmoid_scale", type=_positive, default=1.0, help="spread of the logistic modes (default: 1.0)"
    )
    group.add_argument("--min_timestep", type=float_between(0, 1000), default=0.0, help="(default: 0)")
    group.add_argument("--max_timestep", type=float_between(0, 1000), default=1000.0, help="(default: 1000)")
    group.add_argument(
        "--preserve_distribution_shape",
        action="store_true",
        help="redraw what falls outside min..max instead of squeezing the distribution",
    )
    group.add_argument(
        "--num_timestep_buckets", type=int, help="spread each epoch's draws evenly over this many parts"
    )
    group.add_argument(
        "--weighting_scheme", choices=WEIGHTING_SCHEMES, default="none", help="(default: none)"
    )
    group.add_argument(
        "--logit_mean", type=_any_number, default=0.0, help="logit_normal and logsnr (default: 0.0)"
    )
    group.add_argument(
        "--logit_std", type=_positive, default=1.0, help="logit_normal and logsnr (default: 1.0)"
    )
    group.add_argument(
        "--mode_scale", type=_any_number, default=1.29, help="weighting_scheme mode (default: 1.29)"
    )
    group.add_argument("--show_timesteps", choices=("image", "console"), help="show 100 000 draws and end")


def _add_saving(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("saving and resuming")
    group.add_argument("--output_dir", type=Path, help="folder of the results (required)")
    group.add_argument("--output_name", help="name of the LoRA (required)")
    group.add_argument(
        "--output_dir_fallback",
        type=Path,
        help="folder on another disk that LoRA and state go to if --output_dir fills up during the run",
    )
    group.add_argument("--overwrite", action="store_true", help="replace results of the same --output_name")
    group.add_argument(
        "--save_precision", choices=("float", "fp32", "fp16", "bf16"), default="bf16", help="(default: bf16)"
    )
    group.add_argument(
        "--lora_format",
        choices=("diffusers", "kohya"),
        default="diffusers",
        help="layout of the file (default: diffusers, read by diffusers, ComfyUI and the official code)",
    )
    group.add_argument("--save_state", action="store_true", help="with every LoRA, also what --resume needs")
    group.add_argument("--save_state_on_train_end", action="store_true", help="state at the end of the run")
    for unit, word in (("epochs", "epoch"), ("steps", "step")):
        group.add_argument(f"--save_every_n_{unit}", type=positive_int, help=f"save every n-th {word}")
        group.add_argument(
            f"--save_last_n_{unit}", type=positive_int, help=f"delete LoRAs older than n {unit}"
        )
        group.add_argument(
            f"--save_last_n_{unit}_state",
            type=positive_int,
            help=f"the same for states (default: --save_last_n_{unit})",
        )


def _add_metadata(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("metadata of the LoRA file")
    group.add_argument(
        "--no_metadata",
        action="store_true",
        help="only what is needed to use the file, and the name of the run",
    )
    group.add_argument("--training_comment", help="free text")
    for name in ("title", "author", "description", "license", "tags"):
        group.add_argument(f"--metadata_{name}", help=f"modelspec.{name}")
    group.add_argument(
        "--metadata_reso",
        type=resolution,
        help='modelspec.resolution as "width,height" (default: the dataset\'s)',
    )
    group.add_argument("--metadata_arch", help="architecture word before /lora (default: Kandinsky-5)")


def _add_logging(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("logging")
    group.add_argument("--logging_dir", type=Path, help="folder for TensorBoard curves and wandb's files")
    group.add_argument(
        "--log_with",
        choices=("tensorboard", "wandb", "all"),
        help="where curves and samples are shown (default: tensorboard with --logging_dir)",
    )
    group.add_argument("--log_prefix", default="", help="start of the name of the run's folder")
    group.add_argument(
        "--log_tracker_name", default="network_train", help="wandb project (default: network_train)"
    )
    group.add_argument("--wandb_run_name", help="name of the run (default: the output name)")
    group.add_argument("--wandb_api_key", help="key for wandb; kept nowhere (default: as logged in)")
    group.add_argument(
        "--log_tracker_config", type=Path, help="TOML file with arguments under [wandb] and [tensorboard]"
    )
    group.add_argument("--log_config", action="store_true", help="log the options, without paths and keys")


def _add_samples(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("samples during training")
    group.add_argument("--sample_prompts", type=Path, help="file of prompts: .txt, .toml or .json")
    group.add_argument("--sample_every_n_steps", type=positive_int, help="sample after every n-th step")
    group.add_argument("--sample_every_n_epochs", type=positive_int, help="sample after every n-th epoch")
    group.add_argument("--sample_at_first", action="store_true", help="sample before the first step too")
    add_qwen_weight_options(group.add_argument, ", only used for samples")


def _add_upload(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("Hugging Face hub")
    add = group.add_argument
    add("--huggingface_repo_id", metavar="USER/REPO", help="upload every saved LoRA there; made if missing")
    add(
        "--huggingface_repo_type",
        choices=("model", "dataset", "space"),
        default="model",
        help="(default: model)",
    )
    add("--huggingface_path_in_repo", default="", metavar="FOLDER", help="folder in the repository")
    add("--huggingface_token", metavar="TOKEN", help="(default: the one that `hf auth login` stored)")
    add(
        "--huggingface_repo_visibility",
        choices=("public", "private"),
        default="private",
        help="of a repository that is made (default: private)",
    )
    add("--save_state_to_huggingface", action="store_true", help="upload states too")
    add(
        "--resume_from_huggingface",
        action="store_true",
        help="--resume names a state on the hub: USER/REPO/PATH[:REVISION[:TYPE]]",
    )
    add("--async_upload", action="store_true", help="upload beside the training")
