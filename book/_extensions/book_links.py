"""Links of the book: definitions that show on hover, the works a chapter cites, units, front page.

- Links to the glossary show the first sentence of a definition when the pointer rests on them.
- The directive `works-cited`: the works that the page cites.
- A number and its unit stay on one line.
- The directive `front-buttons`: where to start, the results and, if the repository has an address, its code.
"""

from __future__ import annotations

import re

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

GLOSSARY = "book/glossary"
UNITS = r"(?:mm|dB|GiB|GB|MB|min|s|h|seconds|minutes|times|voxels?|pixels?|steps)\b|%"
NO_BREAK = "\N{NO-BREAK SPACE}"
PAGES = {
    "Start reading": "notebooks/01_why_pairs",
    "What we found": "book/what_we_found",
    "Results": "notebooks/10_results",
}


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


class Works(nodes.General, nodes.Element):
    """Stands where the works that a page cites go, until the bibliography is formatted."""


class WorksCited(SphinxDirective):
    """`{works-cited}`: the works that this page cites, as a list."""

    def run(self) -> list[nodes.Node]:
        """Return the placeholder; `list_works` replaces it."""
        return [Works()]


def list_works(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Replace each `Works` by the list of the works that the page cites."""
    placeholders = list(doctree.findall(Works))
    if not placeholders:
        return
    domain = app.env.get_domain("cite")
    keys = {target.key for ref in domain.citation_refs if ref.docname == docname for target in ref.targets}
    cited = [each.formatted_entry for each in domain.citations if each.key in keys]
    for placeholder in placeholders:
        works = (nodes.list_item("", domain.backend.paragraph(entry)) for entry in cited)
        placeholder.replace_self(nodes.bullet_list("", *works))


def keep_units(app: Sphinx, doctree: nodes.document, docname: str) -> None:
    """Put a space that does not break between a number, which may be a glued one, and its unit."""
    as_they_are = (nodes.literal, nodes.literal_block, nodes.math, nodes.math_block, nodes.raw)
    for element in doctree.findall(lambda node: isinstance(node, nodes.TextElement)):
        if isinstance(element, as_they_are):
            continue
        before = ""
        for position, child in enumerate(element.children):
            if isinstance(child, nodes.Text):
                kept = re.sub(rf"(?<=\d) (?={UNITS})", NO_BREAK, child)
                if before[-1:].isdigit():
                    kept = re.sub(rf"^ (?={UNITS})", NO_BREAK, kept)
                element[position] = nodes.Text(kept)
            before = child.astext()


class FrontButtons(SphinxDirective):
    """`{front-buttons}`: links to the start and the results and, if the repository has an address, to its code."""

    def run(self) -> list[nodes.Node]:
        """Return a row of buttons."""
        there = self.env.app.builder.get_relative_uri
        buttons = {name: there(self.env.docname, page) for name, page in PAGES.items()}
        if address := self.config.html_theme_options.get("repository_url"):
            branch = self.config.html_theme_options.get("repository_branch", "main")
            buttons |= {"Code": address, "Download": f"{address}/archive/refs/heads/{branch}.zip"}
        row = nodes.paragraph(classes=["front-buttons"])
        for index, (name, target) in enumerate(buttons.items()):
            look = "sd-btn-primary" if index == 0 else "sd-btn-outline-primary"
            row += nodes.reference("", name, refuri=target, classes=["sd-btn", look])
        return [row]


def setup(app: Sphinx) -> None:
    """Add the directives, and what fills in definitions and works."""
    app.add_node(Works)
    app.add_directive("works-cited", WorksCited)
    app.add_directive("front-buttons", FrontButtons)
    app.connect("doctree-resolved", show_definitions)
    app.connect("doctree-resolved", list_works)
    app.connect("doctree-resolved", keep_units, priority=900)  # after the glued numbers are in place
