"""JSON files larger than memory: the items of the outermost list or object, one after the other.

json.JSONDecoder works on a sliding window, so memory is bounded by the largest item. It runs in C and, unlike the
streaming parsers on PyPI, reads the NaN and Infinity that Python writes, which the checks then report by record.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dpt_hpc.plain_text import unique

FIRST_READ = 1 << 20
TOKEN = 64
"""Characters: no number or literal is longer, so an error further from the window's end is not for lack of text."""


class JsonError(Exception):
    """The text is not JSON, or ends too early; says where."""


def open_text(path: Path, errors: str = "strict") -> IO[str]:
    """Open a text file, gzipped or not. errors: what is done with bytes that are not UTF-8."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", errors=errors)
    return path.open(encoding="utf-8", errors=errors)


def stream_items(path: Path) -> Iterator[tuple[str | None, Any]]:
    """(None, item) of the outermost list, or (key, value) of the outermost object. Raises JsonError."""
    try:
        with open_text(path) as stream:
            yield from _Window(stream).items()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise JsonError(f"cannot be read: {error}") from None


def stream_table(path: Path, rows: str) -> Iterator[tuple[str, Any]]:
    """(key, value) of the outermost object, but (rows, item) of each item of the list of that key. Raises JsonError."""
    try:
        with open_text(path) as stream:
            window = _Window(stream)
            for key in window.fields():
                if key != rows:
                    yield key, window.value()
                    continue
                if (found := window.peek()) != "[":
                    raise JsonError(f"{rows} starts with {found!r}, expected a list")
                for _, item in window.inside():
                    yield rows, item
            window.expect_end()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise JsonError(f"cannot be read: {error}") from None


class _Window:
    """A piece of the text, and how much of the file lies before it."""

    def __init__(self, stream: IO[str]) -> None:
        self.stream = stream
        self.text = ""
        self.position = 0
        self.before = 0
        self.at_end = False
        self.decoder = json.JSONDecoder(object_pairs_hook=unique)

    def items(self) -> Iterator[tuple[str | None, Any]]:
        yield from self.inside()
        self.expect_end()

    def inside(self) -> Iterator[tuple[str | None, Any]]:
        """(None, item) of the list that begins here, or (key, value) of the object."""
        opening = self.peek()
        if opening == "{":
            for key in self.fields():
                yield key, self.value()
            return
        if opening != "[":
            raise JsonError(f"starts with {opening!r}, expected a JSON list or object")
        for _ in self.places("]"):
            yield None, self.value()

    def fields(self) -> Iterator[str]:
        """The keys of the object that begins here; whoever takes one then reads its value."""
        if (opening := self.peek()) != "{":
            raise JsonError(f"starts with {opening!r}, expected a JSON object")
        taken: set[str] = set()
        for _ in self.places("}"):
            key = self.value()
            if not isinstance(key, str) or key in taken:
                reason = "stands twice in the outermost object" if isinstance(key, str) else "is no text"
                raise JsonError(f"the key {key!r:.60} before character {self.before + self.position} {reason}")
            taken.add(key)
            self.expect(":")
            yield key

    def places(self, closing: str) -> Iterator[None]:
        """Stands at each entry of the list or object that begins here, up to its end."""
        self.position += 1
        if self.peek() != closing:
            while True:
                yield
                if self.peek() == closing:
                    break
                self.expect(",")
        self.position += 1

    def expect_end(self) -> None:
        if trailing := self.peek():
            raise JsonError(f"{trailing!r} follows the end of the JSON text at character {self.before + self.position}")

    def grow(self) -> bool:
        """Read on, dropping what is done with; False at the end of the file."""
        if self.at_end:
            return False
        self.before += self.position
        self.text = self.text[self.position :]
        self.position = 0
        more = self.stream.read(max(FIRST_READ, len(self.text)))
        self.at_end = not more
        self.text += more
        return not self.at_end

    def peek(self) -> str:
        """The next character that is not white space; empty at the end of the file."""
        while True:
            while self.position < len(self.text) and self.text[self.position] in " \t\r\n":
                self.position += 1
            if self.position < len(self.text):
                return self.text[self.position]
            if not self.grow():
                return ""

    def expect(self, character: str) -> None:
        found = self.peek()
        if not found:
            raise JsonError(f"ends at character {self.before + self.position}, where {character!r} was expected")
        if found != character:
            raise JsonError(f"{found!r} at character {self.before + self.position}, expected {character!r}")
        self.position += 1

    def value(self) -> Any:
        self.peek()
        while True:
            try:
                value, end = self.decoder.raw_decode(self.text, self.position)
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated string") or error.pos >= len(self.text) - TOKEN
                if not cut or self.at_end:
                    reason = "ends too early" if cut else error.msg
                    raise JsonError(f"{reason} at character {self.before + error.pos}") from None
            except (ValueError, RecursionError) as error:
                reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)
                raise JsonError(f"{reason}, in the value at character {self.before + self.position}") from None
            else:
                # A number may go on beyond the window.
                if self.at_end or isinstance(value, (dict, list, str)) or end + TOKEN <= len(self.text):
                    self.position = end
                    return value
            self.grow()
