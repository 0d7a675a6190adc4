"""Imports go one way, and the project does not claim common names on anybody's import path."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import ROOT

LAYERS = {"scripts": 3, "kandinsky5": 2, "dataset": 1, "networks": 1, "modules": 0}

PACKAGE_ORDER = {
    "kandinsky5": (
        ("tasks", "weight_checks", "tiny_tokenizers"),
        ("prompts",),
        ("configs",),
        ("cli", "model"),
        ("vae", "text"),
        ("sampling",),
        ("memory",),
        ("caching", "generation", "training"),
        ("recipes",),
        ("tiny_models", "prompt_templates", "gpu_check", "quantise", "report", "configure"),
        ("small_world",),
    ),
    "kandinsky5/training": (("loss", "results"), ("tracking",), ("validation",), ("*",)),
}
"""Modules and packages of a folder in groups: each imports from groups before its own, none from its own.

A last group `*` stands for all modules of the folder that are not named; these may import each other.
"""


def imported_modules(path: Path) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: list[str] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            # `from package import module` imports the module.
            names += [f"{node.module}.{alias.name}" for alias in node.names]
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


@pytest.mark.parametrize("folder", PACKAGE_ORDER)
def test_packages_import_in_one_order(root: Path, folder: str) -> None:
    ranks = {name: rank for rank, group in enumerate(PACKAGE_ORDER[folder]) for name in group}
    prefix = folder.replace("/", ".") + "."
    unnamed, wrong = set(), []
    for path in sorted((root / folder).rglob("*.py")):
        here = path.relative_to(root / folder).parts[0].removesuffix(".py")
        if here == "__init__":
            continue
        if "*" not in ranks and here not in ranks:
            unnamed.add(here)
        for name in imported_modules(path):
            target = name.removeprefix(prefix).split(".")[0]
            if not name.startswith(prefix) or target == here:
                continue
            ours, theirs = ranks.get(here, ranks.get("*")), ranks.get(target, ranks.get("*"))
            is_free = here not in ranks and target not in ranks
            if ours is not None and theirs is not None and theirs >= ours and not is_free:
                wrong.append(f"{path.relative_to(root)} imports {name}")
    assert not unnamed, "add these to PACKAGE_ORDER"
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


@pytest.mark.parametrize("script", sorted(path.name for path in ROOT.glob("kandinsky5_*.py")))
def test_help_needs_the_standard_library_alone(script: str) -> None:
    command = [sys.executable, "-S", script, "--help"]  # -S: without installed packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "--task" in done.stdout or "--dataset_config" in done.stdout
