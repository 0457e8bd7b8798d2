"""Files that are spoilt as transport, editors and other programs spoil them, and worse: strategies of hypothesis."""

from __future__ import annotations

import copy
import json
import math
from typing import Any, Literal

import yaml
from hypothesis import strategies as st

Kind = Literal["json", "yaml", "text", "bytes"]
"""How a file may be taken apart: as a tree of values, by lines, or by bytes alone."""

NASTY: list[Any] = [
    None, True, False, 0, -1, 2**31, 2**63, 10**30, 10**400, 1e308, -1e-320, math.nan, math.inf, -math.inf, "", "0",
    "-1", "nan", "x", "true", "../../x", "/etc/passwd", "..", "a\0b", "\ud800", "é 日本 \u202e", "<script>", "\n",
    "x" * 10_000,
    [], {}, [None], [[[]]], {"a": {"b": 1}}, [1, "x", None], "2001-13-45", "1e5", "&a [*a]",
]  # fmt: skip
TOKENS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"nan", b"NaN", b"Infinity", b"-", b"1e999", b"9" * 5000, b"[" * 3000,
    b"{" * 3000, b'"', b"'", b"\\", b"\\u0000", b"\\ud800", b"\n", b"\r\n", b"\t", b",", b":", b": &a [*a]",
    b"!!python/object/apply:os.system [x]",
    b"=", b"#", b" ", b"../../", "²".encode(), "日".encode(), b"0x1", b"1_0", b"true", b"null",
]  # fmt: skip


@st.composite
def spoilt(draw: st.DrawFn, kind: Kind, content: bytes) -> bytes:
    """`content`, spoilt in one to three places."""
    if kind in ("json", "yaml") and draw(st.integers(0, 2)):
        return _as_tree(draw, kind, content)
    for _ in range(draw(st.integers(1, 3))):
        content = _as_lines(draw, content) if kind != "bytes" and draw(st.booleans()) else _as_bytes(draw, content)
    return content


def _as_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    place = draw(st.integers(0, len(content)))
    end = min(place + draw(st.sampled_from([1, 2, 4, 8, 64, 1000])), len(content))
    how = draw(st.sampled_from(["flip", "flip", "flip", "cut", "drop", "repeat", "insert", "over", "empty", "zeros"]))
    if how == "flip" and place < len(content):
        return content[:place] + bytes([content[place] ^ (1 << draw(st.integers(0, 7)))]) + content[place + 1 :]
    if how == "cut":
        return content[:place]
    if how == "drop":
        return content[:place] + content[end:]
    if how == "repeat":
        return content[:end] + content[place:]
    if how == "insert":
        return content[:place] + draw(st.sampled_from(TOKENS)) + content[place:]
    if how == "over":
        token = draw(st.one_of(st.sampled_from(TOKENS), st.binary(min_size=1, max_size=8)))
        return content[:place] + token + content[place + len(token) :]
    if how == "zeros":
        return content[:place] + bytes(end - place) + content[end:]
    return b"" if how == "empty" else content


def _as_lines(draw: st.DrawFn, content: bytes) -> bytes:
    lines = content.split(b"\n")
    first, second = (draw(st.integers(0, len(lines) - 1)) for _ in range(2))
    how = draw(st.sampled_from(["drop", "repeat", "swap", "words"]))
    if how == "drop":
        del lines[first]
    elif how == "repeat":
        lines.insert(second, lines[first])
    elif how == "swap":
        lines[first], lines[second] = lines[second], lines[first]
    elif words := lines[first].split(b" "):
        words[draw(st.integers(0, len(words) - 1))] = draw(st.sampled_from(TOKENS))
        lines[first] = b" ".join(words)
    return b"\n".join(lines)


def _as_tree(draw: st.DrawFn, kind: Kind, content: bytes) -> bytes:
    tree = json.loads(content) if kind == "json" else yaml.safe_load(content)
    for _ in range(draw(st.integers(1, 2))):
        tree = _spoil(draw, tree)
    text = json.dumps(tree) if kind == "json" else yaml.safe_dump(tree, sort_keys=False)
    if draw(st.integers(0, 9)) == 0:
        text = _key_twice(draw, text)
    return text.encode("utf-8", errors="surrogatepass")


def _spoil(draw: st.DrawFn, tree: Any) -> Any:
    """A copy of `tree` with one of its values changed, gone, doubled, moved or wrapped."""
    tree = copy.deepcopy(tree)
    parent, key = None, None
    node = tree
    while isinstance(node, (dict, list)) and node and draw(st.integers(0, 6)):
        parent, key = node, draw(st.sampled_from(list(node) if isinstance(node, dict) else range(len(node))))
        node = parent[key]
    nasty = copy.deepcopy(draw(st.sampled_from(NASTY)))
    if parent is None:
        return nasty if draw(st.integers(0, 3)) == 0 else tree
    how = draw(st.sampled_from(["replace", "replace", "replace", "drop", "add", "swap", "wrap", "deep"]))
    if how == "replace":
        parent[key] = nasty
    elif how == "drop":
        del parent[key]
    elif how == "add" and isinstance(parent, dict):
        parent[draw(st.sampled_from(["x", "", "name", "energy", "../x", "kind"]))] = nasty
    elif how == "add":
        parent.insert(key, copy.deepcopy(draw(st.sampled_from(parent))))
    elif how == "swap":
        other = draw(st.sampled_from(list(parent) if isinstance(parent, dict) else range(len(parent))))
        parent[key], parent[other] = parent[other], parent[key]
    elif how == "wrap":
        parent[key] = [node] if draw(st.booleans()) else {"x": node}
    else:
        for _ in range(draw(st.sampled_from([5, 100, 400]))):
            node = [node]
        parent[key] = node
    return tree


def _key_twice(draw: st.DrawFn, text: str) -> str:
    """One `"key": value` of a line, or of an object, written a second time."""
    lines = text.splitlines(keepends=True) or [""]
    place = draw(st.integers(0, len(lines) - 1))
    return "".join([*lines[: place + 1], lines[place], *lines[place + 1 :]])
