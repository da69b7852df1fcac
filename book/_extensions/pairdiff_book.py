"""What this book adds to Jupyter Book.

- Launch buttons, "edit this page" and repository links appear only when `repository.url` in `_config.yml`
  is set.
- Every page is read and run again when the packages, the profile or the data folder changed, which Sphinx
  alone would not notice: it compares pages only.
- The directives `run-times` and `machine`: how long each chapter took, and on what, as the build found it.
- Each chapter offers its executed notebook for download.
- Links to the glossary show the first sentence of a definition when the pointer rests on them.
"""

from __future__ import annotations

import hashlib
import os
import platform
import re
import shutil
from importlib import metadata
from pathlib import Path
from typing import Any

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective

# What decides the numbers in a chapter, besides its own text.
SETTINGS = ("PAIRDIFF_PROFILE", "PAIRDIFF_DATA", "PAIRDIFF_OASIS2D")
SHOWN_VERSIONS = ("torch", "monai", "numpy", "lightning-fabric", "matplotlib", "jupyter-book")
GLOSSARY = "book/glossary"
REPOSITORY_BUTTONS = ("use_repository_button", "use_edit_page_button", "use_issues_button")


def fingerprint(root: Path) -> str:
    """Return a hash that changes with the code of the packages, the pinned versions, or the settings."""
    digest = hashlib.sha256()
    for path in (*sorted(root.glob("pairdiff_*/**/*.py")), root / "constraints.txt"):
        if path.is_file():
            digest.update(path.relative_to(root).as_posix().encode() + path.read_bytes())
    for name in SETTINGS:
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
    config.pairdiff_fingerprint = fingerprint(Path(app.confdir))


def memory_gib() -> str:
    """Return the size of the main memory, or "unknown" where the system does not say."""
    try:
        return f"{os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES') / 2**30:.0f} GiB"
    except (ValueError, OSError, AttributeError):
        return "unknown"


def describe_machine() -> dict[str, str]:
    """Return what a run time depends on, as name and value."""
    import torch

    from pairdiff_core.storage import device_name

    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {
        "Processor": device_name(torch.device("cpu")),
        "Cores": str(cores),
        "Threads used": str(torch.get_num_threads()),
        "Memory": memory_gib(),
        "GPU": ", ".join(devices) or "none",
        "System": f"{platform.system()} {platform.machine()}",
        "Profile": os.environ.get("PAIRDIFF_PROFILE") or "quick",
        "Data": "a data folder" if any(os.environ.get(name) for name in SETTINGS[1:]) else "phantoms",
        "Python": platform.python_version(),
        **{name: metadata.version(name) for name in SHOWN_VERSIONS},
    }


def table(rows: list[tuple[nodes.Node | str, str]], heading: tuple[str, str] | None = None) -> nodes.table:
    """Return a table of two columns; a cell is text or a link."""

    def row(cells: tuple[nodes.Node | str, ...]) -> nodes.row:
        made = nodes.row()
        for cell in cells:
            content = nodes.Text(cell) if isinstance(cell, str) else cell
            made += nodes.entry("", nodes.paragraph("", "", content))
        return made

    group = nodes.tgroup(cols=2)
    group += [nodes.colspec(colwidth=1), nodes.colspec(colwidth=2)]
    if heading:
        group += nodes.thead("", row(heading))
    group += nodes.tbody("", *(row(cells) for cells in rows))
    return nodes.table("", group, classes=["colwidths-auto"])


class MachineTable(SphinxDirective):
    """`{machine}`: a table of the machine that builds the book, filled in while it builds."""

    def run(self) -> list[nodes.Node]:
        """Return the table."""
        always_read_anew(self.env)
        return [table(list(describe_machine().items()))]


class RunTimes(nodes.General, nodes.Element):
    """Stands where the table of run times goes, until every chapter has run."""


class RunTimesTable(SphinxDirective):
    """`{run-times}`: a table of how long each chapter took when it last ran."""

    def run(self) -> list[nodes.Node]:
        """Return the placeholder; `fill_in_run_times` replaces it."""
        always_read_anew(self.env)
        return [RunTimes()]


