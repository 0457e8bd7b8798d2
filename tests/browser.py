"""Pages in a real headless Chromium, as people with different screens and tastes see them."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
from required import required

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
MISSING = CHROMIUM is None or any(
    importlib.util.find_spec(name) is None for name in ("playwright", "axe_playwright_python")
)
needs_browser = pytest.mark.skipif(
    MISSING and not required("browser"), reason="no Chromium, or not its Python packages: make browser"
)

LOOKS: dict[str, dict[str, Any]] = {
    f"{shade}, {width} px": {"color_scheme": shade, "viewport": {"width": width, "height": 900}}
    for shade in ("light", "dark")
    for width in (1400, 375)
}
LIGHT, DARK_AND_NARROW = "light, 1400 px", "dark, 375 px"
PATIENCE = 120_000
"""Milliseconds that a loaded machine may take for anything."""


@pytest.fixture(name="browser", scope="module")
def _browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS, timeout=PATIENCE)
        yield chromium
        chromium.close()


@contextmanager
def opened(browser: Any, address: str, look: str = LIGHT) -> Iterator[Any]:
    """A page. Nothing that it asks of anybody else is answered; at the end it must have asked nobody, and have had no
    error, its security policy's included."""
    strayed: list[str] = []
    errors: list[str] = []
    context = browser.new_context(**LOOKS[look], reduced_motion="reduce")
    context.set_default_timeout(PATIENCE)

    def allow(route: Any) -> None:
        if route.request.url.startswith(address.partition("?")[0]):
            route.continue_()
        else:
            strayed.append(route.request.url)
            route.abort()

    context.route("**/*", allow)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))

    def note(message: Any) -> None:
        if message.type == "error" and "ERR_CONNECTION_REFUSED" not in message.text:  # a server that is gone
            errors.append(message.text)

    page.on("console", note)
    page.goto(address)
    yield page
    context.close()
    assert not strayed, f"asked others: {strayed}"
    assert not errors, errors


def faults(page: Any) -> str:
    """What axe finds wrong with a page for people who see, hear or move otherwise; "" if nothing."""
    from axe_playwright_python.sync_playwright import Axe

    results = Axe().run(page, options={"resultTypes": ["violations"]})
    return str(results.generate_report()) if results.violations_count else ""


CUT = """() => [...document.querySelectorAll("body *")]
  .filter((node) => !node.closest("svg") && node.checkVisibility() && node.getBoundingClientRect().width > 0)
  .filter((node) => {
    const box = node.getBoundingClientRect();
    const hides = getComputedStyle(node).overflowX !== "visible" && node.scrollWidth > node.clientWidth + 1;
    return hides || box.right > document.documentElement.clientWidth + 1 || box.left < -1;
  })
  .map((node) => `${node.tagName} ${node.className}: ${node.textContent.slice(0, 40)}`)"""


def cut_off(page: Any) -> list[str]:
    """Elements of which a part can be seen only by scrolling sideways, or on paper not at all."""
    found: list[str] = page.evaluate(CUT)
    return found
