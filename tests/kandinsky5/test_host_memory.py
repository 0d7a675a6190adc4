"""Each of the four scripts, where the system has no memory left: exit code 5, sizes and options that help."""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from kandinsky5.cli.common import SAVES_HOST_MEMORY
from modules.command_line import user_errors
from networks.lora_files import read_adapter_tensors
from tests.kandinsky5.training import fault_kit
from tests.kandinsky5.training.training_runs import train

SCRIPTS = {
    "cache_latents": ("kandinsky5_cache_latents", "parse_cache_latents"),
    "cache_text": ("kandinsky5_cache_text_encoder_outputs", "parse_cache_text"),
    "train": ("kandinsky5_train_network", "parse_train"),
    "generate": ("kandinsky5_generate_video", "parse_generate"),
}


def allocate() -> None:
    torch.empty(2**55, dtype=torch.uint8)


def no_thread() -> None:
    raise RuntimeError("can't start new thread")


def no_memory() -> None:
    raise MemoryError


@pytest.mark.parametrize("failure", [allocate, no_thread, no_memory], ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_script_without_memory_ends_with_code_5_and_what_helps(
    name: str,
    failure: Callable[[], None],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    module, parse = SCRIPTS[name]
    script = importlib.import_module(module)
    monkeypatch.setattr(script, parse, lambda *_: failure())
    with pytest.raises(SystemExit) as stop:
        script.main([])
    assert stop.value.code == 5
    text = capsys.readouterr().err
    assert "out of host memory (RAM, not the GPU's memory)" in text
    assert "Traceback" not in text
    assert all(words in text for words in SAVES_HOST_MEMORY[name])
    if failure is allocate:
        assert f"asked for: {2**55 / 2**30:.2f} GiB" in text


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_options_that_help_are_options_of_the_script(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        importlib.import_module(SCRIPTS[name][0]).main(["--help"])
    known = set(re.findall(r"--[a-z0-9_]+", capsys.readouterr().out))
    named = set(re.findall(r"--[a-z0-9_]+", "\n".join(SAVES_HOST_MEMORY[name])))
    assert named
    assert named <= known


def test_a_file_that_does_not_fit_into_memory_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """torch.load has one kind of error for both."""
    path = tmp_path / "lora.pt"
    torch.save({"a": torch.zeros(1)}, path)

    def load(*_: Any, **__: Any) -> None:
        raise RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(torch, "load", load)
    with pytest.raises(SystemExit) as stop, user_errors([]):
        read_adapter_tensors(path)
    assert stop.value.code == 5
    assert "out of host memory" in capsys.readouterr().err


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="asks Linux how large the process is")
def test_a_training_under_a_real_limit_ends_with_code_5(dit: Path, dataset: Path, tmp_path: Path) -> None:
    """The limit leaves less than the memory that the LoRA of that rank takes."""

    def run() -> None:
        import resource

        pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
        limit = pages * resource.getpagesize() + 2**28
        resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
        train(dit, dataset, tmp_path / "out", "--max_train_steps", 1, "--network_dim", 400_000)

    log = tmp_path / "log.txt"
    code = fault_kit.wait(fault_kit.start(run, log), 60)
    text = log.read_text(encoding="utf-8")
    assert code == 5, text
    assert "out of host memory" in text
    assert "--fp8_base" in text
