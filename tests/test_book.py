"""The book's files fit together: chapters and notebooks, pages that need no network, buttons, references."""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import jupytext
import nbformat
import pytest
import yaml
from pybtex.database import parse_file

ROOT = Path(__file__).parents[1]
BOOK = ROOT / "book"
HTML = BOOK / "_build" / "html"
VENDOR = BOOK / "_static" / "vendor"
CHAPTERS = sorted((ROOT / "notebooks").glob("[0-9]*.md"))
BEYOND_TOKENS = [path for path in CHAPTERS if 12 <= int(path.stem[:2]) <= 16]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("[0-9]*.ipynb"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text())
TOC = yaml.safe_load((BOOK / "_toc.yml").read_text())
TOC_FILES = [entry["file"] for part in TOC["parts"] for entry in part["chapters"]]


# Chapters: the text (.md) and the notebook (.ipynb) beside it.


def test_chapters_are_all_there_and_in_the_table_of_contents() -> None:
    assert [path.stem for path in CHAPTERS] == [path.stem for path in NOTEBOOKS]
    listed = [name for name in TOC_FILES if name.startswith("notebooks/")]
    assert [f"notebooks/{path.stem}" for path in CHAPTERS] == sorted(listed)  # the book has its own order
    for name in [TOC["root"], *TOC_FILES]:
        assert (ROOT / f"{name}.md").is_file(), f"_toc.yml names {name}, which does not exist"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_hold_the_same_cells_as_their_notebooks(chapter: Path) -> None:
    text = jupytext.read(chapter)
    notebook = nbformat.read(chapter.with_suffix(".ipynb"), as_version=4)
    in_text = [(cell.cell_type, cell.source) for cell in text.cells]
    in_notebook = [(cell.cell_type, cell.source) for cell in notebook.cells]
    for number, (a, b) in enumerate(zip(in_text, in_notebook, strict=False)):
        assert a == b, f"cell {number} of {chapter.name} differs from its notebook: run `make sync`"
    assert len(in_text) == len(in_notebook), f"{chapter.name} and its notebook differ in length: run `make sync`"


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_name_the_kernel_that_every_machine_has(chapter: Path) -> None:
    for path in (chapter, chapter.with_suffix(".ipynb")):
        assert jupytext.read(path).metadata["kernelspec"]["name"] == "python3", path.name


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_ran_from_first_to_last_cell(notebook: Path) -> None:
    code = [cell for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "code" and cell.source]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1)), "run `make sync`"
    errors = [output for cell in code for output in cell.outputs if output.output_type == "error"]
    assert not errors


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_is_small(notebook: Path) -> None:
    assert notebook.stat().st_size < 1_000_000


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=lambda path: path.stem)
def test_committed_notebook_holds_no_path_of_the_machine_that_ran_it(notebook: Path) -> None:
    assert str(Path.home()) + "/" not in notebook.read_text()
    assert str(ROOT) + "/" not in notebook.read_text()


def test_chapters_use_plain_tqdm_nowhere() -> None:
    """`tqdm.auto` draws a bar that a notebook can show; bare `tqdm` fills its error stream."""
    for chapter in CHAPTERS:
        assert not re.search(r"^(from tqdm import|import tqdm\b)", chapter.read_text(), re.MULTILINE), chapter.name


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_code_of_chapters_fits_a_page(chapter: Path) -> None:
    cells = re.findall(r"```\{code-cell\}[^\n]*\n(.*?)```", chapter.read_text(), re.DOTALL)  # with their headers
    wide = [line for cell in cells for line in cell.splitlines() if len(line) > 88]
    assert cells
    assert not wide


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda path: path.stem)
def test_chapters_are_short_enough_to_read_at_once(chapter: Path) -> None:
    folded = {"hide-input", "hide-cell", "remove-input", "remove-cell"}
    cells = jupytext.read(chapter).cells
    code = [cell for cell in cells if cell.cell_type == "code" and not folded & set(cell.metadata.get("tags", ()))]
    lines = [line for cell in code for line in cell.source.splitlines() if line.strip()]
    assert len(lines) <= 150, f"{len(lines)} visible lines of code; CONTRIBUTING.md allows 150"
    text = " ".join(cell.source for cell in cells if cell.cell_type == "markdown")
    prose = re.sub(r"\$\$.*?\$\$|```.*?```", " ", text, flags=re.DOTALL)  # without formulas, commands and solutions
    words = sum(bool(re.search("[A-Za-z]", word)) for word in prose.split())
    assert words <= 2200, f"{words} words; CONTRIBUTING.md allows 2,200"


