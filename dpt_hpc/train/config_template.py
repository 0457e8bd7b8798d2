"""A config to begin with, every option with its meaning: written from the option classes, so that it is never stale."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml
from pydantic import BaseModel, TypeAdapter

from dpt_hpc.train.config import FinetuneConfig, PretrainConfig

WIDTH = 100
"""Columns of a comment."""

EXAMPLES: Mapping[str, Any] = {
    "run_dir": "runs/mine",
    "data.path": "data/mine",
    "objective.target": "band_gap",
}
"""Values of options that have no default: a user's own go there."""


def template(kind: type[PretrainConfig] | type[FinetuneConfig], chosen: Mapping[str, str]) -> str:
    """YAML of `kind` with every option, its default and its meaning; the values that must be given are examples.

    chosen: which member of a choice to write, for example {"model": "torchmd_et", "objective": "derivatives"}; the
    default where it says nothing. Raises KeyError for a member that is not there.
    """
    lines = [f"# {line}" for line in _opening(kind)]
    for name, field in sorted(kind.model_fields.items(), key=lambda item: item[0] != "task"):
        lines += _option(name, field.annotation, field.get_default(), field.description, chosen)
    return "\n".join(lines) + "\n"


def members(kind: type[BaseModel], name: str) -> dict[str, Any]:
    """The option classes that `name` chooses between, by the value of their `name` or `kind`."""
    found = {}
    for member in _classes(kind.model_fields[name].annotation):
        found[_tag(member)] = member
    return found


def schema(kind: type[BaseModel]) -> dict[str, Any]:
    """JSON schema of a config, for editors."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **TypeAdapter(kind).json_schema()}


def _opening(kind: type[BaseModel]) -> list[str]:
    verb = kind.model_fields["task"].default
    return [
        f"Options of `dpt-hpc {verb}`: every one, with its default. What you delete keeps its default.",
        "run_dir, data.path and the like have none: put your own there. Check with `dpt-hpc config check FILE`.",
    ]


def _option(path: str, annotation: Any, default: Any, note: str | None, chosen: Mapping[str, str]) -> Iterator[str]:
    """The lines of one option, or of a group with all that stands below it."""
    *above, name = path.split(".")
    indent = "  " * len(above)
    group = _group(path, annotation, default, chosen)
    yield from _comment(note or (_summary(group) if group else ""), indent)
    if group is None:
        yield from _comment(" | ".join(_allowed(annotation)), indent)
        yield f"{indent}{name}: {_written(EXAMPLES.get(path, default))}"
        return
    yield f"{indent}{name}:"
    if is_dataclass(group):  # a network's: models know no pydantic
        notes = _documented(group)
        types = get_type_hints(group)
        for of_network in fields(group):
            option = f"{path}.{of_network.name}"
            yield from _option(option, types[of_network.name], of_network.default, notes[of_network.name], chosen)
    else:
        for below, field in group.model_fields.items():
            yield from _option(f"{path}.{below}", field.annotation, field.get_default(), field.description, chosen)


def _group(path: str, annotation: Any, default: Any, chosen: Mapping[str, str]) -> Any:
    """The class whose options stand below `path`; None for a plain value."""
    classes = _classes(annotation)
    if not classes:
        return None
    if path in chosen:
        return {_tag(c): c for c in classes}[chosen[path]]
    return type(default) if type(default) in classes else classes[0]


def _classes(annotation: Any) -> list[Any]:
    parts = get_args(annotation) or (annotation,)
    return [p for p in parts if isinstance(p, type) and (issubclass(p, BaseModel) or is_dataclass(p))]


def _tag(options: Any) -> str:
    if is_dataclass(options):
        return str(getattr(options, "name", ""))
    field = options.model_fields.get("kind")
    return "" if field is None else str(field.default)


def _allowed(annotation: Any) -> list[str]:
    """The words that an option may be; none where it is a number, free text, or one word alone."""
    parts = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    words: list[str] = []
    for part in parts:
        if get_origin(part) is Literal:
            words += [_written(word) for word in get_args(part)]
        elif part is type(None):
            words.append("null")
        else:
            return []
    return words if len(words) > 1 else []


def _documented(group: Any) -> dict[str, str]:
    """What the docstring of a network's options says of each."""
    found = {field.name: "" for field in fields(group)}
    latest: str | None = None
    for line in (inspect.getdoc(group) or "").splitlines():
        name, colon, text = line.partition(": ")
        if colon and name in found:
            found[name], latest = text, name
        elif latest and line.startswith(" "):  # what the first line did not hold
            found[latest] += f" {line.strip()}"
        else:
            latest = None
    return found


def _summary(group: Any) -> str:
    """The first paragraph of a class's docstring."""
    return (group.__doc__ or "").strip().split("\n\n")[0]


def _comment(text: str, indent: str) -> list[str]:
    text = " ".join(text.split())
    return [f"{indent}# {line}" for line in textwrap.wrap(text, WIDTH - len(indent))]


def _written(value: Any) -> str:
    """`value` in YAML, on one line."""
    plain = list(value) if isinstance(value, tuple) else value
    text = yaml.safe_dump(plain, default_flow_style=True, allow_unicode=True, width=1000)
    return text.removesuffix("...\n").strip()
