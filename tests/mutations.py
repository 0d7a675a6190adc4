"""Files with one wrong value each, as a damaged download or another program makes them of a header."""

from __future__ import annotations

import copy
import json
import random
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from modules.errors import UserError

WRONG = (
    *(None, True, -1, 0, 7, 2**40, 2**63, 2**70, 1.5, float("nan"), float("inf"), "", "x", "²", "1" * 25),
    *([], [None], [[]], [1, 2, 3, 4, 5], {}, {"a": 1}, "\ud800", "../x", "a\0b"),
)
DIGITS = "1" * 5000
"""More than Python turns into a number."""


def mutated(value: Any, count: int, seed: int = 0) -> Iterator[str]:
    """`count` JSON texts like `value`, each with a leaf or a branch replaced, removed or doubled."""
    draw = random.Random(seed)
    places = list(_places(value))
    for number in range(count):
        place = draw.choice(places)
        changed = copy.deepcopy(value)
        if not place:
            yield json.dumps(draw.choice(WRONG))
            continue
        *way, last = place
        parent = changed
        for step in way:
            parent = parent[step]
        if number % 8 == 0:
            del parent[last]
        elif number % 8 == 1:
            parent[last] = "@digits@"
        else:
            parent[last] = draw.choice(WRONG)
        yield json.dumps(changed).replace('"@digits@"', DIGITS)


def _places(value: Any, so_far: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    yield so_far
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from _places(item, (*so_far, key))


def tensor_file_variants(path: Path, count: int) -> Iterator[bytes]:
    """A safetensors file with `count` different headers; its data stays, and so do its length's bytes."""
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    header = json.loads(raw[8 : 8 + length])
    for text in mutated(header, count):
        changed = text.encode("utf-8", "surrogatepass")
        yield struct.pack("<Q", len(changed)) + changed + raw[8 + length :]


def tracebacks(path: Path, variants: Iterator[bytes], use: Callable[[], object]) -> list[str]:
    """Put each variant in the place of a file and use it; returns the errors that are not for users."""
    before = path.read_bytes()
    found = []
    for variant in variants:
        path.write_bytes(variant)
        try:
            use()
        except UserError:
            pass
        except Exception as error:
            found.append(f"{type(error).__name__}: {error}"[:200])
    path.write_bytes(before)
    return found
