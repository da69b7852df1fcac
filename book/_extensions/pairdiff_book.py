"""What this book adds to Jupyter Book, besides `book_times` and `book_links`.

- Launch buttons, "edit this page" and repository links appear only when `repository.url` in `_config.yml`
  is set, launch buttons only on chapters.
- Every page is read and run again when the packages, the profile or the data folder changed, which Sphinx
  alone would not notice: it compares pages only.
- Each chapter offers its executed notebook for download.
- A page loads the libraries of equations and widgets only if it shows some, and no icon that it does not draw.
- Previews of links show what a page is about and, if the site's address is known, a picture.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from html import escape
from pathlib import Path
from typing import Any

import book_links
import book_times
from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.config import Config

REPOSITORY_BUTTONS = ("use_repository_button", "use_edit_page_button", "use_issues_button")
PREVIEW = "_static/preview.png"
# An icon in the theme's script: its name, its size with other names, its code point, and one or two paths.
ICON = re.compile(r'("?[a-z0-9-]+"?:\[\d+,\d+,\[[^\]]*\]),"[0-9a-f]+",(?:"[^"]*"|\["[^"]*","[^"]*"\])\],?')


def fingerprint(root: Path) -> str:
    """Return a hash that changes with the code of the packages, the pinned versions, or the settings."""
    digest = hashlib.sha256()
    for path in (*sorted(root.glob("pairdiff_*/**/*.py")), root / "constraints.txt"):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for name in book_times.SETTINGS:
        digest.update(f"{name}={os.environ.get(name, '')}\n".encode())
    return digest.hexdigest()[:16]


def show_repository_buttons(theme_options: dict[str, Any]) -> None:
    """Switch the buttons that lead to the repository on when its address is set, and off when it is not."""
    is_set = bool(theme_options.get("repository_url"))
    for button in REPOSITORY_BUTTONS:
        theme_options[button] = is_set
    if not is_set:
        for option in ("launch_buttons", "repository_url", "repository_branch"):
            theme_options.pop(option, None)


def set_up_config(app: Sphinx, config: Config) -> None:
    """Fill in what `_config.yml` cannot know."""
    show_repository_buttons(config.html_theme_options)
    address = config.html_theme_options.get("repository_url", "")
    if match := re.fullmatch(r"https://github\.com/([\w.-]+)/([\w.-]+?)/?", address):
        config.html_baseurl = config.html_baseurl or f"https://{match[1].lower()}.github.io/{match[2]}/"
    config.pairdiff_fingerprint = fingerprint(Path(app.confdir))


def offer_notebook(app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Put the executed notebook of a chapter beside its page, and let the download button name it."""
    executed = Path(app.outdir).parent / "jupyter_execute" / f"{pagename}.ipynb"
    if doctree is None or "kernelspec" not in app.env.metadata.get(pagename, {}) or not executed.is_file():
        return
    copy = Path(app.outdir) / "_sources" / f"{pagename}.ipynb"
    copy.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(executed, copy)
    context["ipynb_source"] = f"{pagename}.ipynb"


