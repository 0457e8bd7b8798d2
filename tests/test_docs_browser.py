"""The documentation in a headless Chromium: axe, light and dark, narrow and wide; nobody else is asked."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from browser import LOOKS, faults, needs_browser, opened
from browser import _browser as _browser
from built_docs import _site as _site
from built_docs import needs_docs

PAGES = ("index.html", "tutorial.html", "method.html", "options.html", "commands.html", "performance.html")


class Silent(SimpleHTTPRequestHandler):
    """Serves a folder, and tells nobody."""

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    """Where the pages are served."""
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Silent, directory=str(site))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@needs_browser
@needs_docs
@pytest.mark.slow
@pytest.mark.parametrize("look", LOOKS)
def test_everybody_can_read_the_documentation(browser: Any, address: str, look: str) -> None:
    for name in PAGES:
        with opened(browser, address, look) as page:
            page.goto(address + name)
            assert faults(page) == "", name
