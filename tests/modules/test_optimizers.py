"""Optimizers are found by the names people write, and wrong ones are refused before anything is loaded."""

from __future__ import annotations

from typing import Any

import bitsandbytes
import pytest
import torch
import transformers
from torch import nn

from modules.errors import ConfigError, ResourceError
from modules.keyword_args import parse_keyword_args
from modules.optimizer_kinds import takes_relative_steps
from modules.optimizers import (
    build_optimizer,
    check_step,
    describe_optimizer,
    is_same_optimizer,
    learning_rates,
    optimizer_class,
)


def small_group() -> list[dict[str, Any]]:
    return [{"params": [nn.Parameter(torch.zeros(2, 2))]}]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("AdamW", torch.optim.AdamW),
        ("adamw", torch.optim.AdamW),
        ("AdamW8Bit", bitsandbytes.optim.AdamW8bit),
        ("sgd", torch.optim.SGD),
        ("AdaFactor", transformers.optimization.Adafactor),
        ("bitsandbytes.optim.PagedAdEMAMix8bit", bitsandbytes.optim.PagedAdEMAMix8bit),
        ("torch.optim.Adafactor", torch.optim.Adafactor),
    ],
)
def test_names_are_matched_without_regard_to_case_and_dotted_paths_exactly(name: str, expected: type) -> None:
    assert optimizer_class(name) is expected


def test_a_mistyped_name_gets_the_nearest_one() -> None:
    with pytest.raises(ConfigError, match="did you mean AdamW"):
        optimizer_class("AdmW")


def test_a_missing_package_is_named_with_the_command_that_installs_it() -> None:
    with pytest.raises(ResourceError, match="pip install prodigyopt"):
        optimizer_class("prodigyopt.Prodigy")


def test_a_class_that_is_no_optimizer_is_refused() -> None:
    with pytest.raises(ConfigError, match="no torch optimizer"):
        optimizer_class("torch.nn.Linear")


@pytest.mark.parametrize("words", [["wieght_decay=0.1"], ["betas=(2.0,0.9)"], ["lr=0.1"]])
def test_arguments_the_optimizer_refuses_are_found_without_a_model(words: list[str]) -> None:
    with pytest.raises(ConfigError, match="optimizer_args"):
        check_step("AdamW", small_group(), 1e-4, parse_keyword_args(words, "--optimizer_args"))


def test_the_words_of_the_guide_reach_the_optimizer() -> None:
    arguments = parse_keyword_args(["weight_decay=0.001", "betas=0.9,0.95"], "--optimizer_args")
    groups = [{"name": "unet", "params": [nn.Parameter(torch.zeros(2))], "lr": 1e-4}]
    optimizer = build_optimizer("AdamW8bit", groups, 1e-4, arguments)
    assert optimizer.defaults["weight_decay"] == 0.001
    assert optimizer.defaults["betas"] == (0.9, 0.95)
    assert learning_rates(optimizer) == {"lr/unet": 1e-4}
    assert describe_optimizer(optimizer, arguments).endswith(
        "AdamW8bit(weight_decay=0.001,betas=(0.9, 0.95))"
    )


def test_adafactor_sets_its_own_rate_unless_told_otherwise() -> None:
    assert takes_relative_steps("AdaFactor", {})
    assert takes_relative_steps("AdaFactor", {"relative_step": False, "warmup_init": True})
    assert not takes_relative_steps("AdaFactor", {"relative_step": False})
    check_step("AdaFactor", small_group(), 1e-4, {})
    check_step("AdaFactor", small_group(), 1e-4, {"relative_step": False})


def test_names_of_optimizers_differ_by_more_than_the_order_of_arguments() -> None:
    one = "torch.optim.AdamW(weight_decay=0.1,betas=(0.9, 0.95))"
    assert is_same_optimizer(one, "torch.optim.AdamW(betas=(0.9, 0.95),weight_decay=0.1)")
    assert is_same_optimizer("torch.optim.SGD()", "torch.optim.SGD()")
    for other in ("torch.optim.Adam", "torch.optim.AdamW"):
        assert not is_same_optimizer(one, f"{other}(weight_decay=0.1,betas=(0.95, 0.9))")


def test_only_the_first_equals_sign_separates_and_all_problems_are_listed() -> None:
    assert parse_keyword_args(["a='x=y'"], "--f") == {"a": "x=y"}
    with pytest.raises(ConfigError) as caught:
        parse_keyword_args(["a", "b=__import__('os')", "c=1", "c=2"], "--f")
    assert len(caught.value.problems) == 3
