"""The built pages in a browser, at the widths of a desktop and of a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

HTML = Path(__file__).parents[1] / "book" / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("[bn]*/*.html"))  # book/ and notebooks/
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESK, PHONE = 1440, 390  # widths of the window
# What axe reports about the theme itself, not about what this book adds to it. It need not look for that; contrasts
# alone take most of its time.
OF_THE_THEME = {
    "aria-required-children",
    "color-contrast",
    "scrollable-region-focusable",
    "label",
    "landmark-unique",
    "link-in-text-block",
}

pytestmark = [pytest.mark.skipif(not PAGES, reason="no built book here: `make book`")]
if not CHROMIUM and not os.environ.get("PAIRDIFF_NEEDS_CHROMIUM"):  # .ci/run sets it
    pytestmark.append(pytest.mark.skip(reason="no Chromium here: install it, such as Debian's package chromium"))


@dataclass
class Opened:
    """A page, its errors, and its requests to other hosts."""

    address: str
    page: Any
    errors: list[str] = field(default_factory=list)
    foreign: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.page.on("console", lambda message: self.errors.append(message.text) if message.type == "error" else None)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("request", lambda each: self.foreign.append(each.url) if each.url.startswith("http") else None)
        path, *query = self.address.split("?")
        self.page.goto("?".join([(HTML / path).as_uri(), *query]))
        self.page.wait_for_load_state("load")
        self.page.wait_for_timeout(300)  # for scripts that start late


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # pages are files, and a page may read its search index beside it
        options = ["--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope="module", params=PAGES)
def opened(request: pytest.FixtureRequest, browser: Any) -> Iterator[Opened]:
    """Each page in turn, opened once for all tests of it."""
    page = browser.new_page(viewport={"width": DESK, "height": 900})
    yield Opened(request.param, page)
    page.close()


def test_a_page_opens_without_errors_and_from_this_host_alone(opened: Opened) -> None:
    assert not opened.errors
    assert not opened.foreign
    assert all(opened.page.evaluate("Array.from(document.images, image => image.complete && image.naturalWidth > 0)"))


def test_axe_finds_nothing_serious_that_this_book_adds(opened: Opened) -> None:
    from axe_playwright_python.sync_playwright import Axe

    looked_for = {"resultTypes": ["violations"], "rules": {name: {"enabled": False} for name in OF_THE_THEME}}
    violations = Axe().run(opened.page, options=looked_for).response["violations"]
    ours = {each["id"]: [node["html"][:120] for node in each["nodes"][:3]] for each in violations
            if each["impact"] in ("serious", "critical")}  # fmt: skip
    assert not ours


def test_solutions_unfold(opened: Opened) -> None:
    folded = opened.page.locator("article details:not([open]) > summary")
    if opened.address.startswith("notebooks/"):
        assert folded.count()
    for summary in folded.all()[:1]:
        details = summary.locator("..").element_handle()
        summary.click()
        assert details.get_attribute("open") is not None


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_page_fits_the_window(opened: Opened, width: int) -> None:
    opened.page.set_viewport_size({"width": width, "height": 900})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a page by its address."""
    page = browser.new_page(viewport={"width": DESK, "height": 900})
    yield lambda address: Opened(address, page).page
    page.close()


def test_an_animation_follows_its_slider(open_page: Any) -> None:
    player = open_page("notebooks/05_registration.html").locator("div.animation").first
    player.scroll_into_view_if_needed()
    before = player.locator("img").get_attribute("src")
    slider = player.locator("input[type=range]")
    slider.evaluate("slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    slider.evaluate("slider => { slider.dispatchEvent(new Event('change')); }")
    player.page.wait_for_timeout(300)
    assert player.locator("img").get_attribute("src") != before


def test_search_finds_pages_by_their_words(open_page: Any) -> None:
    page = open_page("search.html?q=codebook")
    page.wait_for_selector("#search-results li a", timeout=15000)
    links = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any("03_vqae" in link for link in links)


def test_search_words_are_not_marked_inside_other_words(open_page: Any) -> None:
    page = open_page("book/glossary.html?highlight=tre")
    page.wait_for_selector("span.highlighted", timeout=15000)
    page.wait_for_timeout(300)
    neighbours = "[mark.previousSibling, mark, mark.nextSibling].map(node => node?.textContent ?? '')"
    marked = page.locator("span.highlighted").evaluate_all(f"marks => marks.map(mark => {neighbours})")
    assert "centre" in page.locator("article").inner_text()
    for before, word, after in marked:
        assert word.lower() == "tre" and not before[-1:].isalpha() and not after[:1].isalpha(), before + word + after
