"""Selects the compute device and releases its cached memory."""

from __future__ import annotations

import torch

from modules.errors import ResourceError


def pick_device(word: str | None, process: int | None = None) -> torch.device:
    """Return the compute device: the requested one, else cuda if available, else cpu.

    Args:
        process: number of this process on the machine, where several share the work: each takes another GPU.
    Raises:
        ResourceError: the device is unknown or not available.
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
    """Release cached memory to the device, to avoid fragmentation when the next model loads."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
