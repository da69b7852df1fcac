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
PAGES += [name for name in ("genindex.html", "search.html") if (HTML / name).is_file()]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DESK, PHONE = 1440, 390  # widths of the window
# Sphinx's list of works has a role that axe calls deprecated, and items without the role that belongs to it.
OF_SPHINX = {"exclude": [[".citation-list"]]}

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

    options = {"resultTypes": ["violations"], "preload": False}  # else it asks for style sheets at wrong addresses
    violations = Axe().run(opened.page, context=OF_SPHINX, options=options).response["violations"]
    ours = {each["id"]: [node["html"][:120] for node in each["nodes"][:3]] for each in violations
            if each["impact"] in ("serious", "critical")}  # fmt: skip
    assert not ours


def test_code_and_solutions_unfold(opened: Opened) -> None:
    if not opened.address.startswith("notebooks/"):
        return
    for kind in ("details.hide", "details.sd-dropdown"):
        details = opened.page.locator(f"article {kind}:not([open])").first.element_handle()
        details.query_selector("summary").click()
        assert details.get_attribute("open") is not None, kind


def test_a_page_is_printed_whole(opened: Opened) -> None:
    opened.page.emulate_media(media="print")
    opened.page.evaluate("window.dispatchEvent(new Event('beforeprint'))")
    assert not opened.page.locator("article details:not([open])").count()
    wraps = "pres => pres.every(pre => getComputedStyle(pre).whiteSpace === 'pre-wrap')"
    assert opened.page.locator("article div.highlight pre").evaluate_all(wraps)
    assert not opened.page.locator("article .anim-slider:visible, article .anim-buttons:visible").count()
    opened.page.evaluate("window.dispatchEvent(new Event('afterprint'))")
    opened.page.emulate_media(media="screen")


@pytest.mark.parametrize("width", [DESK, PHONE])
def test_a_page_fits_the_window(opened: Opened, width: int) -> None:
    opened.page.set_viewport_size({"width": width, "height": 900})
    assert opened.page.evaluate("document.documentElement.scrollWidth") <= width
    assert not opened.errors


@pytest.fixture
def open_page(browser: Any) -> Iterator[Any]:
    """Opens a page by its address."""
    page = browser.new_page(viewport={"width": DESK, "height": 900})
    yield lambda address: Opened(address, page).page
    page.close()


def test_an_animation_follows_its_slider_and_plays(open_page: Any) -> None:
    player = open_page("notebooks/05_registration.html").locator("div.animation").first
    player.scroll_into_view_if_needed()
    before = player.locator("img").get_attribute("src")
    slider = player.locator("input[type=range]")
    slider.evaluate("slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    slider.evaluate("slider => { slider.dispatchEvent(new Event('change')); }")
    player.page.wait_for_timeout(300)
    last = player.locator("img").get_attribute("src")
    assert last != before
    player.locator("button[title=Play], button[title='Play']").first.click()
    player.page.wait_for_timeout(1500)
    assert player.locator("img").get_attribute("src") != last


def test_a_widget_follows_its_slider(open_page: Any) -> None:
    page = open_page("notebooks/09_volume_registration.html")
    handle = page.locator(".noUi-handle").first
    handle.wait_for(timeout=15000)
    shown = page.locator("img.widget-image").first
    before = shown.get_attribute("src")
    handle.focus()
    handle.press("ArrowRight")
    page.wait_for_timeout(500)
    assert shown.get_attribute("src") != before


def test_a_click_enlarges_a_figure_and_closes_it(open_page: Any) -> None:
    page = open_page("notebooks/01_why_pairs.html")
    page.locator("article figure img").first.click()
    assert page.locator("dialog.enlarged[open] img").count() == 1
    page.keyboard.press("Escape")
    page.wait_for_timeout(200)
    assert not page.locator("dialog.enlarged").count()


def test_figures_have_a_white_ground_in_dark_mode(browser: Any) -> None:
    page = browser.new_page(viewport={"width": DESK, "height": 900}, color_scheme="dark")
    Opened("notebooks/05_registration.html", page)
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"
    ground = "image => getComputedStyle(image).backgroundColor"
    assert page.locator("article figure img").first.evaluate(ground) == "rgb(255, 255, 255)"
    page.close()


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