def fill_in_run_times(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace each `RunTimes` by the table, once all chapters have run."""
    env = app.env
    ran = NbMetadataCollector.get_doc_data(env)
    numbers = {name: env.toc_secnumbers.get(name, {}).get("", ()) for name in ran}
    for placeholder in list(doctree.findall(RunTimes)):
        rows: list[tuple[nodes.Node | str, str]] = []
        total = 0.0
        for name in sorted(ran, key=numbers.get):
            seconds = (ran[name].get("exec_data") or {}).get("runtime")
            if seconds is None or not name.startswith("notebooks/"):
                continue
            number = ".".join(map(str, numbers[name]))
            title = f"{number}. {env.titles[name].astext()}".removeprefix(". ")
            address = app.builder.get_relative_uri(docname, name)
            rows.append((nodes.reference("", title, internal=True, refuri=address), f"{seconds:.0f} s"))
            total += seconds
        rows.append(("all chapters", f"{total:.0f} s"))
        placeholder.replace_self(table(rows, ("Chapter", "Run time")))


def show_definitions(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Give each link to the glossary the first sentence of its definition as a title."""
    if GLOSSARY not in app.env.found_docs:
        return
    definitions: dict[str, str] = {}
    for entry in app.env.get_doctree(GLOSSARY).findall(nodes.definition_list_item):
        sentence = re.split(r"(?<=\.)\s", entry[-1].astext(), maxsplit=1)[0]
        definitions |= {anchor: sentence for term in entry.findall(nodes.term) for anchor in term["ids"]}
    for link in doctree.findall(nodes.reference):
        anchor = link.get("refid") or link.get("refuri", "").partition("#")[2]
        if anchor in definitions:
            link["reftitle"] = definitions[anchor]


def always_read_anew(env: BuildEnvironment) -> None:
    """Mark the current page, so that no table on it is ever of an earlier build."""
    env.metadata[env.docname]["pairdiff_machine"] = True


def machine_pages(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    """Name the pages that show run times or the machine: they are always stale."""
    return [name for name in env.found_docs if env.metadata.get(name, {}).get("pairdiff_machine")]


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


def escape_shapes(app: Sphinx, what: str, name: str, of: Any, options: Any, lines: list[str]) -> None:
    """Keep the stars of shapes such as (N, *spatial), and bars such as |u|, from being markup; *word* is emphasis."""
    for index, line in enumerate(lines):
        parts = re.split(r"(``.*?``)", line)
        parts[::2] = [re.sub(r"(?<!\*)\*(?=[A-Za-z])(?![A-Za-z]+\*)|\|", r"\\\g<0>", part) for part in parts[::2]]
        lines[index] = "".join(parts)


def leave_out_imported(app: Sphinx, what: str, name: str, of: Any, skip: bool, options: Any) -> bool | None:
    """Show a member where it is defined, or in the folder that hands it on; None decides nothing."""
    module = getattr(of, "__module__", None) or ""
    return True if what == "module" and not module.startswith(app.env.temp_data["autodoc:module"]) else None


def setup(app: Sphinx) -> dict[str, Any]:
    """Register the extension with Sphinx."""
    app.add_config_value("pairdiff_fingerprint", "", "env")
    app.add_node(RunTimes)
    app.add_directive("machine", MachineTable)
    app.add_directive("run-times", RunTimesTable)
    app.connect("doctree-resolved", fill_in_run_times)
    app.connect("doctree-resolved", show_definitions)
    # The theme draws icons by replacing their elements, which breaks the Play widget: nest them instead.
    app.add_js_file(None, body="if (window.FontAwesome) { FontAwesome.config.autoReplaceSvg = 'nest'; }")
    app.connect("autodoc-process-docstring", escape_shapes, priority=400)  # before napoleon (500)
    app.connect("autodoc-skip-member", leave_out_imported)
    app.connect("config-inited", set_up_config, priority=400)
    app.connect("env-get-outdated", machine_pages)
    app.connect("html-page-context", leave_out_unused_widgets, priority=400)  # before myst_nb adds its files (500)
    app.connect("html-page-context", offer_notebook, priority=400)  # before the theme draws its buttons (500)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
