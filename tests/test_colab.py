"""The cell of each chapter that prepares Google Colab."""

from __future__ import annotations

import ast
import os
import runpy
import shutil
import subprocess
import sys
import types
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from test_setup import IMPORTED_AS, PACKAGES, PROJECT, ROOT

CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.md"))
REPOSITORY = yaml.safe_load((ROOT / "_config.yml").read_text())["repository"]
ADDRESS = "https://github.com/someone/something"
TEXT = """\
---
jupytext:
  text_representation:
    extension: .md
    format_name: myst
kernelspec:
  display_name: Python 3
  language: python
  name: python3
---

# A chapter

```{code-cell} ipython3
---
tags: [hide-input]
mystnb:
  figure:
    caption: |
      A caption of
      two lines.
---
1 + 1
```

Text.

```{code-cell} ipython3
2
```
"""
put_cell = runpy.run_path(str(ROOT / "notebooks" / "colab.py"))["put_cell"]


@pytest.fixture
def chapter(tmp_path: Path) -> Path:
    """A tiny chapter, as text and as notebook."""
    path = tmp_path / "01_tiny.md"
    path.write_text(TEXT)
    nbformat.write(jupytext.reads(TEXT, fmt="md:myst"), path.with_suffix(".ipynb"))
    return path


def cells(path: Path) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in jupytext.read(path).cells]


def put(chapter: Path, address: str = ADDRESS) -> str:
    """Put the cell into the chapter and return its code."""
    put_cell(chapter, address, "main")
    return next(source for kind, source in cells(chapter) if kind == "code")


def test_the_cell_comes_first_and_nothing_else_changes(chapter: Path) -> None:
    before = cells(chapter)
    source = put(chapter)
    assert source.startswith("# On Colab only") and f'"{ADDRESS}"' in source
    assert cells(chapter) == cells(chapter.with_suffix(".ipynb")) == [before[0], ("code", source), *before[1:]]
    for path in (chapter, chapter.with_suffix(".ipynb")):
        assert jupytext.read(path).cells[1].metadata["tags"] == ["remove-cell"]
    assert chapter.read_text().endswith(TEXT[TEXT.index("```{code-cell} ipython3\n---\ntags: [hide-input]") :])
    assert max(map(len, source.splitlines())) <= 88


def test_the_cell_is_there_once_and_follows_the_address(chapter: Path) -> None:
    files = (chapter, chapter.with_suffix(".ipynb"))
    put(chapter)
    first = [path.read_bytes() for path in files]
    put(chapter)
    assert [path.read_bytes() for path in files] == first
    moved = put(chapter, "https://github.com/other/place")
    assert "someone" not in moved and '"https://github.com/other/place"' in moved
    assert cells(files[0]) == cells(files[1])
    assert [source.startswith("# On Colab") for _, source in cells(chapter)].count(True) == 1
    jupytext.write(jupytext.read(chapter), chapter)  # as JupyterLab saves it, with another header
    put(chapter)
    assert cells(files[0]) == cells(files[1])
    assert chapter.read_text().count("# On Colab") == 1 and "someone" in chapter.read_text()


@pytest.fixture
def colab(monkeypatch: pytest.MonkeyPatch) -> list:
    """Makes this process look like one of Colab; what code runs, and the folder it changes to, are listed instead."""
    asked: list = []
    monkeypatch.setitem(sys.modules, "google.colab", types.ModuleType("google.colab"))
    monkeypatch.setattr(subprocess, "run", lambda command, check: asked.append((command, check)))
    monkeypatch.setattr(os, "chdir", asked.append)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return asked


def test_on_colab_the_cell_fetches_and_installs_the_book(chapter: Path, colab: list) -> None:
    exec(compile(put(chapter), "cell", "exec"), {})
    book = "/content/pairdiff"
    assert colab == [
        (["git", "clone", "--depth", "1", "--branch", "main", ADDRESS, book], True),
        ([sys.executable, "-m", "pip", "install", "--quiet", "-e", book, "myst-nb"], True),
        f"{book}/notebooks",
    ]
    assert sys.path[0] == book


def test_on_colab_a_second_run_does_not_fetch_again(chapter: Path, colab: list, monkeypatch) -> None:
    monkeypatch.setattr(os.path, "isdir", lambda path: path == "/content/pairdiff")
    exec(compile(put(chapter), "cell", "exec"), {})
    assert [command[0] for command, _ in colab[:-1]] == [sys.executable]


def test_on_colab_without_an_address_the_cell_stops_with_one_sentence(chapter: Path, colab: list) -> None:
    with pytest.raises(SystemExit, match=r"^This book has no address[^.]+\.$"):
        exec(compile(put(chapter, ""), "cell", "exec"), {})
    assert not colab


@pytest.mark.parametrize("address", ["", ADDRESS])
def test_elsewhere_the_cell_does_nothing(chapter: Path, colab: list, monkeypatch, address: str) -> None:
    monkeypatch.delitem(sys.modules, "google.colab")
    names: dict = {}
    exec(compile(put(chapter, address), "cell", "exec"), names)
    assert not colab and names.keys() == {"__builtins__", "sys"}


def test_sync_puts_the_cell_before_it_makes_the_notebooks() -> None:
    said = subprocess.run(["make", "--dry-run", "sync"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert 0 <= said.find("notebooks/colab.py notebooks/01") < said.find("jupytext --to ipynb")


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_have_the_cell_with_the_configured_address(chapter: Path, tmp_path: Path) -> None:
    copies = [Path(shutil.copy(path, tmp_path)) for path in (chapter, chapter.with_suffix(".ipynb"))]
    put_cell(copies[0], REPOSITORY["url"], REPOSITORY["branch"])
    for copy in copies:
        assert copy.read_bytes() == (chapter.parent / copy.name).read_bytes(), "run `make sync`"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_import_only_what_the_cell_installs(chapter: Path) -> None:
    core = {canonicalize_name(Requirement(text).name) for text in PROJECT["dependencies"]}
    known = {IMPORTED_AS.get(name, name.replace("-", "_")) for name in core} | {*PACKAGES, "myst_nb"}
    code = "\n".join(cell.source for cell in jupytext.read(chapter).cells if cell.cell_type == "code")
    for node in ast.walk(ast.parse(code)):
        modules = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        modules += [node.module] if isinstance(node, ast.ImportFrom) else []
        assert {module.split(".")[0] for module in modules} <= known | sys.stdlib_module_names
