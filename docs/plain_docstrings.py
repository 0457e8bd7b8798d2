"""Docstrings here are plain text with `code`: what reStructuredText would take for markup is escaped."""

from __future__ import annotations

import re
import textwrap
from typing import Any

CODE = re.compile(r"(`[^`]+`)")
MARKUP = re.compile(r"([*|_\\])")


def paragraphs(lines: list[str]) -> list[list[str]]:
    """The paragraphs of a docstring."""
    found: list[list[str]] = [[]]
    for line in lines:
        if line.strip():
            found[-1].append(line)
        elif found[-1]:
            found.append([])
    return found


def as_rst(paragraph: list[str]) -> list[str]:
    """One paragraph: indented throughout, it is code; else text, in which a further indent is a continuation."""
    if paragraph and all(line.startswith("    ") for line in paragraph):
        return ["::", "", *(f"    {line}" for line in textwrap.dedent("\n".join(paragraph)).split("\n"))]
    parts = CODE.split(" ".join(line.strip() for line in paragraph))
    return ["".join(f"`{part}`" if part.startswith("`") else MARKUP.sub(r"\\\1", part) for part in parts)]


def rewrite(app: Any, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """A docstring's lines, in place."""
    lines[:] = [line for paragraph in paragraphs(lines) for line in (*as_rst(paragraph), "")]


def setup(app: Any) -> dict[str, bool]:
    """Register the rewriting."""
    app.connect("autodoc-process-docstring", rewrite)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
