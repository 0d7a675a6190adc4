"""Generate videos and images with Kandinsky 5: see --help."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky5.cli.common import SAVES_HOST_MEMORY
from kandinsky5.cli.generate import check_model_paths, parse_generate
from modules.command_line import user_errors
from modules.interruption import exit_on_signal


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user error ends with its exit code and one message."""
    with user_errors(argv, saves_host_memory=SAVES_HOST_MEMORY["generate"]), exit_on_signal():
        config = parse_generate(argv)
        check_model_paths(config)
        from kandinsky5.generation.run import generate  # imported late: --help must not wait for torch

        generate(config)


if __name__ == "__main__":
    main()
