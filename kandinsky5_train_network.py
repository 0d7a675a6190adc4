"""Train a LoRA for Kandinsky 5; `--help` lists the options, docs/kandinsky5.md explains them."""

from __future__ import annotations

from collections.abc import Sequence

from kandinsky5.cli.common import SAVES_HOST_MEMORY
from kandinsky5.cli.config_file import asks_for_traceback
from kandinsky5.cli.train import check_train_paths, parse_train
from kandinsky5.configs.train import ShowTimestepsConfig
from modules.command_line import user_errors
from modules.interruption import StopRequest


def main(argv: Sequence[str] | None = None) -> None:
    """Run a training, or plot its timestep distribution."""
    stop = StopRequest()
    with user_errors(argv, asks_for_traceback, saves_host_memory=SAVES_HOST_MEMORY["train"]):
        config = parse_train(argv)
        if isinstance(config, ShowTimestepsConfig):
            from kandinsky5.training.loss.timesteps import (
                show_timesteps,  # imported late: --help must not wait for torch
            )

            show_timesteps(config)
            return
        check_train_paths(config)
        from kandinsky5.training.trainer import train

        train(config, stop)


if __name__ == "__main__":
    main()
