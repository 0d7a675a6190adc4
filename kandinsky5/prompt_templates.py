"""Saves the official prompt templates: `python -m kandinsky5.prompt_templates FILE`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from kandinsky5.text.templates import load_prompt_templates, save_prompt_templates
from modules.command_line import Parser, user_errors
from modules.logs import get_logger

log = get_logger(__name__)


def main(argv: Sequence[str] | None = None) -> None:
    parser = Parser(
        "python -m kandinsky5.prompt_templates",
        "Save the official prompt templates of the installed diffusers for --prompt_templates.",
    )
    parser.add_argument("file", type=Path, help="path of the JSON file")
    with user_errors(argv):
        file = parser.parse_args(argv).file
        save_prompt_templates(file, load_prompt_templates())
        log.info("wrote %s", file)


if __name__ == "__main__":
    main()
