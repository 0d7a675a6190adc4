"""The report of a training as one HTML file: `python -m kandinsky5.report OUTPUT_DIR`."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from modules.command_line import Parser, user_errors
from modules.errors import ConfigError
from modules.files import disk_errors
from modules.logs import print_report


def main(argv: Sequence[str] | None = None) -> None:
    """Write the reports of one or all runs in an output folder."""
    with user_errors(argv):
        options = _parse(argv)
        # Imported late: --help must not wait for torch.
        from kandinsky5.training.report.records import run_names
        from kandinsky5.training.report.write import write_report

        folder = options.output_dir
        if not folder.is_dir():
            raise ConfigError(f"{folder}: no such folder")
        with disk_errors(folder):
            known = run_names(folder)
            if not known:
                raise ConfigError(f"{folder}: no run has left metrics.jsonl or a configuration here")
            if options.name is not None and options.name not in known:
                raise ConfigError(f"--name {options.name}: not in {folder}; it has {', '.join(known)}")
            for name in [options.name] if options.name is not None else known:
                print_report(str(write_report(folder, name)))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = Parser(
        "python -m kandinsky5.report",
        "Write one HTML page about a training: losses, learning rate, time and memory per step, the effect "
        "of the LoRA, datasets, settings, and the samples as videos. A run writes it at its end; this renews "
        "it at any time, also while the run is active. The page holds sample prompts, and no captions, no "
        "absolute paths and no keys.",
    )
    parser.add_argument("output_dir", type=Path, metavar="OUTPUT_DIR", help="--output_dir of the training")
    parser.add_argument(
        "--name", metavar="NAME", help="--output_name of the run (default: every run in the folder)"
    )
    return parser.parse_args(argv)


if __name__ == "__main__":
    main()
