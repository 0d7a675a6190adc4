"""Optimizers by the names users write: AdamW8bit, any class of torch.optim, any package.module.Class."""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from modules.class_names import import_class
from modules.errors import ConfigError
from modules.optimizer_kinds import takes_relative_steps

FLAG = "--optimizer_type"
STEP_REFUSALS = (
    *(RuntimeError, AssertionError, ValueError, TypeError),
    *(LookupError, AttributeError, ArithmeticError),
)
"""What optimizers raise that cannot be made with these values, or that cannot step: on such parameters,
without a closure, or on this device."""

_SPECIAL = {
    # Names in lower case that are not those of torch.optim. Adafactor is transformers': torch's own lacks
    # relative steps, which is what people choose it for.
    "adamw8bit": "bitsandbytes.optim.AdamW8bit",
    "pagedadamw8bit": "bitsandbytes.optim.PagedAdamW8bit",
    "pagedadamw": "bitsandbytes.optim.PagedAdamW",
    "lion8bit": "bitsandbytes.optim.Lion8bit",
    "lion": "bitsandbytes.optim.Lion",
    "adafactor": "transformers.optimization.Adafactor",
}

_ELSEWHERE = {
    "prodigy": "prodigyopt.Prodigy",
    "prodigyplusschedulefree": "prodigyplus.ProdigyPlusScheduleFree",
    "dadaptadam": "dadaptation.DAdaptAdam",
    "dadaptation": "dadaptation.DAdaptAdam",
    "dadaptadagrad": "dadaptation.DAdaptAdaGrad",
    "dadaptlion": "dadaptation.DAdaptLion",
    "dadaptsgd": "dadaptation.DAdaptSGD",
    "adamwschedulefree": "schedulefree.AdamWScheduleFree",
    "radamschedulefree": "schedulefree.RAdamScheduleFree",
    "sgdschedulefree": "schedulefree.SGDScheduleFree",
    "came": "came_pytorch.CAME",
}
"""Names of kohya-ss's scripts -> class of a package that is installed beside this project."""


def optimizer_class(name: str) -> type[torch.optim.Optimizer]:
    """The class for an `--optimizer_type`; names without a dot are matched without regard to case.

    Raises:
        ConfigError: no such optimizer (the message gives the nearest name), or no optimizer class.
        ResourceError: the package of a dotted name is missing.
    """
    torch_classes = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    del torch_classes["optimizer"]
    wanted = name.lower()
    if wanted in _SPECIAL or "." in name:
        found = import_class(_SPECIAL.get(wanted, name), FLAG)
    elif wanted in torch_classes:
        found = torch_classes[wanted]
    else:
        names = {name.lower(): name for name in (*(c.__name__ for c in torch_classes.values()), *_ELSEWHERE)}
        names |= {key: path.rpartition(".")[2] for key, path in _SPECIAL.items()}
        nearest = _ELSEWHERE.get(wanted) or next(
            (names[close] for close in difflib.get_close_matches(wanted, names, n=1)), None
        )
        hint = f"; did you mean {nearest}?" if nearest else ""
        raise ConfigError(f"{FLAG} {name}: no such class in torch.optim{hint}")
    if not issubclass(found, torch.optim.Optimizer):
        raise ConfigError(f"{FLAG} {name}: {found.__name__} is no torch optimizer")
    return found


