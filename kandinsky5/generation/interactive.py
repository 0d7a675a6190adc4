"""Prompts from the console, with the models kept in memory between them."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import ExitStack

from kandinsky5.generation.models import SamplingModel
from kandinsky5.generation.session import GenerationSession, raise_together
from kandinsky5.generation.settings import repeat_command
from kandinsky5.memory.advice import memory_advice
from kandinsky5.model.offload import resident_weights_on_host
from kandinsky5.prompts import parse_prompt_line
from kandinsky5.sampling.pipeline import ClipInputs, encode_images, encode_prompts
from kandinsky5.text.encoders import TextEncoders
from kandinsky5.vae.video_vae import VideoVAE
from modules.devices import empty_device_cache
from modules.errors import UserError
from modules.interruption import keyboard_interrupts
from modules.logs import get_logger

log = get_logger(__name__)

_HELP = (
    "One prompt per line, settings after it: --w 512 --h 512 --f 121 --d SEED --s STEPS --g GUIDANCE "
    "--n NEGATIVE --i IMAGE --m LORA_MULTIPLIER. Ctrl+C stops the current one, Ctrl+D (Ctrl+Z on Windows) "
    "ends."
)


class _LoadedModels:
    """Models loaded at first use and then kept; on an accelerator the DiT may make room for the others."""

    def __init__(self, session: GenerationSession) -> None:
        self._session = session
        self._encoders: TextEncoders | None = None
        self._vae: VideoVAE | None = None
        self._model: SamplingModel | None = None
        self._dit_is_away = ExitStack()

    def encoders(self) -> TextEncoders:
        self._move_dit_out()
        if self._encoders is None:
            self._encoders = self._session.loader.text_encoders()
        return self._encoders

    def vae(self) -> VideoVAE:
        self._move_dit_out()
        if self._vae is None:
            self._vae = self._session.loader.vae()
        return self._vae

    def model(self) -> SamplingModel:
        self._dit_is_away.close()
        if self._model is None:
            self._model = self._session.loader.dit()
        return self._model

    def _move_dit_out(self) -> None:
        if self._model is None:
            return
        self._dit_is_away.close()
        device, moves = self._session.device, self._session.config.dit.offload_dit_during_sampling
        self._dit_is_away.enter_context(resident_weights_on_host(self._model.dit, device, enabled=moves))
        empty_device_cache(device)


def run_interactive(session: GenerationSession, read_line: Callable[[], str] | None = None) -> None:
    """Make one video per line until the input ends; a wrong line or an interrupted one is only reported.

    Args:
        read_line: returns the next line and raises EOFError at the end; default is the console.
    """
    read = read_line or console_reader()
    models = _LoadedModels(session)
    session.check_vae_values()
    log.info("%s", _HELP)
    with keyboard_interrupts():
        _serve(session, models, read)


def _serve(session: GenerationSession, models: _LoadedModels, read: Callable[[], str]) -> None:
    while True:
        try:
            line = read().strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            log.error("prompt: the line is not valid UTF-8; type it again")
            continue
        except KeyboardInterrupt:
            continue  # nothing is running: only the half-typed line goes
        if not line:
            continue
        try:
            _make(session, models, line)
        except UserError as error:
            for problem in error.problems:
                log.error("%s", problem)
            empty_device_cache(session.device)
        except KeyboardInterrupt:
            log.warning("stopped; the models stay loaded")


def _make(session: GenerationSession, models: _LoadedModels, line: str) -> None:
    prompts = parse_prompt_line(line, "prompt")
    for note in prompts.notes:
        log.info("%s", note)
    (spec,) = prompts.checked()
    request = session.resolve(spec)
    if session.config.output.verbose:
        log.info("to make this again:\n  %s", repeat_command(session.config, request))
    with memory_advice("making this one", "--fp8_base, --blocks_to_swap N or --offload_dit_during_sampling"):
        (text,) = encode_prompts(models.encoders(), [request])
        image = (
            None
            if request.image is None
            else encode_images(models.vae(), request, tile_px=session.config.vae.tile_px)
        )
        sampled = session.sample(models.model(), ClipInputs(request, text, image))
        finished = deque([session.writer.copied(sampled)])
        with session.writer.keeping(finished):
            failures = session.writer.decode_all(models.vae, finished)
    raise_together(failures)


def console_reader() -> Callable[[], str]:
    """Line input with editing and history where prompt_toolkit is installed."""
    try:
        from prompt_toolkit import PromptSession  # pyright: ignore[reportMissingImports]
    except ImportError:
        return lambda: input("> ")
    session = PromptSession()
    return lambda: session.prompt("> ")
