"""Checks of a training run that need no model."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from dataset.cache.cached_dataset import CachedDataset
from dataset.config.config import DatasetConfig
from dataset.geometry import HD_LATENT_AREA, NABLA_STEP, pixel_frame_count, pixel_size
from kandinsky5.configs.train import ModelConfig, OptimizerConfig, TrainConfig
from kandinsky5.model.checkpoints import check_dit_file, file_name_warning
from kandinsky5.model.compilation import check_compile_backend
from kandinsky5.model.offload import max_blocks_to_swap
from kandinsky5.tasks import TASKS, Task, distilled_task, undistilled_tasks
from kandinsky5.training.results.names import ResultNames
from kandinsky5.training.results.ownership import delete_result, find_results, maker
from kandinsky5.training.results.state import list_states
from kandinsky5.training.samples import sample_model_problems
from kandinsky5.training.tracking.trackers import check_trackers
from modules.attention_backends import check_attention_backend
from modules.errors import ConfigError, ModelFileError
from modules.files import check_folder_unwritten, make_writable_folder
from modules.locks import sole_user
from modules.logs import get_logger
from modules.lr_schedules import SCHEDULE_NAMES
from modules.messages import counted
from modules.optimizer_kinds import is_schedule_free, takes_relative_steps
from networks.lora_types import parse_network_args

log = get_logger(__name__)


def check_files(config: TrainConfig) -> None:
    """Check the model files' headers and the settings that require no data.

    Raises:
        ModelFileError, ConfigError, ResourceError: each with a remedy.
    """
    check_memory_options(config.model)
    problems = _model_file_problems(config)
    if problems:
        raise ModelFileError(problems)
    warning = file_name_warning(config.model.dit, is_i2v=config.model.task.is_i2v)
    if warning is not None:
        log.warning("%s", warning)
    check_schedule_name(config.optimizer)
    if config.network.ema_decay is not None and is_schedule_free(config.optimizer.optimizer_type):
        raise ConfigError(
            f"--ema_decay: {config.optimizer.optimizer_type} saves an average of its weights already"
        )
    parse_network_args(config.network.network_args, network_module=config.network.network_module)
    check_trackers(config.tracking)


def _model_file_problems(config: TrainConfig) -> list[str]:
    """Problems in the headers of all models, and missing files."""
    model, problems = config.model, []
    try:
        check_dit_file(model.dit, model.dit_params)
    except ModelFileError as error:
        problems += error.problems
    if config.samples.sample_prompts is not None:
        problems += sample_model_problems(config)
    return problems


def check_memory_options(model: ModelConfig) -> None:
    """Check what depends on the model's size and on installed packages.

    Raises:
        ConfigError, ResourceError: more than the model has, or a missing package.
    """
    params = model.dit_params
    limits = (
        ("blocks_to_swap", model.blocks_to_swap, max_blocks_to_swap(params)),
        (
            "gradient_checkpointing_keep_attention",
            model.gradient_checkpointing_keep_attention,
            params.num_visual_blocks,
        ),
    )
    problems = [
        f"--{name} {given}: at most {most} for {model.task.name}"
        for name, given, most in limits
        if given > most
    ]
    if problems:
        raise ConfigError(problems)
    check_attention_backend(model.attention, for_training=True)
    check_compile_backend(model.compile)


def check_schedule_name(config: OptimizerConfig) -> None:
    """Check the name alone; `dry_build` builds the schedule.

    Raises:
        ConfigError: unknown, or not for this optimizer.
    """
    if config.lr_scheduler not in (*SCHEDULE_NAMES, "adafactor"):
        raise ConfigError(
            f"--lr_scheduler {config.lr_scheduler}: use one of {', '.join(SCHEDULE_NAMES)}, adafactor"
        )
    sets_own_rate = takes_relative_steps(config.optimizer_type, config.optimizer_args)
    if config.lr_scheduler == "adafactor" and not sets_own_rate:
        raise ConfigError("--lr_scheduler adafactor needs --optimizer_type AdaFactor with relative steps")


def check_output(config: TrainConfig, *, is_resuming: bool) -> tuple[Path, ...]:
    """Check the output folder for results of the same name, without writing.

    Raises:
        ConfigError: such results exist, and there is neither a state to resume nor `--overwrite`; other files
            block the name, or both folders are the same.
    """
    saving = config.saving
    fallback = saving.output_dir_fallback
    if fallback is not None and os.path.realpath(fallback) == os.path.realpath(saving.output_dir):
        raise ConfigError("--output_dir_fallback is --output_dir itself; choose a folder on another disk")
    names = ResultNames(saving.output_dir, saving.output_name)
    found = find_results(names, with_average=config.network.ema_decay is not None)
    if found.foreign:
        first = found.foreign[0]
        owner = maker(first)
        whose = "has no metadata of its run" if owner is None else f"is of the run {owner}"
        raise ConfigError(
            f"--output_dir {saving.output_dir}: {first.name} {whose}, and a run named "
            f"{saving.output_name} may want that name. Choose another --output_name or --output_dir, "
            "or move that file away."
        )
    existing = found.own
    if existing and not is_resuming and not saving.overwrite:
        newest = [path for path in existing if path.is_file()][-1:]
        if list_states(saving.output_dir, saving.output_name):
            others = "continue with --resume auto"
        elif newest:
            others = f"train on from the last LoRA with --network_weights {newest[0]} under another name"
        else:
            others = "move them away"
        what = (
            "none of them a state to resume" if config.run.resume is not None else f"first {existing[0].name}"
        )
        raise ConfigError(
            f"--output_dir {saving.output_dir} holds {counted(len(existing), 'result')} named "
            f"{saving.output_name}, {what}. Choose another --output_name, {others}, "
            "or replace them with --overwrite."
        )
    return existing


def check_output_unwritten(config: TrainConfig, *, is_resuming: bool) -> None:
    """The checks of `prepare_output` that are possible without writing.

    Raises:
        ConfigError: see `check_output`.
        ResourceError: a folder, or the one it would be made in, is no folder or cannot be written.
    """
    saving = config.saving
    check_output(config, is_resuming=is_resuming)
    folders = {"--output_dir": saving.output_dir, "--output_dir_fallback": saving.output_dir_fallback}
    for option, folder in folders.items():
        if folder is not None:
            check_folder_unwritten(folder, option)


def prepare_output(config: TrainConfig, held: ExitStack, *, is_resuming: bool) -> None:
    """Create the output folder, check that it is writable, and lock its output name.

    Args:
        held: takes the lock on the output name.
    Raises:
        ConfigError: see `check_output`.
        ResourceError: the folder cannot be made or written, or another run of this name is active.
    """
    saving = config.saving
    names = ResultNames(saving.output_dir, saving.output_name)
    check_output(config, is_resuming=is_resuming)
    make_writable_folder(saving.output_dir, "--output_dir")
    if saving.output_dir_fallback is not None:
        make_writable_folder(saving.output_dir_fallback, "--output_dir_fallback")
    held.enter_context(sole_user(names.lock, f"{names.final_lora} is being made"))


def remove_replaced(config: TrainConfig, *, is_resuming: bool) -> None:
    """Delete the results that `--overwrite` replaces; call after all other checks.

    Raises:
        ConfigError: see `check_output`.
    """
    saving = config.saving
    existing = check_output(config, is_resuming=is_resuming)
    if not existing or is_resuming:
        return
    log.info("--overwrite: removing %d results of earlier runs named %s", len(existing), saving.output_name)
    for path in existing:
        delete_result(path, saving.output_name)
    names = ResultNames(saving.output_dir, saving.output_name)
    for picture in (names.validation_plot, names.report):
        picture.unlink(missing_ok=True)


def check_sizes(config: TrainConfig, data: CachedDataset) -> None:
    """Check that the model can be trained on the sizes of the caches; warns where another task fits better.

    Raises:
        ConfigError: a bucket that block-sparse attention or first-and-last conditioning cannot take.
    """
    shapes = sorted({item.shape for item in data.items})
    problems = _text_width_problems(config, data)
    for frames, height, width in shapes:
        where = "{}x{} pixels, {} frames".format(*pixel_size(height, width), pixel_frame_count(frames))
        if config.model.nabla is not None and any(side % NABLA_STEP for side in pixel_size(height, width)):
            problems.append(
                f"caches of {where}: NABLA needs sides divisible by {NABLA_STEP} pixels. "
                "Cache the latents again:\n"
                f"  python kandinsky5_cache_latents.py --dataset_config {data.config.path} "
                "--vae <path> --nabla_resize"
            )
        is_i2v_clip = config.model.task.is_i2v and config.conditioning.i2v_conditioning == "inference"
        if is_i2v_clip and config.conditioning.i2v_mode == "first_last" and frames == 2:
            problems.append(
                f"caches of {where}: with --i2v_mode first_last no frame is left to predict; use 9 or more"
            )
    if problems:
        raise ConfigError(problems)
    _hint_at_other_scale(config.model.task, ((height, width) for _, height, width in shapes))


def _text_width_problems(config: TrainConfig, data: CachedDataset) -> list[str]:
    params = config.model.dit_params
    required = (params.in_text_dim, params.in_text_dim2)
    if data.text_dims == required:
        return []
    return [
        f"the text caches are {data.text_dims[0]} and {data.text_dims[1]} wide, the model takes "
        f"{required[0]} and {required[1]}: made with other encoders than those of {config.model.task.name}"
    ]


def _hint_at_other_scale(task: Task, sizes: Iterable[tuple[int, int]]) -> None:
    """The rotary scale follows the task; sizes of the other regime fit another task better."""
    is_hd = task.resolution >= 1024
    wrong = sorted({size for size in sizes if (size[0] * size[1] >= HD_LATENT_AREA) != is_hd})
    if not wrong or task.is_tiny:
        return
    height, width = wrong[0]
    other = task.name.removesuffix("-hd").removesuffix("-sd") + ("-sd" if is_hd else "-hd")
    fitting = f"--task {other} fits them" if other in TASKS else "no task of this model fits them"
    log.warning(
        "%d of the sizes, such as %dx%d pixels, belong to the other rotary scale: %s",
        len(wrong), *pixel_size(height, width), fitting,
    )  # fmt: skip


def log_notes(config: TrainConfig, num_processes: int, device: torch.device) -> None:
    """Log the options that have no effect beside the others, and on this machine."""
    for note in (*config.notes, *machine_notes(config, num_processes, device)):
        log.info("%s", note)
    warning = distillation_warning(config.model)
    if warning is not None:
        log.warning("%s", warning)


def distillation_warning(model: ModelConfig) -> str | None:
    """A warning of training on a distilled checkpoint; None for others.

    Source: found with another flow model, https://huggingface.co/ostris/zimage_turbo_training_adapter
    """
    distilled = distilled_task(model.task, model.dit)
    if distilled is None:
        return None
    others = undistilled_tasks(distilled)
    is_fast = any(distilled.steps < other.steps for other in others)
    built_in = f"guidance and sampling in {distilled.steps} steps are" if is_fast else "guidance is"
    tasks = " or ".join(f"--task {other.name}" for other in others)
    return (
        f"{model.dit.name}: {built_in} built into this checkpoint by distillation; others found that "
        f"training with the plain objective undoes it. Train with {tasks} and its checkpoint, and use the "
        "LoRA with this one: the layers are the same"
    )


def machine_notes(config: TrainConfig, num_processes: int, device: torch.device) -> Iterator[str]:
    """One line for each option that requires several processes or CUDA, where there are none."""
    run, model = config.run, config.model
    if num_processes == 1:
        yield from _without_effect(
            "there is one process; start several with accelerate launch --num_processes N",
            ddp_timeout=run.ddp_timeout is not None,
            ddp_gradient_as_bucket_view=run.ddp_gradient_as_bucket_view,
            ddp_static_graph=run.ddp_static_graph,
        )
    if device.type != "cuda":
        yield from _without_effect(
            f"the run computes on {device.type}; it belongs to CUDA",
            cuda_allow_tf32=model.cuda_allow_tf32,
            cuda_cudnn_benchmark=model.cuda_cudnn_benchmark,
            no_probe=run.no_probe,
            use_pinned_memory_for_block_swap=(
                model.use_pinned_memory_for_block_swap and model.blocks_to_swap > 0
            ),
        )


def _without_effect(why: str, **is_given: bool) -> Iterator[str]:
    yield from (f"--{name} has no effect: {why}" for name, given in is_given.items() if given)


def describe_model(model: ModelConfig) -> str:
    """One line on the model and its adapters."""
    attention = f"dense attention ({model.attention})" if model.nabla is None else model.nabla.describe()
    held = f"in {model.stored_as}" if model.is_quantised else "as they are"
    return f"{model.task.name}: {model.dit.name}, {attention}, weights {held}"


def log_datasets(datasets: DatasetConfig, data: CachedDataset) -> None:
    """Log the settings of the datasets and the items in use."""
    for note in (*datasets.notes, *data.notes):
        log.info("%s", note)
    log.info("datasets\n%s\n%s", datasets.describe(), data.summary_table())
