"""Put the cell that prepares Google Colab before the first code cell of each chapter, in its text and its notebook.

`make sync` calls it: `python notebooks/colab.py notebooks/01_why_pairs.md ...`. The address is that of `_config.yml`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import nbformat
import yaml

CELL = """\
# On Colab only: fetch the book and install its core.
import sys

if "google.colab" in sys.modules:
    import os
    import subprocess

    ADDRESS = {address}
    BRANCH = {branch}
    if not ADDRESS:
        sys.exit("This book has no address, so Colab cannot fetch it.")
    book = "/content/pairdiff"
    if not os.path.isdir(book):
        clone = ["git", "clone", "--depth", "1", "--branch", BRANCH, ADDRESS, book]
        subprocess.run(clone, check=True)
    # Without constraints.txt, which is for Python 3.11 and would replace Colab's torch.
    # Chapters import only the core and myst-nb.
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "-e", book, "myst-nb"]
    subprocess.run(pip, check=True)
    sys.path.insert(0, book)  # this process does not see what was installed just now
    os.chdir(f"{{book}}/notebooks")"""
MARK = CELL.splitlines()[0]
IN_TEXT = "```{code-cell} ipython3\n---\ntags: [remove-cell]\n---\n"


def put_cell(chapter: Path, address: str, branch: str) -> None:
    """Put the cell into the text at `chapter` and the notebook beside it, or bring the one that is there up to date.

    The text is changed as text: jupytext would write every header of a cell anew.
    """
    source = CELL.format(address=json.dumps(address), branch=json.dumps(branch))
    there = rf"```{{code-cell}}[^`]*{re.escape(MARK)}[^`]*```\n\n"  # with any header: JupyterLab writes its own
    text = re.sub(there, "", chapter.read_text())
    before, first, after = text.partition("```{code-cell}")
    new = f"{before}{IN_TEXT}{source}\n```\n\n{first}{after}"
    if new != chapter.read_text():
        chapter.write_text(new)
    path = chapter.with_suffix(".ipynb")
    notebook = nbformat.read(path, as_version=4)
    if any(cell.source == source for cell in notebook.cells):
        return
    cells = [cell for cell in notebook.cells if not cell.source.startswith(MARK)]
    first_code = next(number for number, cell in enumerate(cells) if cell.cell_type == "code")
    cells.insert(first_code, nbformat.v4.new_code_cell(source, metadata={"tags": ["remove-cell"]}))
    notebook.cells = cells
    nbformat.write(notebook, path)


if __name__ == "__main__":
    repository = yaml.safe_load((Path(__file__).parents[1] / "_config.yml").read_text())["repository"]
    for name in sys.argv[1:]:
        put_cell(Path(name), repository["url"], repository["branch"])
