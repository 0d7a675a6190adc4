"""Measures the size of the code and lists import circles, for one checkout or several side by side.

    python tests/code_measures.py                   # this checkout
    python tests/code_measures.py OLD NEW           # one column each
    python tests/code_measures.py --circles [PATH]  # import circles between modules; exit code 1 if any
    python tests/code_measures.py --patches [PATH]  # private names that tests replace

Nothing is imported from a checkout: its files are parsed. Product code is the scripts in its root and
the packages below; `__init__.py` files that hold no code are not counted.
"""

from __future__ import annotations

import argparse
import ast
import statistics
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

PACKAGES = ("kandinsky5", "dataset", "networks", "modules")
_COMMAND_LINES = ("kandinsky5/cli/",)
"""Where options become a config: the limit on parameters does not apply."""


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A parsed file of the product or of its tests."""

    name: str
    """Relative to the checkout, with slashes."""
    num_lines: int
    tree: ast.Module

    @property
    def module(self) -> str:
        """Its dotted name."""
        return self.name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


@dataclass(frozen=True, slots=True)
class Measured:
    """A number and where it was found."""

    value: int
    where: str

    def __str__(self) -> str:
        return f"{self.value} ({self.where})"


def read_files(root: Path, *patterns: str) -> list[SourceFile]:
    """Parse the files of a checkout that match glob patterns, in the order of their names."""
    paths = sorted({path for pattern in patterns for path in root.glob(pattern)})
    files = []
    for path in paths:
        text = path.read_text(encoding="utf-8")
        files.append(SourceFile(path.relative_to(root).as_posix(), len(text.splitlines()), ast.parse(text)))
    return files


def product_files(root: Path) -> list[SourceFile]:
    """The files of the product; package markers are left out."""
    files = read_files(root, "*.py", *(f"{package}/**/*.py" for package in PACKAGES))
    return [file for file in files if not _is_marker(file)]


def _is_marker(file: SourceFile) -> bool:
    return file.name.endswith("__init__.py") and len(file.tree.body) <= 1


# -------------------------------------------------------------------------------------------------- sizes


def measures(root: Path) -> dict[str, object]:
    """The figures of a checkout by their titles."""
    files = product_files(root)
    functions = [
        (file, node)
        for file in files
        for node in ast.walk(file.tree)
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
    ]
    classes = [
        (file, node) for file in files for node in ast.walk(file.tree) if isinstance(node, ast.ClassDef)
    ]
    lengths = sorted(_length(node) for _, node in functions)
    called = [
        (file, node) for file, node in functions if not any(part in file.name for part in _COMMAND_LINES)
    ]
    return {
        "product files": len(files),
        "product lines": sum(file.num_lines for file in files),
        "median file, lines": round(statistics.median(file.num_lines for file in files)),
        "longest file, lines": max(
            (Measured(file.num_lines, file.name) for file in files), key=_value_then_name
        ),
        "95 % of functions, lines at most": lengths[-(-len(lengths) * 95 // 100) - 1],
        "longest function, lines": _largest([(*pair, _length(pair[1])) for pair in functions]),
        "functions over 60 lines": sum(length > 60 for length in lengths),
        "most parameters outside cli": _largest([(*pair, _num_parameters(pair[1])) for pair in called]),
        "functions over 6 parameters outside cli": sum(_num_parameters(node) > 6 for _, node in called),
        "largest class, lines": _largest([(*pair, _length(pair[1])) for pair in classes]),
        "classes over 250 lines": sum(_length(node) > 250 for _, node in classes),
        "private names patched in tests": sum(1 for _ in private_patches(root)),
        "import circles": len(circles(imports(files))),
    }


_Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _largest(found: Sequence[tuple[SourceFile, _Definition, int]]) -> Measured:
    return max(
        (Measured(value, f"{file.name} {node.name}") for file, node, value in found), key=_value_then_name
    )


def _value_then_name(measured: Measured) -> tuple[int, str]:
    return measured.value, measured.where


def _length(node: _Definition) -> int:
    assert node.end_lineno is not None
    return node.end_lineno - node.lineno + 1


def _num_parameters(node: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    """All that a caller may pass: not `self`, and `*args` as one."""
    given = node.args
    names = [arg.arg for arg in (*given.posonlyargs, *given.args, *given.kwonlyargs)]
    names += [arg.arg for arg in (given.vararg, given.kwarg) if arg is not None]
    return len(names) - (bool(names) and names[0] in {"self", "cls"})


def private_patches(root: Path) -> Iterator[str]:
    """Where tests replace a name that starts with an underscore, as "file:line: name"."""
    for file in read_files(root, "tests/**/*.py"):
        for node in ast.walk(file.tree):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr not in {"setattr", "delattr"}:
                continue
            texts = [arg.value for arg in node.args[:2] if isinstance(arg, ast.Constant)]
            for text in texts:
                name = str(text).rpartition(".")[2]
                if name.startswith("_") and not name.startswith("__"):
                    yield f"{file.name}:{node.lineno}: {name}"


# ------------------------------------------------------------------------------------------------ circles


def imports(files: Sequence[SourceFile]) -> dict[str, set[str]]:
    """Which modules of the product each one imports, also within functions and for type checkers alone."""
    known = {file.module for file in files}
    graph: dict[str, set[str]] = {file.module: set() for file in files}
    for file in files:
        for node in ast.walk(file.tree):
            if isinstance(node, ast.Import):
                graph[file.module] |= {alias.name for alias in node.names} & known
            elif isinstance(node, ast.ImportFrom) and node.module is not None:
                members = {f"{node.module}.{alias.name}" for alias in node.names}
                graph[file.module] |= (members | {node.module}) & known
    return graph


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """A shortest circle through each module that imports itself by way of others, each circle once."""
    found: dict[frozenset[str], list[str]] = {}
    for start in sorted(graph):
        circle = _way_back(graph, start)
        if circle is not None:
            found.setdefault(frozenset(circle), circle)
    return list(found.values())


def _way_back(graph: Mapping[str, set[str]], start: str) -> list[str] | None:
    """The shortest way from a module to itself, breadth first; None if there is none."""
    came_from: dict[str, str] = {}
    front = [start]
    while front:
        following = []
        for module in front:
            for target in sorted(graph[module]):
                if target == start:
                    way = [module]
                    while way[-1] != start:
                        way.append(came_from[way[-1]])
                    return way[::-1]
                if target not in came_from:
                    came_from[target] = module
                    following.append(target)
        front = following
    return None


# ------------------------------------------------------------------------------------------------ command


def main(argv: Sequence[str] | None = None) -> int:
    """Print the figures, or the circles; the exit code is 1 if there are circles."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkouts", nargs="*", type=Path, default=[Path(__file__).parents[1]])
    parser.add_argument("--circles", action="store_true", help="print the import circles instead")
    parser.add_argument("--patches", action="store_true", help="print the private names that tests patch")
    args = parser.parse_args(argv)
    if args.patches:
        print("\n".join(line for root in args.checkouts for line in private_patches(root)) or "none")
        return 0
    if args.circles:
        found = [circle for root in args.checkouts for circle in circles(imports(product_files(root)))]
        print("\n".join(" -> ".join([*circle, circle[0]]) for circle in found) or "none")
        return 1 if found else 0
    columns = [measures(root) for root in args.checkouts]
    for title in columns[0]:
        print(f"| {title} | " + " | ".join(str(column[title]) for column in columns) + " |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
