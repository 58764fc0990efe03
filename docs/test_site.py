"""The built site in headless Chromium: `sphinx-build -W docs build/docs && pytest docs/test_site.py`."""

from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

import jaxloss
from jaxloss import parity
from parity_tests.chromium import chromium

BUILT = Path(__file__).parents[1] / "build" / "docs"
PAGES = sorted(str(path.relative_to(BUILT)) for path in BUILT.rglob("*.html") if "_static" not in path.parts)
PHONE = {"width": 360, "height": 740}


class Quiet(SimpleHTTPRequestHandler):
    """Serves files and logs nothing."""

    def log_message(self, *message: Any) -> None:
        """Nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the site is served: copying and searching need an address."""
    if not PAGES:
        pytest.skip("needs the site: sphinx-build -W docs build/docs")
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=BUILT)) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Chromium."""
    with chromium() as opened:
        yield opened


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Any]:
    """Opens a page. At the end: the console has no error, and nothing was asked from elsewhere."""
    contexts, wrong = [], []

    def open_page(name: str, **options: Any) -> Any:
        context = browser.new_context(**options)
        context.grant_permissions(["clipboard-read", "clipboard-write"], origin=address)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(20_000)
        page.on("console", lambda message: wrong.append(message.text) if message.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("request", lambda request: wrong.append(request.url) if outside(request.url, address) else None)
        page.on("response", lambda response: wrong.append(response.url) if response.status >= 400 else None)
        page.goto(f"{address}/{name}", wait_until="networkidle")
        return page

    open_page.wrong = wrong
    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def outside(url: str, address: str) -> bool:
    """Whether something is asked for that the site does not have."""
    return not url.startswith((address, "data:", "blob:", "about:"))


@pytest.mark.parametrize("name", PAGES)
def test_page_needs_nothing_from_outside_and_fits_a_phone(visit, name):
    page = visit(name, viewport=PHONE)
    width = page.evaluate("document.scrollingElement.scrollWidth")
    assert width <= PHONE["width"]


@pytest.mark.parametrize(
    "fault",
    ["console.error('x')", "throw new Error('x')", "fetch('http://127.0.0.1:9/x').catch(() => 0)", "fetch('/none')"],
)
def test_the_check_sees_an_error_and_a_request(visit, fault):
    page = visit("changelog.html")
    page.add_script_tag(content=fault)
    page.wait_for_timeout(300)
    assert visit.wrong
    visit.wrong.clear()


def test_formulas_are_typeset(visit):
    page = visit("numerics.html")
    page.wait_for_selector("mjx-container")
    fonts = page.evaluate("document.fonts.ready.then(fonts => [...fonts].map(font => [font.family, font.status]))")
    assert any("MJX" in family and status == "loaded" for family, status in fonts)
    assert "\\log" not in page.inner_text("article")


@pytest.mark.parametrize(
    ("words", "place"), [("label smoothing", "guides/soft-targets.html"), ("checkify", "guides/wrong-labels.html")]
)
def test_search_finds(visit, words, place):
    page = visit(f"search.html?q={words.replace(' ', '+')}")
    page.wait_for_selector("#search-results li a")
    found = page.eval_on_selector_all("#search-results li a", "links => links.map(link => link.getAttribute('href'))")
    assert any(link.split("?")[0].split("#")[0] == place for link in found), found


def test_code_is_copied_as_it_is(visit):
    page = visit("guides/wrong-labels.html")
    block = page.locator("div.cell_input div.highlight").first
    block.hover()
    block.locator("button.copybtn").click()
    assert page.evaluate("navigator.clipboard.readText()").strip() == block.locator("pre").inner_text().strip()


BRIGHTNESS = """selector => {
  const style = getComputedStyle(document.querySelector(selector));
  return [style.backgroundColor, style.color].map(text => {
    const [red, green, blue] = text.match(/[\\d.]+/g).map(Number);
    return (0.299 * red + 0.587 * green + 0.114 * blue) / 255;
  });
}"""


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_follows_dark_and_light(visit, scheme):
    page = visit("which-loss.html", color_scheme=scheme)
    ground, text = page.evaluate(BRIGHTNESS, "body")
    assert (ground < 0.2 < 0.7 < text) if scheme == "dark" else (text < 0.3 < 0.9 < ground)


def test_report_is_embedded_and_works(visit):
    page = visit("porting/walk.html")
    frame = page.frame_locator("iframe[title='The report']")
    assert frame.locator("h1").inner_text() == "Differs from PyTorch"
    assert "approximate=False" in frame.locator(".first").inner_text()
    frame.locator(".sort[data-key=free]").click()
    assert frame.locator(".places th[aria-sort=descending]").count() == 1


def test_every_public_name_is_in_the_reference(visit):
    for page_name, module in (("losses", jaxloss), ("parity", parity)):
        page = visit(f"reference/{page_name}.html")
        described = page.eval_on_selector_all("dt.sig", "items => items.map(item => item.id)")
        wanted = {f"{module.__name__}.{name}" for name in module.__all__} - {"jaxloss.__version__", "jaxloss.nll"}
        assert wanted <= set(described), wanted - set(described)