@pytest.mark.parametrize("chapter", BEYOND_TOKENS, ids=lambda path: path.stem)
def test_chapters_beyond_tokens_have_at_most_3000_words_of_prose_and_code(chapter: Path) -> None:
    cells = jupytext.read(chapter).cells
    unseen = {"remove-input", "remove-cell"}
    text = " ".join(cell.source for cell in cells if not unseen & set(cell.metadata.get("tags", ())))
    words = sum(bool(re.search("[A-Za-z0-9]", word)) for word in text.split())
    assert words <= 3000, f"{words} words"


# Pages that need no network.

LOADED = {
    "script": ("src",),
    "img": ("src", "srcset"),
    "iframe": ("src",),
    "source": ("src", "srcset"),
    "video": ("src", "poster"),
    "audio": ("src",),
    "embed": ("src",),
    "object": ("data",),
    "input": ("src",),
}
LOADED_LINKS = {"stylesheet", "icon", "shortcut", "apple-touch-icon", "preload", "prefetch", "preconnect"}
LOADED_LINKS |= {"dns-prefetch", "modulepreload", "manifest"}
ELSEWHERE = re.compile(r"\s*(?:[a-z][a-z+.-]*:)?//", re.IGNORECASE)
CSS_ELSEWHERE = re.compile(r"""(?:url\(|@import)\s*["']?\s*((?:https?:)?//[^"')\s]+)""", re.IGNORECASE)
CSS_COMMENT = re.compile(r"/\*.*?\*/", re.DOTALL)


