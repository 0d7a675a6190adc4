"""The device to compute on, and giving back its memory."""

from __future__ import annotations

import torch

from modules.errors import ResourceError


def pick_device(word: str | None, process: int | None = None) -> torch.device:
    """The device to compute on: the one asked for, else cuda if there is one, else cpu.

    Args:
        process: number of this process on the machine, where several share the work: each takes another GPU.
    Raises:
        ResourceError: it is unknown or not there.
    """
    if word is None:
        word = "cuda" if torch.cuda.is_available() else "cpu"
    if word == "cuda" and process is not None and torch.cuda.is_available():
        word = f"cuda:{process % torch.cuda.device_count()}"
    try:
        device = torch.device(word)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ResourceError(f"--device {word} cannot be used: {str(error).splitlines()[0]}") from error
    if device.type == "meta":
        raise ResourceError("--device meta cannot be used: it holds shapes and no data")
    return device


def empty_device_cache(device: torch.device) -> None:
    """Return freed memory to the device, so that the next model finds it in one piece."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
