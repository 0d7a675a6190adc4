"""The check of a GPU, with a stand-in for the card: what it reports, and that nothing ends it early."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from kandinsky5.gpu_check import __main__ as command
from kandinsky5.gpu_check import machine
from kandinsky5.gpu_check import memory_options as options
from kandinsky5.gpu_check.checks import CHECKS, run_check, run_checks
from modules.byte_sizes import GIB
from modules.errors import ResourceError

CPU = torch.device("cpu")
CARD = SimpleNamespace(name="NVIDIA GeForce RTX 4090", total_memory=24 * GIB, major=8, minor=9)


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> None:
    """What torch and the driver answer on a machine with such a card."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: CARD)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (22 * GIB, CARD.total_memory))
    monkeypatch.setattr(machine, "driver_version", lambda: "570.00")


def test_without_a_gpu_the_command_says_so_and_ends_with_5(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kandinsky5.gpu_check"],
        cwd=root, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 5
    assert "finds no GPU on this machine" in done.stderr
    assert "exit code 5" in done.stderr


@pytest.mark.parametrize(("cuda", "expected"), [(None, "a build without CUDA"), ("13.0", "nvidia-smi")])
def test_a_missing_gpu_is_explained_by_the_build(
    monkeypatch: pytest.MonkeyPatch, cuda: str | None, expected: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    with pytest.raises(ResourceError, match=expected):
        machine.read_machine()


@pytest.mark.usefixtures("stand_in")
def test_the_report_names_the_machine_every_check_and_the_options(monkeypatch: pytest.MonkeyPatch) -> None:
    """Checks stand in too: each is run by a test of its own."""
    asked = []
    rows = [("Pro", "512x512x17", "--fp8_base", "21 GiB", "5 GiB")]
    monkeypatch.setattr(command, "memory_options", lambda *given: asked.append(given) or rows)
    monkeypatch.setattr(command, "run_checks", lambda names, _: [(name, "works", "0.1") for name in names])
    text = command.report(machine.read_machine(), CPU)
    assert asked == [(CARD.total_memory, (8, 9))]
    first, libraries, system, *_ = text.splitlines()
    assert first == (
        "card: NVIDIA GeForce RTX 4090, 24.00 GiB, 22.00 GiB free, compute capability 8.9, driver 570.00"
    )
    assert f"torch {torch.__version__}" in libraries
    assert "Python" in system
    assert "chosen as by --vram_budget 24;" in text
    assert all(name in text for name in (*CHECKS, "512x512x17", "--fp8_base"))


NOT_ON_A_CPU = {
    "--fp8_fast": "needs a CUDA device",
    "--int8_fast": "needs a CUDA device",
    "--flash_attn": "the package flash_attn",
    "--flash3": "the package flash_attn_interface",
    "--sage_attn": "the package sageattention",
    "--xformers": "the package xformers",
}


@pytest.mark.parametrize("name", CHECKS)
def test_checks_run_and_compare_with_float32(name: str) -> None:
    words = run_check(name, "cpu")
    assert re.search(NOT_ON_A_CPU.get(name, r"works: (error \d\.\de[+-]\d\d|\d+\.\d GB/s)"), words)


@pytest.mark.parametrize("name", ["attention", "--fp8_base", "--nabla (flex_attention)"])
def test_a_wrong_result_is_no_success(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    plain = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: (1.2 * tensor).to(torch.bfloat16))
    monkeypatch.setattr(
        torch.nn.functional,
        "scaled_dot_product_attention",
        lambda q, *rest, **words: plain(q, *rest, **words) * (1.2 if q.dtype == torch.bfloat16 else 1.0),
    )
    with pytest.raises(RuntimeError, match="wrong: relative error"):
        run_check(name, "cpu")


def act(name: str, device: str) -> str:
    """Stands for `run_check` in the child: some checks end badly."""
    if name == "crashes":
        os._exit(3)
    if name == "fails":
        raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
    return f"works: on {device}"


def test_a_check_that_ends_its_process_is_a_line_and_the_next_one_runs() -> None:
    rows = [row[:2] for row in run_checks(["first", "crashes", "fails", "last"], CPU, act)]
    assert rows == [
        ("first", "works: on cpu"),
        ("crashes", "FAILS: the process ended with exit code 3"),
        ("fails", "FAILS: RuntimeError: CUDA error: an illegal memory access was encountered"),
        ("last", "works: on cpu"),
    ]


def test_a_large_card_needs_no_option(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MODELS", (("Lite", "k5-lite-t2v-5s-sd"),))
    monkeypatch.setattr(options, "CLIPS", ((17, 512, 512),))
    assert options.memory_options(141 * GIB, (9, 0))[0][:3] == ("Lite", "512x512x17", "nothing")


@pytest.mark.slow
def test_options_follow_from_the_size_of_the_card(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "MODELS", (("Lite", "k5-lite-t2v-5s-sd"),))
    (_, _, tight, device, host), (_, _, too_tight, *_) = options.memory_options(int(3.5 * GIB), (8, 9))
    assert tight.startswith("--fp8_base --gradient_checkpointing --blocks_to_swap")
    assert device
    assert host
    assert too_tight.startswith("does not fit: the least it needs is ")


@pytest.mark.slow
def test_pro_is_planned_too() -> None:
    rows = options.memory_options(24 * GIB, (8, 9))
    assert [row[:2] for row in rows[:2]] == [("Pro", "512x512x17"), ("Pro", "768x512x121")]
    assert rows[0][2] == "--fp8_base --gradient_checkpointing"
    assert "--gradient_checkpointing_cpu_offload" in rows[1][2]
