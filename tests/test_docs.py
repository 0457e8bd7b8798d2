"""The documentation builds without a warning, asks nothing of the network, and quotes messages that exist."""

from __future__ import annotations

import ast
import re
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest
import typer.main
from built_docs import DOCS, ROOT, needs_docs
from built_docs import _site as _site

from dpt_hpc.cli import app


class Asked(HTMLParser):
    """The addresses that a browser asks by itself when it shows a page: links that wait for a click do not count."""

    def __init__(self) -> None:
        super().__init__()
        self.addresses: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        for name in ("src", "srcset", "poster", "data", *(["href"] if tag in ("link", "image", "use") else [])):
            self.addresses.append(found.get(name) or "")


@needs_docs
@pytest.mark.slow
def test_no_page_asks_anything_of_the_network(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 15
    for page in pages:
        asked = Asked()
        asked.feed(page.read_text(encoding="utf-8"))
        assert [a for a in asked.addresses if re.match(r"\w+:|//", a) and not a.startswith("data:")] == [], page.name
    for style in site.rglob("*.css"):
        text = style.read_text(encoding="utf-8")
        assert re.findall(r"(?:url\(|@import)\s*[\"']?(?:https?:)?//[^)\s]*", text) == [], style.name


@needs_docs
@pytest.mark.slow
def test_every_link_between_pages_leads_somewhere(site: Path) -> None:
    texts = {page.name: page.read_text(encoding="utf-8") for page in site.glob("*.html")}
    places = {name: set(re.findall(r'\bid="([^"]+)"', text)) for name, text in texts.items()}
    lost = []
    for name, text in texts.items():
        for link in re.findall(r'<a [^>]*href="([^":]+)"', text):
            page, _, place = unquote(unescape(link)).partition("#")
            known = (site / page).exists() if page else True
            if not known or (place and place not in places.get(page or name, {place})):
                lost.append((name, link))
    assert lost == []


@needs_docs
@pytest.mark.slow
def test_the_references_have_every_verb_and_option(site: Path) -> None:
    commands = (site / "commands.html").read_text(encoding="utf-8")
    group = typer.main.get_command(app)
    assert [name for name in group.commands if f"dpt-hpc {name}" not in commands] == []  # type: ignore[attr-defined]
    assert "--allow-unknown-elements" in commands
    options = (site / "options.html").read_text(encoding="utf-8")
    assert [
        word for word in ("max_fruitless_starts", "vector_norm", "stiffness", "layer_decay") if word not in options
    ] == []
    for page, words in {
        "api": ("DPTCalculator", "radius_graph"),
        "troubleshooting": ("start again with --resume",),
    }.items():
        text = (site / f"{page}.html").read_text(encoding="utf-8")
        assert [word for word in words if word not in text] == []


def templates() -> list[str]:
    """Every text in the source of dpt_hpc, with … for what is filled in."""
    found = []
    for path in sorted((ROOT / "dpt_hpc").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = (str(v.value) if isinstance(v, ast.Constant) else "…" for v in node.values)
                found.append("".join(parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return found


def test_every_quoted_message_is_one_of_dpt_hpc() -> None:
    page = (DOCS / "troubleshooting.md").read_text(encoding="utf-8")
    quoted = re.findall(r"^\| `(.+?)` \|", page, flags=re.MULTILINE)
    assert len(quoted) > 30
    known = templates()
    assert [message for message in quoted if not any(message in text for text in known)] == []
