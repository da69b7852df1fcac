"""Tables of how long a chapter takes to read and to run, and on what machine.

- The role `minutes`, with the name of a chapter: how long it takes to read, and how long it ran.
- The directive `run-times`: how long each chapter ran, as a table.
- The directive `machine`: the machine that builds the book, as a table.
"""

from __future__ import annotations

import os
import platform
from importlib import metadata

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective, SphinxRole

SETTINGS = ("PAIRDIFF_PROFILE", "PAIRDIFF_DATA", "PAIRDIFF_OASIS2D")  # that decide the numbers in a chapter
SHOWN_VERSIONS = ("torch", "monai", "numpy", "lightning-fabric", "matplotlib", "jupyter-book")
WORDS, LINES = 120, 25  # of technical prose, and of code that is shown, that one reads in a minute


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
        """Return the placeholder; `fill_in_times` replaces it."""
        always_read_anew(self.env)
        return [RunTimes()]


class Minutes(nodes.Inline, nodes.Element):
    """Stands where the times of one chapter go, until it has run."""


class MinutesRole(SphinxRole):
    """`{minutes}` with the name of a chapter: how long it takes to read and to run."""

    def run(self) -> tuple[list[nodes.Node], list[nodes.system_message]]:
        """Return the placeholder; `fill_in_times` replaces it."""
        always_read_anew(self.env)
        return [Minutes(chapter=self.text)], []


def ran(env: BuildEnvironment) -> dict[str, float]:
    """Return the seconds that each chapter took, in the order of the book."""
    data = NbMetadataCollector.get_doc_data(env)
    times = {name: (found.get("exec_data") or {}).get("runtime") for name, found in data.items()}
    chapters = [name for name in times if name.startswith("notebooks/") and times[name] is not None]
    return {name: times[name] for name in sorted(chapters, key=lambda name: env.toc_secnumbers[name][""])}


def is_read(node: nodes.Node | None) -> bool:
    """Return whether a reader sees a node without unfolding anything; outputs of code do not count."""
    while node is not None:
        is_folded = node.get("hide_mode") or node.get("design_component") == "dropdown"
        if is_folded or node.get("nb_element") == "cell_code_output":
            return False
        node = node.parent
    return True


def reading_minutes(doctree: nodes.document) -> int:
    """Return how long a chapter takes to read, without what is folded away."""
    words = sum(len(each.astext().split()) for each in doctree.findall(nodes.paragraph) if is_read(each))
    lines = sum(len(each.astext().splitlines()) for each in doctree.findall(nodes.literal_block) if is_read(each))
    return max(1, round(words / WORDS + lines / LINES))


def fill_in_times(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace each `RunTimes` and `Minutes` once all chapters have run."""
    env = app.env
    seconds = ran(env)
    for placeholder in list(doctree.findall(RunTimes)):
        rows: list[tuple[nodes.Node | str, str]] = []
        for name in seconds:
            title = f"{env.toc_secnumbers[name][''][0]}. {env.titles[name].astext()}"
            address = app.builder.get_relative_uri(docname, name)
            rows.append((nodes.reference("", title, internal=True, refuri=address), f"{seconds[name]:.0f} s"))
        rows.append(("all chapters", f"{sum(seconds.values()):.0f} s"))
        placeholder.replace_self(table(rows, ("Chapter", "Run time")))
    for placeholder in list(doctree.findall(Minutes)):
        name = f"notebooks/{placeholder['chapter']}"
        text = f"{reading_minutes(env.get_doctree(name))} min"
        text += f", {seconds[name]:.0f} s" if name in seconds else ""
        placeholder.replace_self(nodes.Text(text))


def always_read_anew(env: BuildEnvironment) -> None:
    """Mark the current page, so that no table on it is ever of an earlier build."""
    env.metadata[env.docname]["pairdiff_times"] = True


def machine_pages(app: Sphinx, env: BuildEnvironment, added: set, changed: set, removed: set) -> list[str]:
    """Name the pages that show run times or the machine: they are always stale."""
    return [name for name in env.found_docs if env.metadata.get(name, {}).get("pairdiff_times")]


def setup(app: Sphinx) -> None:
    """Add the role, the directives, and what fills them in."""
    app.add_node(RunTimes)
    app.add_node(Minutes)
    app.add_role("minutes", MinutesRole())
    app.add_directive("machine", MachineTable)
    app.add_directive("run-times", RunTimesTable)
    app.connect("doctree-resolved", fill_in_times)
    app.connect("env-get-outdated", machine_pages)
