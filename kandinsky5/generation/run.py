"""The generation script: all checks first, then the stages, each with its model loaded once and freed."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky5.configs.generate import GenerateConfig
from kandinsky5.generation.decode_latents import decode_saved_latents
from kandinsky5.generation.interactive import run_interactive
from kandinsky5.generation.models import (
    read_loras,
)
from kandinsky5.generation.outputs import OutputNames
from kandinsky5.generation.session import GenerationSession
from kandinsky5.model.checkpoints import save_merged_model
from kandinsky5.prompts import read_prompt_file
from kandinsky5.sampling.requests import VideoRequest
from modules.devices import pick_device
from modules.errors import ConfigError, DataError
from modules.files import check_free_space
from modules.logs import get_logger, print_report

log = get_logger(__name__)


def generate(config: GenerateConfig) -> None:
    """Run the generation script with a checked config.

    Raises:
        UserError: anything the user can fix; nothing half-written is left.
    """
    device = pick_device(config.device)
    if config.latent_path is not None:
        decode_saved_latents(config, config.latent_path, device)
        return
    if config.lora.save_merged_model is not None:
        save_merged_model(
            config.models.dit,
            config.task.dit_params,
            read_loras(config),
            config.lora.save_merged_model,
            device=device,
        )
        log.info("wrote %s", config.lora.save_merged_model)
        return
    makes_many = config.from_file is not None or config.interactive
    names = OutputNames(config.output, makes_many=makes_many, is_dry=config.dry_run)
    session = GenerationSession(config, device, names)
    if config.interactive:
        run_interactive(session)
        return
    requests, problems = collect_requests(session)
    session.fit_budget(requests)
    if config.dry_run:
        print_report(session.plan_report(requests))
    else:
        check_free_space(names.folder, _bytes_needed(requests))
        session.make(requests)
    if problems:
        total = len(requests) + len(problems)
        done = "planned" if config.dry_run else "made"
        raise DataError([f"{len(requests)} of {total} prompts were {done}; left out:", *problems])


def collect_requests(session: GenerationSession) -> tuple[list[VideoRequest], list[str]]:
    """The requests in order, and one line for every invalid prompt of a file.

    Raises:
        ConfigError: nothing can be made, or the one request of the command line is wrong.
        DataError: nothing can be made, because images are damaged.
    """
    config = session.config
    if config.from_file is None:
        return [session.resolve(config.spec)], []
    prompts = read_prompt_file(config.from_file)
    for note in prompts.notes:
        log.info("%s", note)
    requests: list[VideoRequest] = []
    problems = list(prompts.problems)
    is_data_alone = not problems
    for spec in prompts.specs:
        try:
            requests.append(session.resolve(spec))
        except (ConfigError, DataError) as error:
            problems.append("; ".join(error.problems))
            is_data_alone &= isinstance(error, DataError)
    if not requests:
        raise (DataError if is_data_alone else ConfigError)(problems)
    for problem in problems:
        log.error("left out: %s", problem)
    return requests, problems


def _bytes_needed(requests: Sequence[VideoRequest]) -> int:
    """An upper bound for ordinary footage: a third of the raw frames."""
    return sum(request.width * request.height * request.num_frames for request in requests)