def leave_out_unused_widgets(
    app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Let a page load the widget library only if it shows a widget."""
    if "vnd.jupyter.widget-view+json" not in context.get("body", ""):
        NbMetadataCollector.get_doc_data(app.env).get(pagename, {}).pop("js_files", None)


def leave_out_unused_mathjax(
    app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Let a page load MathJax only if it shows an equation."""
    if 'class="math' not in context.get("body", ""):
        context["script_files"] = [each for each in context["script_files"] if "mathjax" not in str(each.filename)]


def leave_out_unused_icons(app: Sphinx, error: Exception | None) -> None:
    """Keep only those of the theme's 2,000 icons (1.5 MB, loaded by every page) that a page or a script names."""
    icons = Path(app.outdir) / "_static" / "scripts" / "fontawesome.js"
    if error or not icons.is_file():
        return
    named: set[str] = set()
    for path in (*Path(app.outdir).rglob("*.html"), *Path(app.outdir).rglob("*.js")):
        if path != icons and "vendor" not in path.parts:  # the widget library brings its own
            named |= set(re.findall(r"\bfa-([a-z0-9-]+)", path.read_text()))
    kept = ICON.sub(lambda icon: icon[0] if named & set(re.findall(r"[a-z0-9-]+", icon[1])) else "", icons.read_text())
    icons.write_text(kept)


def describe_page(app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None) -> None:
    """Say in the head what the page is about, for previews of links; the front page has its title once."""
    if pagename == app.config.root_doc:
        context["docstitle"] = ""
    if doctree is None:
        return
    tags = context.get("metatags", "")
    first = next((each for each in doctree.findall(nodes.paragraph) if isinstance(each.parent, nodes.section)), None)
    if 'name="description"' not in tags and first is not None:
        about = escape(" ".join(first.astext().split()))
        title = escape(app.env.titles[pagename].astext())
        tags += f'<meta name="description" content="{about}" />\n<meta property="og:title" content="{title}" />\n'
        tags += f'<meta property="og:description" content="{about}" />\n'
    if site := app.config.html_baseurl:
        tags += f'<meta property="og:image" content="{site.rstrip("/")}/{PREVIEW}" />\n'
        tags += '<meta name="twitter:card" content="summary_large_image" />\n'
    context["metatags"] = tags


def leave_out_launch_buttons(
    app: Sphinx, pagename: str, template: str, context: dict, doctree: nodes.document | None
) -> None:
    """Show buttons of Binder and Colab only where a notebook of that name exists in the repository."""
    if not Path(app.env.doc2path(pagename)).with_suffix(".ipynb").exists():
        buttons = context["header_buttons"]
        context["header_buttons"] = [each for each in buttons if each.get("label") != "launch-buttons"]


def name_folded_solutions(app: Sphinx, doctree: nodes.document) -> None:
    """Cells that are folded with their outputs are solutions of exercises: say so on the fold."""
    for cell in doctree.findall(nodes.container):
        if cell.get("hide_mode") == "all":
            cell["prompt_show"], cell["prompt_hide"] = "Show solution: code", "Hide solution: code"


def escape_shapes(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Keep the stars of shapes such as (N, *spatial), and bars such as |u|, from being markup; *word* is emphasis."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [re.sub(r"(?<!\*)\*(?=[A-Za-z])(?![A-Za-z]+\*)|\|", r"\\\g<0>", part) for part in parts[::2]]
        lines[index] = "".join(parts)


def leave_out_imported(app: Sphinx, what: str, name: str, of: Any, skip: bool, options: Any) -> bool | None:
    """Show a member where it is defined, or in the folder that exports it; None leaves the decision to Sphinx."""
    module = getattr(of, "__module__", None) or ""
    return True if what == "module" and not module.startswith(app.env.temp_data["autodoc:module"]) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    book_times.setup(app)
    book_links.setup(app)
    app.add_config_value("pairdiff_fingerprint", "", "env")
    # The theme draws icons by replacing their elements, which breaks the Play widget: nest them instead.
    app.add_js_file(None, body="if (window.FontAwesome) { FontAwesome.config.autoReplaceSvg = 'nest'; }")
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)  # before napoleon (500)
    app.connect("autodoc-skip-member", leave_out_imported)
    app.connect("config-inited", set_up_config, priority=400)
    app.connect("build-finished", leave_out_unused_icons)
    app.connect("doctree-read", name_folded_solutions)
    app.connect("html-page-context", offer_notebook, priority=400)  # before the theme draws its buttons (500)
    app.connect("html-page-context", leave_out_unused_widgets, priority=400)  # before myst_nb adds its files (500)
    app.connect("html-page-context", leave_out_unused_mathjax, priority=600)  # after Sphinx added it (500)
    app.connect("html-page-context", describe_page)
    app.connect("html-page-context", leave_out_launch_buttons, priority=600)  # after the theme added them (500)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
