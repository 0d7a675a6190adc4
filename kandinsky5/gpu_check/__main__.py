"""The command: tries this machine's GPU and prints a report, without any weights.

Every check is one small computation compared with float32, made by the functions that the scripts call, in a
process of its own that is replaced when a library takes it down.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import torch

from kandinsky5.gpu_check.checks import CHECKS, run_checks
from kandinsky5.gpu_check.machine import Machine, read_machine
from kandinsky5.gpu_check.memory_options import LORA_OPTIONS, memory_options
from modules.byte_sizes import GIB
from modules.command_line import Parser, user_errors
from modules.logs import format_table, print_report


def report(machine: Machine, device: torch.device) -> str:
    """All of it as text."""
    with ThreadPoolExecutor(1) as planning:  # beside the checks, which wait for the device
        options = planning.submit(memory_options, machine.memory, machine.capability)
        checked = list(run_checks(list(CHECKS), device))
        rows = options.result()
    return "\n".join([
        machine.describe(),
        "",
        format_table(("check", "result", "s"), checked),
        "",
        f"Memory options for a LoRA ({' '.join(LORA_OPTIONS)}, one clip per batch), chosen as by "
        f"--vram_budget {machine.memory / GIB:.3g}; planned, not measured:",
        format_table(("model", "clip", "add", "device, with reserve", "host"), rows),
    ])


def main(argv: Sequence[str] | None = None) -> None:
    """The command; see `--help`."""
    with user_errors(argv):
        description = "Report what works on this machine's GPU, and which memory options it needs."
        Parser("python -m kandinsky5.gpu_check", description).parse_args(argv)
        machine = read_machine()
        print_report(report(machine, torch.device("cuda", 0)))


if __name__ == "__main__":
    main()
