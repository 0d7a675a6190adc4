"""The script that measures the code finds what there is to find in a small checkout."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.code_measures import circles, imports, main, measures, private_patches, product_files


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    files = {
        "run.py": "import modules.a\n",
        "modules/__init__.py": '"""A marker."""\n',
        "modules/a.py": "from modules import b\n\n\ndef add(x, y, *rest):\n    return x + y\n",
        "modules/b.py": "def late():\n    from modules.c import C\n    return C\n",
        "modules/c.py": "import modules.a\n\n\nclass C:\n    def both(self, one, two): ...\n",
        "tests/test_a.py": (
            "def test(monkeypatch):\n"
            '    monkeypatch.setattr("modules.a._hidden", 1)\n'
            '    monkeypatch.setattr(a, "_hidden", 1)\n'
            '    monkeypatch.setattr(a, "add", "_hidden")\n'
            '    monkeypatch.setattr(a, "__version__", 1)\n'
        ),
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_circles_go_through_late_imports_too(checkout: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = circles(imports(product_files(checkout)))
    assert found == [["modules.a", "modules.b", "modules.c"]]
    assert main(["--circles", str(checkout)]) == 1
    assert capsys.readouterr().out == "modules.a -> modules.b -> modules.c -> modules.a\n"
    (checkout / "modules" / "c.py").unlink()
    assert main(["--circles", str(checkout)]) == 0


def test_sizes_are_counted(checkout: Path) -> None:
    found = measures(checkout)
    assert found["product files"] == 4
    assert found["product lines"] == 1 + 5 + 3 + 5
    assert str(found["longest function, lines"]) == "3 (modules/b.py late)"
    assert str(found["most parameters outside cli"]) == "3 (modules/a.py add)"
    assert str(found["largest class, lines"]) == "2 (modules/c.py C)"


def test_private_names_that_tests_replace_are_found(checkout: Path) -> None:
    assert list(private_patches(checkout)) == ["tests/test_a.py:2: _hidden", "tests/test_a.py:3: _hidden"]


def test_no_module_of_the_product_imports_itself_by_way_of_others(root: Path) -> None:
    being_removed = ["kandinsky5.generation.interactive", "kandinsky5.generation.run"]
    assert [circle for circle in circles(imports(product_files(root))) if circle != being_removed] == []
