"""JSON and YAML written by others, read into plain values; the one place that parses them.

Nothing in a file is run. What a program that means well does not write is refused, not repaired: a key that stands
twice (which of the two would count?), values nested beyond any use, YAML aliases that unfold to more than memory holds.
"""

from __future__ import annotations

import json
from collections.abc import Hashable
from typing import Any

import yaml

MOST_NODES = 1_000_000
"""Values in a YAML file once its aliases are unfolded."""
DEEPEST = 64
"""Levels of nesting of a YAML file."""


def from_json(text: str | bytes) -> Any:
    """The value that `text` is. Raises ValueError that says what is wrong, and where."""
    try:
        return json.loads(text, object_pairs_hook=unique)
    except RecursionError:
        raise ValueError("nested too deeply") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of JSON as a dict. Raises ValueError if a key stands in it twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(n for n in names if names.count(n) > 1)!r} stands twice in one object")
    return found


def from_yaml(text: str) -> Any:
    """The value that `text` is, by YAML's safe loader. Raises ValueError that says what is wrong, and where."""
    try:
        return yaml.load(text, _Loader)  # a SafeLoader: plain values only
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except yaml.YAMLError as error:
        raise ValueError(str(error).replace('"<unicode string>", ', "")) from None  # who reads it names the file
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError) as error:  # of a value against its own tag
        raise ValueError(f"a value is not what it seems to be: {error}") from None


def yaml_lines(text: str) -> dict[tuple[str, ...], int]:
    """The line, from 1, of each key and list item of a YAML text that `from_yaml` takes, by its path from the root.

    An alias among the items of a list has the line of the list; what a merge key (<<) brings is not told, nor what is
    within an alias: its own line is the nearest.
    """
    found: dict[tuple[str, ...], int] = {}
    seen: set[int] = set()  # a node that comes again is that of an alias, whose own place YAML does not tell

    def walk(node: yaml.Node, path: tuple[str, ...], line: int) -> None:
        if isinstance(node, yaml.MappingNode):
            inner = [(key.value, key.start_mark.line, value) for key, value in node.value]
        else:
            inner = [(str(place), None, item) for place, item in enumerate(node.value)]
        for name, of_key, value in inner:
            again = id(value) in seen
            seen.add(id(value))
            own, at = (*path, str(name)), line if again else value.start_mark.line
            at = at if of_key is None else of_key
            found[own] = at + 1
            if isinstance(value, yaml.CollectionNode) and not again:
                walk(value, own, at)

    root = yaml.compose(text, _Loader)
    if isinstance(root, yaml.CollectionNode):
        walk(root, (), 0)
    return found


class _Loader(yaml.SafeLoader):
    def get_single_node(self) -> yaml.Node | None:
        node = super().get_single_node()
        if node is not None:
            _measure(node, {}, [])
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode) and key.value != "<<"]
        if len(set(names)) < len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice!r} stands twice in one mapping", node.start_mark
            )
        return super().construct_mapping(node, deep)


def _measure(node: yaml.Node, sizes: dict[int, int], above: list[yaml.Node]) -> int:
    """How many values `node` unfolds to. Raises for too many, and for a node that lies within itself."""
    if id(node) in sizes:
        return sizes[id(node)]
    if any(node is outer for outer in above):
        raise yaml.composer.ComposerError(None, None, "an alias lies within what it stands for", node.start_mark)
    if len(above) > DEEPEST:
        raise yaml.composer.ComposerError(None, None, f"nested more than {DEEPEST} levels deep", node.start_mark)
    size = 1
    if isinstance(node, yaml.ScalarNode):
        if "\0" in node.value:
            raise yaml.composer.ComposerError(None, None, "a value with a NUL character", node.start_mark)
    else:
        inner = [part for pair in node.value for part in (pair if isinstance(pair, tuple) else (pair,))]
        size += sum(_measure(part, sizes, [*above, node]) for part in inner)
    if size > MOST_NODES:
        raise yaml.composer.ComposerError(
            None, None, f"its aliases unfold to over {MOST_NODES} values", node.start_mark
        )
    sizes[id(node)] = size
    return size