class LoadedElsewhere(HTMLParser):
    """Collects addresses on other hosts that a browser loads to show a page; ordinary links do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.inside = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        names: tuple[str, ...] = LOADED.get(tag, ())
        if tag == "link" and LOADED_LINKS & set(values.get("rel", "").lower().split()):
            names = ("href",)
        self.found += [values[name] for name in names if ELSEWHERE.match(values.get(name, ""))]
        self.found += CSS_ELSEWHERE.findall(values.get("style", ""))
        self.inside = tag

    def handle_data(self, data: str) -> None:
        if self.inside == "style":
            self.found += CSS_ELSEWHERE.findall(CSS_COMMENT.sub("", data))

    def handle_endtag(self, tag: str) -> None:
        self.inside = ""


def loaded_elsewhere(page: str) -> list[str]:
    parser = LoadedElsewhere()
    parser.feed(page)
    return parser.found


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://a.example/x.js"></script>',
        '<link rel="stylesheet" href="//a.example/x.css">',
        '<img alt="" src="http://a.example/x.png">',
        "<style>@import url('https://a.example/f.css');</style>",
        '<p style="background: url(https://a.example/x.png)">',
    ],
)
def test_the_check_below_notices_what_it_should(page: str) -> None:
    assert loaded_elsewhere(page)


def test_the_check_below_leaves_ordinary_links_alone() -> None:
    assert not loaded_elsewhere(
        '<a href="https://a.example">x</a><img src="data:image/png;base64,AA=="><script src="../x.js">'
        '</script><link rel="canonical" href="https://a.example"><style>/* url(https://a.example) */</style>'
    )


needs_html = pytest.mark.skipif(not (HTML / "index.html").is_file(), reason="no built book here: `make book`")


@needs_html
def test_built_pages_load_nothing_from_elsewhere() -> None:
    pages = sorted(HTML.rglob("*.html"))
    assert len(pages) > len(TOC_FILES)
    found = {str(page.relative_to(HTML)): loaded_elsewhere(page.read_text()) for page in pages}
    assert not {page: addresses for page, addresses in found.items() if addresses}


@needs_html
def test_built_style_sheets_load_nothing_from_elsewhere() -> None:
    sheets = sorted(HTML.rglob("*.css"))
    assert sheets
    for sheet in sheets:
        text = CSS_COMMENT.sub("", sheet.read_text())
        assert not CSS_ELSEWHERE.findall(text), sheet.name


@needs_html
def test_built_pages_load_files_that_exist() -> None:
    for page in sorted(HTML.rglob("*.html")):
        if HTML / "_static" in page.parents:
            continue
        for address in re.findall(r'<(?:script|img)[^>]+src="([^":?#]+)[^"]*"', page.read_text()):
            assert (page.parent / address).exists(), f"{page.name} loads {address}, which is not there"


@needs_html
def test_built_pages_are_small_before_their_figures() -> None:
    """What is sent, since servers of pages compress: with scripts and style sheets, without pictures and widgets."""
    for page in sorted(HTML.glob("[bn]*/*.html")):
        text = page.read_text()
        loaded = re.findall(r'<script[^>]+src="([^":?#]+)', text)
        loaded += re.findall(r'<link[^>]+href="([^":?#]+\.css)', text)
        parts = [(page.parent / name).read_bytes() for name in {*loaded} if "jupyter-widgets" not in name]
        parts.append(re.sub(r"data:image/[^\"']+", "", text).encode())
        sent = sum(len(gzip.compress(part)) for part in parts)
        assert sent < 800_000, f"{page.name}: {sent} bytes"
    with_widgets = [page.stem for page in HTML.glob("[bn]*/*.html") if "jupyter-widgets" in page.read_text()]
    assert with_widgets == ["09_volume_registration"], "the widget library takes 3.6 MB: is it worth it?"


@needs_html
def test_built_chapters_list_the_works_that_they_cite() -> None:
    for chapter in CHAPTERS:
        cited = re.findall(r"\{cite(?::[a-z]+)?\}`([^`]+)`", chapter.read_text())
        page = (HTML / "notebooks" / f"{chapter.stem}.html").read_text()
        works = re.findall(r"<li>", page[page.index('id="references"') :].partition("</section>")[0])
        assert len(works) == len({key.strip() for keys in cited for key in keys.split(",")}), chapter.name


@needs_html
def test_built_front_page_says_how_long_each_chapter_takes() -> None:
    page = (HTML / "book" / "intro.html").read_text()
    assert "<title>PairDiff</title>" in page
    assert len(re.findall(r"<p>\d+\Wmin, \d+\Ws</p>", page)) == len(CHAPTERS)
    assert page.count('class="sd-btn') >= 3


@needs_html
def test_built_links_to_the_glossary_show_the_definition() -> None:
    page = (HTML / "notebooks" / "05_registration.html").read_text()
    links = re.findall(r'<a [^>]*href="[^"]*glossary\.html#term-[^>]*>', page)
    assert links and all(' title="' in link for link in links), links
    assert 'title="The image that stays in place."' in (HTML / "notebooks" / "01_why_pairs.html").read_text()


@needs_html
def test_built_chapters_ran_without_error_and_show_their_run_times() -> None:
    times = (HTML / "book" / "how_long.html").read_text()
    for chapter in CHAPTERS:
        assert f'href="../notebooks/{chapter.stem}.html"' in times
        executed = BOOK / "_build" / "jupyter_execute" / "notebooks" / f"{chapter.stem}.ipynb"
        cells = [c for c in nbformat.read(executed, as_version=4).cells if c.cell_type == "code"]
        assert cells
        assert not [o for cell in cells for o in cell.get("outputs", []) if o.output_type == "error"]
    assert len(re.findall(r"<p>\d+\Ws</p>", times)) == len(CHAPTERS) + 1


def test_vendored_libraries_are_unchanged_and_all_recorded() -> None:
    recorded = {
        name: digest
        for library in json.loads((VENDOR / "vendor.json").read_text()).values()
        for name, digest in library["files"].items()
    }
    here = {path for path in VENDOR.rglob("*") if path.is_file() and path.parent != VENDOR}
    assert {path.relative_to(VENDOR).as_posix() for path in here} == set(recorded)
    for path in here:
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        assert digest == recorded[path.relative_to(VENDOR).as_posix()], f"{path.name} was changed"


def test_vendored_libraries_come_with_their_licences() -> None:
    for name, library in json.loads((VENDOR / "vendor.json").read_text()).items():
        assert library["version"] and library["package"] and library["licence"], name
        assert (VENDOR / library["licence_file"]).stat().st_size > 500, name


def test_math_and_widgets_are_served_from_beside_the_pages() -> None:
    config = CONFIG["sphinx"]["config"]
    for path in (config["mathjax_path"], *config["nb_ipywidgets_js"], *config["html_css_files"]):
        assert (BOOK / "_static" / path).is_file(), path


# Buttons that lead to the repository.

ADDRESS = "https://github.com/someone/something"
LAUNCHERS = ("https://mybinder.org/", "https://colab.research.google.com/")


class Links(HTMLParser):
    """Collects where the links of a page lead."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag == "a":
            self.found.add(dict(attrs).get("href") or "")


