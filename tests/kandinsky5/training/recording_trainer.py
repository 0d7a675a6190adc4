"""Run the training script and leave what every process did: one JSON line per step in `--output_dir`/ranks.

Started by `accelerate launch` in a test of several processes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import pytest
import torch

from kandinsky5_train_network import main
from tests.kandinsky5.training.step_record import recorded
from tests.kandinsky5.training.training_runs import write_word_while_loading

WORD = "CONTROL_WORD_WHILE_LOADING"
"""Environment variable: what the user writes into the control file while the model loads."""


def _main() -> None:
    torch.set_num_threads(1)
    words = sys.argv[1:]
    folder = Path(words[words.index("--output_dir") + 1]) / "ranks"
    folder.mkdir(parents=True, exist_ok=True)
    with recorded() as records, pytest.MonkeyPatch.context() as patch:
        if os.environ[WORD]:
            write_word_while_loading(folder.parent, os.environ[WORD], patch)
        main(words)
    assert int(os.environ["WORLD_SIZE"]) == torch.distributed.get_world_size()
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / f"{torch.distributed.get_rank()}.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    _main()
