"""Imports classes given on the command line by their dotted path."""

from __future__ import annotations

import importlib

from modules.errors import ConfigError, ResourceError


def import_class(dotted_name: str, flag: str) -> type:
    """The class `package.module.Class`.

    Only for names from the user's own command line or configuration file, never for names found in data.

    Raises:
        ResourceError: the package is not installed or fails to import.
        ConfigError: the module has no such class.
    """
    module_name, _, class_name = dotted_name.rpartition(".")
    package = module_name.split(".")[0]
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ResourceError(
            f"{flag} {dotted_name}: {module_name} cannot be imported ({error}). Install it:\n"
            f"  pip install {package}"
        ) from error
    found = vars(module).get(class_name)
    if not isinstance(found, type):
        raise ConfigError(f"{flag} {dotted_name}: the module {module_name} has no class {class_name}")
    return found