def build_optimizer(
    name: str,
    parameter_groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    arguments: Mapping[str, Any],
) -> torch.optim.Optimizer:
    """Make the optimizer; groups may carry their own `lr` and a `name` for the log.

    Adafactor takes relative steps unless `relative_step=False` is among the arguments; it then sets its own
    rate and must not be given one.

    Raises:
        ConfigError: the class does not take these arguments or values.
    """
    found = optimizer_class(name)
    settings = dict(arguments)
    groups = [dict(group) for group in parameter_groups]
    rate: float | None = learning_rate
    if takes_relative_steps(name, arguments):
        settings["relative_step"] = True
        rate = None
        for group in groups:
            group.pop("lr", None)
    _check_argument_names(found, name, settings)
    try:
        return found(groups, lr=rate, **settings)  # pyright: ignore[reportCallIssue]
    except torch.OutOfMemoryError:
        raise
    except STEP_REFUSALS as error:
        raise ConfigError(f"{_given(found.__name__, arguments)}: does not work: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    """What a package says, with the kind of error where that is all it says, as in `KeyError: 0`."""
    return str(error) if isinstance(error, (ValueError, RuntimeError)) else f"{type(error).__name__}: {error}"


def _given(name: str, arguments: Mapping[str, Any]) -> str:
    given = "".join(f" {key}={value}" for key, value in arguments.items())
    return f"{FLAG} {name}{given and ' --optimizer_args' + given}"


def check_step(
    name: str,
    parameter_groups: Sequence[Mapping[str, Any]],
    learning_rate: float,
    arguments: Mapping[str, Any],
) -> None:
    """Make one step, so that an optimizer that cannot train is found before a model loads.

    Args:
        parameter_groups: of small parameters on the device of the run, like those that are to be trained.
    Raises:
        ConfigError, ResourceError: as `build_optimizer`, or the step fails.
    """
    optimizer = build_optimizer(name, parameter_groups, learning_rate, arguments)
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    set_averaging(optimizer, training=True)
    try:
        optimizer.step()
    except torch.OutOfMemoryError:
        raise
    except STEP_REFUSALS as error:
        raise ConfigError(
            f"{_given(name, arguments)}: cannot train a LoRA on {parameters[0].device.type} "
            f"({_reason(error)}). AdamW, AdamW8bit, AdaFactor and Lion can"
        ) from error


def has_averages(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the optimizer holds averaged weights beside the trained ones, as schedule-free ones do."""
    return "eval" in vars(type(optimizer))


def set_averaging(optimizer: torch.optim.Optimizer, *, training: bool) -> None:
    """Schedule-free optimizers hold two sets of weights: put the trained or the averaged ones in place."""
    switch = vars(type(optimizer)).get("train" if training else "eval")
    if switch is not None:
        switch(optimizer)


def learning_rates(optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Log name -> rate of every parameter group that has one; D-adaptation optimizers add `d*lr`."""
    rates = {}
    for index, group in enumerate(optimizer.param_groups):
        label = group.get("name") or (f"group{index}" if index else "unet")
        if group.get("lr") is not None:
            rates[f"lr/{label}"] = float(group["lr"])
            if "d" in group:
                rates[f"lr/d*lr/{label}"] = float(group["d"]) * float(group["lr"])
    return rates


def describe_optimizer(optimizer: torch.optim.Optimizer, arguments: Mapping[str, Any]) -> str:
    """`module.Class(name=value,...)`, as LoRA metadata names it."""
    words = ",".join(f"{key}={value}" for key, value in arguments.items())
    return f"{type(optimizer).__module__}.{type(optimizer).__name__}({words})"


def is_same_optimizer(one: str, other: str) -> bool:
    """Whether two names by `describe_optimizer` mean the same; the order of arguments is no difference."""
    return _parts(one) == _parts(other)


def _parts(described: str) -> list[str]:
    # A comma inside a value, such as that of betas, is not followed by a name and "=".
    name, _, arguments = described.removesuffix(")").partition("(")
    return [name, *sorted(re.split(r",(?=[A-Za-z_]\w*=)", arguments))]


def moments_on_device(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """Every tensor of the optimizer's state, in a fixed order."""
    tensors = []
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            state = optimizer.state.get(parameter, {})
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
    return tensors


def _check_argument_names(found: type, name: str, settings: Mapping[str, Any]) -> None:
    parameters = inspect.signature(found.__init__).parameters
    if any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values()):
        return
    known = [key for key in parameters if key not in ("self", "params", "lr")]
    unknown = [key for key in settings if key not in known]
    if unknown:
        raise ConfigError(
            f"--optimizer_args: {name} takes no {', '.join(unknown)}; it takes {', '.join(known)}"
        )
