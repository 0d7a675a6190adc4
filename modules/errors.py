"""Errors that a user can fix, each with the exit code its script ends with."""

from __future__ import annotations

from collections.abc import Iterable


class UserError(Exception):
    """Something the user can fix: shown without a traceback, ends the script with `exit_code`."""

    exit_code = 1

    def __init__(self, problems: str | Iterable[str]) -> None:
        self.problems = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))


class ConfigError(UserError):
    """Wrong usage or configuration."""

    exit_code = 2


class DataError(UserError):
    """Media, captions or datasets that cannot be used."""

    exit_code = 3


class CacheError(DataError):
    """Cache files that are missing, damaged or made for something else."""


class NewerCacheError(CacheError):
    """A cache or an index that a newer version of this program made: neither read nor made again."""


class ModelFileError(UserError):
    """A model or LoRA file that is missing, damaged or of the wrong kind."""

    exit_code = 4


class ResourceError(UserError):
    """The machine cannot do it: disk, memory, device, missing package."""

    exit_code = 5


class DivergedError(UserError):
    """Training produced a number that is not finite."""

    exit_code = 6
