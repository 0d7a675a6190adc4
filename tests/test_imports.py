"""Imports go one way, and the project does not claim common names on anybody's import path."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

LAYERS = {"scripts": 3, "kandinsky5": 2, "dataset": 1, "networks": 1, "modules": 0}


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.append(node.module or "")
    return names


def test_imports_go_from_scripts_down_to_modules(root: Path) -> None:
    sources = [*root.glob("*.py"), *(path for layer in LAYERS for path in (root / layer).rglob("*.py"))]
    wrong = []
    for path in sources:
        relative = path.relative_to(root)
        here = relative.parts[0] if len(relative.parts) > 1 else "scripts"
        for name in imported_modules(path):
            target = name.split(".")[0]
            if target in LAYERS and target != here and LAYERS[target] >= LAYERS[here]:
                wrong.append(f"{relative} imports {name}")
    assert not wrong


@pytest.mark.parametrize("package", ["configs", "cli"])
def test_command_lines_do_not_wait_for_torch(root: Path, package: str) -> None:
    modules = sorted(path.stem for path in (root / "kandinsky5" / package).glob("[a-z]*.py"))
    code = "import sys, " + ", ".join(f"kandinsky5.{package}.{name}" for name in modules)
    code += "; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=root, check=True)


def test_a_foreign_dataset_package_does_not_get_in_the_way(root: Path, tmp_path: Path) -> None:
    """`dataset`, `modules` and `networks` are common names: ours win in our scripts, theirs elsewhere."""
    for name in ("dataset", "modules", "networks"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("FOREIGN = True\n", encoding="utf-8")
    site = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import runpy; sys.argv = ['x', '--help']; "
    for script in sorted(root.glob("kandinsky5_*.py")):
        # As `python SCRIPT` sets it: the script's folder comes before site-packages.
        run = f"runpy.run_path({str(script)!r}, run_name='__main__')"
        code = f"import sys; sys.path[0] = {str(root)!r}; {site}{run}"
        result = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stderr
    code = f"import sys; sys.path.insert(1, {str(tmp_path)!r}); import dataset; assert dataset.FOREIGN"
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