def build_small_book(folder: Path, address: str) -> dict[str, set[str]]:
    """Build a front page and a chapter, both with a cell, by this project's settings; return the links of each.

    Only the chapter has a notebook (.ipynb) beside its text.
    """
    shutil.copytree(BOOK / "_extensions", folder / "book" / "_extensions")
    shutil.copytree(BOOK / "_static", folder / "book" / "_static", ignore=shutil.ignore_patterns("vendor"))
    shutil.copy(BOOK / "references.bib", folder / "book")
    config = json.loads(json.dumps(CONFIG))
    config["repository"]["url"] = address
    config["execute"]["execute_notebooks"] = "off"
    (folder / "_config.yml").write_text(yaml.safe_dump(config))
    pages = ("book/page", "notebooks/01_chapter")
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: {pages[0]}\nchapters:\n- file: {pages[1]}\n")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
    notebook.cells.insert(0, nbformat.v4.new_markdown_cell("# Page"))
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3"}
    (folder / "notebooks").mkdir()
    for page in pages:
        jupytext.write(notebook, folder / f"{page}.md", fmt="md:myst")
    nbformat.write(notebook, folder / f"{pages[1]}.ipynb")
    command = [str(Path(sys.executable).with_name("jupyter-book")), "build", "."]
    built = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert built.returncode == 0, built.stdout + built.stderr
    html = folder / "_build" / "html"
    return {page: Links((html / f"{page}.html").read_text()).found for page in pages}


def test_without_an_address_no_page_links_to_the_repository_or_a_launcher(tmp_path: Path) -> None:
    for page, links in build_small_book(tmp_path, "").items():
        assert not [link for link in links if link.startswith((*LAUNCHERS, "https://github.com"))]
        assert f"../_sources/{page}.md" in links, "the source is still offered"
        assert "og:image" not in (tmp_path / "_build" / "html" / f"{page}.html").read_text()


def test_with_an_address_all_buttons_lead_to_files_that_the_repository_has(tmp_path: Path) -> None:
    made = build_small_book(tmp_path, ADDRESS)
    launched = {
        "https://mybinder.org/v2/gh/someone/something/main?urlpath=lab/tree/notebooks/01_chapter.ipynb",
        "https://colab.research.google.com/github/someone/something/blob/main/notebooks/01_chapter.ipynb",
    }
    picture = '<meta property="og:image" content="https://someone.github.io/something/_static/preview.png" />'
    for page, links in made.items():
        assert picture in (tmp_path / "_build" / "html" / f"{page}.html").read_text()
        assert {link for link in links if link.startswith(LAUNCHERS)} == (launched if "chapter" in page else set())
        issue = f"{ADDRESS}/issues/new?title=Issue%20on%20page%20%2F{page}.html&body=Your%20issue%20content%20here."
        assert {link for link in links if link.startswith(ADDRESS)} == {
            ADDRESS, f"{ADDRESS}/edit/main/{page}.md", issue
        }  # fmt: skip
        assert (tmp_path / f"{page}.md").is_file()  # what the link to edit it names
        downloads = {link for link in links if link.startswith("../_sources/")}
        assert downloads == {f"../_sources/{page}.md", f"../_sources/{page}.ipynb"}
        for name in downloads:
            assert (tmp_path / "_build" / "html" / "book" / name).resolve().is_file()


@needs_html
def test_built_pages_have_launch_buttons_exactly_if_the_address_is_set() -> None:
    for chapter in CHAPTERS:
        page = (HTML / "notebooks" / f"{chapter.stem}.html").read_text()
        assert ("mybinder.org" in page) == bool(CONFIG["repository"]["url"])
    for page in (HTML / "book").glob("*.html"):
        assert not [link for link in Links(page.read_text()).found if link.startswith(LAUNCHERS)], page.name


# References.


def plain(text: str) -> str:
    """Return a title without its markup, case and punctuation."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower().replace("{", "").replace("}", "")).strip()


def test_citation_file_and_bibliography_list_the_same_works() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    entries = parse_file(str(BOOK / "references.bib")).entries
    in_bibliography = {plain(e.fields["title"]): int(e.fields["year"]) for e in entries.values()}
    assert {plain(r["title"]): r["year"] for r in citation["references"]} == in_bibliography
    dois = {e.fields["doi"] for e in entries.values() if "doi" in e.fields}
    assert {r["doi"] for r in citation["references"] if "doi" in r} == dois


def test_everything_cited_is_in_the_bibliography() -> None:
    known = set(parse_file(str(BOOK / "references.bib")).entries)
    for page in [*BOOK.glob("*.md"), *CHAPTERS]:
        for keys in re.findall(r"\{cite(?::[a-z]+)?\}`([^`]+)`", page.read_text()):
            assert {key.strip() for key in keys.split(",")} <= known, f"{page.name} cites {keys}"
