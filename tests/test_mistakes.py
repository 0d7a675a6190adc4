"""What the scripts answer to the mistakes of new users: see `mistakes.py`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mistakes import MISTAKES, Mistake, inside, prepare, run


@pytest.fixture(scope="module")
def work(tiny_models: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("mistakes")
    prepare(folder, tiny_models)
    with inside(folder):
        yield folder


@pytest.mark.usefixtures("work")
@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.name)
def test_the_answer_says_what_is_wrong_and_what_to_type(mistake: Mistake) -> None:
    code, output = run(mistake)
    assert code == mistake.code, output
    for part in mistake.expected:
        assert part in output
