"""What a report of trouble has to say about the machine it comes from."""

from __future__ import annotations

import importlib.metadata
import platform
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from modules.byte_sizes import size_text
from modules.errors import ResourceError
from modules.host_memory import available_memory, total_memory

_PACKAGES = (
    "triton", "triton-windows", "bitsandbytes", "flash-attn", "sageattention", "xformers", "accelerate",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Machine:
    """A computer with its first GPU."""

    card: str
    memory: int
    """Bytes on the device."""
    free: int
    capability: tuple[int, int]
    driver: str
    libraries: Mapping[str, str]
    """Versions by name."""
    system: str
    host_memory: int
    host_available: int
    """0 where the system does not say."""

    def describe(self) -> str:
        """In lines."""
        versions = ", ".join(f"{name} {version}" for name, version in self.libraries.items())
        host = f"{size_text(self.host_memory)} of memory, {size_text(self.host_available)} available"
        return "\n".join([
            f"card: {self.card}, {size_text(self.memory)}, {size_text(self.free)} free, compute capability "
            f"{'.'.join(map(str, self.capability))}, driver {self.driver}",
            f"libraries: {versions}",
            f"system: {self.system}, {host if self.host_memory else 'size of memory unknown'}",
        ])


def read_machine() -> Machine:
    """This one.

    Raises:
        ResourceError: torch finds no GPU.
    """
    if not torch.cuda.is_available():
        raise ResourceError(_no_gpu_message())
    properties = torch.cuda.get_device_properties(0)
    return Machine(
        card=properties.name,
        memory=properties.total_memory,
        free=torch.cuda.mem_get_info(0)[0],
        capability=(properties.major, properties.minor),
        driver=driver_version(),
        libraries=_library_versions(),
        system=f"{platform.platform()}, Python {platform.python_version()}",
        host_memory=total_memory(),
        host_available=available_memory(),
    )


def _no_gpu_message() -> str:
    if torch.version.cuda is None:
        why = "it is a build without CUDA; install one with it: https://pytorch.org/get-started/locally/"
    else:
        why = (
            f"it is built for CUDA {torch.version.cuda}; is the driver installed and new enough (nvidia-smi)?"
        )
    return f"torch {torch.__version__} finds no GPU on this machine, so there is nothing to check: {why}"


def driver_version() -> str:
    """As nvidia-smi gives it, or that it does not."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return "unknown (nvidia-smi did not answer)"
    return done.stdout.split("\n")[0].strip()


def _library_versions() -> dict[str, str]:
    versions = {"torch": torch.__version__, "CUDA": str(torch.version.cuda)}
    versions["cuDNN"] = str(torch.backends.cudnn.version())
    for name in _PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
