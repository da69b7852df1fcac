"""The built pages in a browser, as wide as a desk and as narrow as a phone."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

HTML = Path(__file__).parents[1] / "book" / "_build" / "html"
PAGES = sorted(path.relative_to(HTML).as_posix() for path in HTML.glob("[bn]*/*.html"))  # book/ and notebooks/
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WIDTHS = {"desk": 1440, "phone": 390}
SERIOUS = ("serious", "critical")
# What axe finds in the theme itself, and not in what this book adds to it.
OF_THE_THEME = {"color-contrast", "scrollable-region-focusable", "label", "landmark-unique", "link-in-text-block"}

pytestmark = [pytest.mark.skipif(not PAGES, reason="no built book here: `make book`")]
if not CHROMIUM and not os.environ.get("CI_NEEDS_CHROMIUM"):
    pytestmark.append(pytest.mark.skip(reason="no Chromium here: install it, such as Debian's package chromium"))


@pytest.fixture(scope="module")
def browser() -> Iterator:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        # pages are files, and a page may read its search index beside it
        options = ["--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=options)
        yield browser
        browser.close()


@pytest.fixture
def opened(browser):
    """From an address below HTML and a width: the page, its errors, and what it asked other hosts for."""
    pages = []

    def open_page(address: str, width: int = WIDTHS["desk"]):
        page = browser.new_page(viewport={"width": width, "height": 900})
        pages.append(page)
        errors, foreign = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda asked: foreign.append(asked.url) if asked.url.startswith("http") else None)
        page.goto((HTML / address.partition("?")[0]).as_uri() + "".join(address.partition("?")[1:]))
        page.wait_for_load_state("load")
        return page, errors, foreign

    yield open_page
    for page in pages:
        page.close()


@pytest.mark.parametrize("width", WIDTHS.values(), ids=WIDTHS)
@pytest.mark.parametrize("address", PAGES)
def test_a_page_opens_without_errors_from_this_host_and_fits_the_window(opened, address, width):
    page, errors, foreign = opened(address, width)
    page.wait_for_timeout(300)  # for scripts that start late
    assert not errors
    assert not foreign
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert all(page.evaluate("Array.from(document.images, image => image.complete && image.naturalWidth > 0)"))


@pytest.mark.parametrize("address", [page for page in PAGES if page.startswith("notebooks/")])
def test_solutions_unfold(opened, address):
    page, *_ = opened(address)
    folded = page.locator("details:not([open]) > summary")
    assert folded.count()
    summary = folded.first
    details = summary.locator("..")
    summary.click()
    assert details.get_attribute("open") is not None


def test_an_animation_plays_and_a_slider_moves_its_image(opened):
    page, *_ = opened("notebooks/05_registration.html")
    player = page.locator("div.animation").first
    player.scroll_into_view_if_needed()
    before = player.locator("img").get_attribute("src")
    slider = player.locator("input[type=range]")
    slider.evaluate("slider => { slider.value = slider.max; slider.dispatchEvent(new Event('input')); }")
    slider.evaluate("slider => { slider.dispatchEvent(new Event('change')); }")
    page.wait_for_timeout(300)
    assert player.locator("img").get_attribute("src") != before


def test_search_finds_pages_by_their_words(opened):
    page, *_ = opened("search.html?q=codebook")
    page.wait_for_selector("#search-results li a", timeout=15000)
    links = page.locator("#search-results li a").evaluate_all("links => links.map(link => link.href)")
    assert any("03_vqae" in link for link in links)


@pytest.mark.parametrize("address", PAGES)
def test_axe_finds_nothing_serious_that_this_book_adds(opened, address):
    from axe_playwright_python.sync_playwright import Axe

    page, *_ = opened(address)
    found = Axe().run(page).response["violations"]
    ours = {
        each["id"]: [node["html"][:120] for node in each["nodes"][:3]]
        for each in found
        if each["impact"] in SERIOUS and each["id"] not in OF_THE_THEME
    }
    assert not ours
