"""Encode the captions of a dataset for training: see --help."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky5.cli.caching import parse_cache_text
from kandinsky5.cli.common import SAVES_HOST_MEMORY
from modules.command_line import user_errors


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line; a user error ends with its exit code and one message."""
    with user_errors(argv, saves_host_memory=SAVES_HOST_MEMORY["cache_text"]):
        config = parse_cache_text(argv)
        from kandinsky5.caching.captions import cache_text  # imported late: --help must not wait for torch

        cache_text(config)


if __name__ == "__main__":
    main()
