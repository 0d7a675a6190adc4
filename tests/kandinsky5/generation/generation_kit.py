"""What the tests of generation share beside the fixtures of conftest.py."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from torch import Tensor

from kandinsky5.generation.outputs import read_latents

SMALL = ("--width", "32", "--height", "48", "--frames", "5", "--steps", "2")
LAYER = "visual_transformer_blocks.0.self_attention.to_query"

Generate = Callable[..., None]


def latents_of(path: Path) -> Tensor:
    return read_latents(path)[0]


def frames_of(path: Path) -> list[np.ndarray]:
    with av.open(str(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


def refused(
    run: Generate, code: int, capsys: pytest.CaptureFixture[str], *words: object, **options: Any
) -> str:
    with pytest.raises(SystemExit) as caught:
        run(*words, **options)
    message = capsys.readouterr().err
    assert caught.value.code == code, message
    return message
