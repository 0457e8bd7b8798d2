"""What the theme's pages lack for those who do not see them, or use no mouse; axe finds it (test_docs_browser.py)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

MENDED = {
    'class="caption" role="heading"><': 'class="caption" role="heading" aria-level="2"><',
    '<aside class="sidebar-drawer">': '<aside class="sidebar-drawer" aria-label="All pages">',
    '<aside class="toc-drawer': '<aside aria-label="This page" class="toc-drawer',
    "<pre>": '<pre tabindex="0">',
    '<div class="table-wrapper': '<div tabindex="0" class="table-wrapper',
    '<th class="head"><p></p></th>': '<td class="head"></td>',
    '<div id="search-results"></div>': '<h1>Search</h1><div id="search-results"></div>',
    'href="#launch/README.md"': 'href="scaling.html"',
    'href="#docs/first_hour.md"': 'href="first_hour.html"',
    'href="#benchmarks/results/speed.md"': 'href="performance.html"',
}
"""Levels of headings, names of landmarks, what the keyboard can scroll, cells that head nothing, a page's title; links
of the front page to files that are part of another page here."""


def mend(app: Any, error: Exception | None) -> None:
    """Rewrite the pages that were written."""
    for page in Path(app.outdir).glob("*.html") if error is None else ():
        text = page.read_text(encoding="utf-8")
        for found, better in MENDED.items():
            text = text.replace(found, better)
        page.write_text(text, encoding="utf-8")


def setup(app: Any) -> dict[str, bool]:
    """Register the mending."""
    app.connect("build-finished", mend)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
