"""Run configurations: YAML in, checked options out. An unknown key is an error that names the nearest one."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pydantic import BaseModel, TypeAdapter, ValidationError

from dpt_hpc.errors import ConfigError, did_you_mean
from dpt_hpc.plain_text import from_yaml, yaml_lines
from dpt_hpc.train.config import FinetuneConfig, PretrainConfig

AnyConfig = TypeVar("AnyConfig", PretrainConfig, FinetuneConfig)
AnyOptions = TypeVar("AnyOptions", bound=BaseModel)
Places = dict[tuple[str, ...], str]
"""What says an option, by its path from the root: a line of a file, or an override; told in front of a fault."""
TASKS: dict[str, type[PretrainConfig] | type[FinetuneConfig]] = {"pretrain": PretrainConfig, "finetune": FinetuneConfig}
"""What a config may be of: the verbs that take one."""


def load_config(
    path: str | Path, kind: type[AnyConfig], overrides: Sequence[str] = (), said_by: str = "--set"
) -> AnyConfig:
    """Read the config of a run into `kind`, as `read_config` does; ConfigError, too, for that of the other verb.

    said_by: what a fault of an override is told by.
    """
    raw, places = _overridden(path, overrides, said_by)
    task = raw.get("task")
    if isinstance(task, str) and TASKS.get(task, kind) is not kind:
        raise ConfigError(f"config {path}: its task is {task}.\nRun it with `dpt-hpc {task} {path}`.")
    return check_config(raw, kind, str(path), places)


def read_config(path: str | Path, kind: type[AnyOptions], overrides: Sequence[str] = ()) -> AnyOptions:
    """Read a YAML file into `kind`, with overrides of the form `a.b=value` (value is YAML).

    Raises ConfigError naming file, line, key, value and, for an unknown key, the nearest valid one; all faults at once.
    """
    raw, places = _overridden(path, overrides)
    return check_config(raw, kind, str(path), places)


def _overridden(path: str | Path, overrides: Sequence[str], said_by: str = "--set") -> tuple[dict[str, Any], Places]:
    raw, lines = _read(path)
    places = {key: f"{path}:{line}: " for key, line in lines.items()}
    for override in overrides:
        key = _apply(raw, override, said_by)
        groups = {key[:depth]: f"{said_by} " for depth in range(1, len(key))}  # that it makes; others keep their line
        places = groups | {k: place for k, place in places.items() if k[: len(key)] != key} | {key: f"{said_by} "}
    return raw, places


def of_an_array(config: AnyConfig, index: int) -> AnyConfig:
    """The same run as the job `index` of an array: with that seed, in run_dir/array_<index>."""
    seeds = {"seed": index} if isinstance(config, PretrainConfig) else {"seeds": (index,)}
    return config.model_copy(update={"run_dir": str(Path(config.run_dir) / f"array_{index}"), **seeds})


def load_any_config(path: str | Path, overrides: Sequence[str] = ()) -> PretrainConfig | FinetuneConfig:
    """Read the config of a run into what its task says, as `read_config` does; ConfigError, too, if it says none."""
    raw, places = _overridden(path, overrides)
    task = raw.get("task")
    if not isinstance(task, str) or task not in TASKS:
        near = did_you_mean(str(task), TASKS)
        place = places.get(("task",), f"config {path}: ")
        raise ConfigError(f"{place}task is {task!r}, expected one of {', '.join(TASKS)}.{near}")
    return check_config(raw, TASKS[task], str(path), places)


def check_config(raw: dict[str, Any], kind: type[AnyOptions], source: str, places: Places | None = None) -> AnyOptions:
    """`raw` as a checked `kind`; `source` names it in errors, `places` what says each of its options."""
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        errors = [e for found in map(dict, error.errors()) for e in (found, *_under_any_name(raw, kind, found))]
        faults = [f"  {_fault(raw, kind, e, places or {})}" for e in errors]
        raise ConfigError("\n".join([f"config {source}: {len(faults)} option(s) wrong.", *faults])) from None


def _read(path: str | Path) -> tuple[dict[str, Any], dict[tuple[str, ...], int]]:
    """What the YAML file says, and in which lines. Raises ConfigError if it cannot be read, or is no mapping."""
    try:
        text = Path(path).read_text(encoding="utf-8")
        raw = from_yaml(text)
    except FileNotFoundError:
        raise ConfigError(f"config {path}: no such file.") from None
    except OSError as error:
        raise ConfigError(f"config {path}: cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise ConfigError(f"config {path}: not valid YAML.\n{error}") from None
    if not isinstance(raw, dict):
        what = "is empty" if raw is None else f"expected a mapping of options, got {type(raw).__name__}"
        raise ConfigError(f"config {path}: {what}.\nWrite one with `dpt-hpc config init pretrain --out FILE`.")
    return raw, yaml_lines(text)


def _apply(raw: dict[str, Any], override: str, said_by: str) -> tuple[str, ...]:
    """Put `KEY=VALUE` into `raw`; returns the path of the key."""
    key, equals, value = override.partition("=")
    if not equals or not key:
        raise ConfigError(f"--set {override}: expected KEY=VALUE, for example training.epochs=10.")
    *parents, last = key.split(".")
    node = raw
    for i, parent in enumerate(parents):
        node = node.setdefault(parent, {})
        if not isinstance(node, dict):
            raise ConfigError(f"{said_by} {override}: {'.'.join(parents[: i + 1])} is a value, not a group of options.")
    try:
        node[last] = from_yaml(value)
    except ValueError:
        raise ConfigError(f"{said_by} {override}: {value!r} is not valid YAML.") from None
    return (*parents, last)


def _under_any_name(raw: Any, kind: type[BaseModel], error: dict[str, Any]) -> list[dict[str, Any]]:
    """The faults within a group whose `name` or `kind` is wrong, which pydantic then leaves alone: those that it would
    have under every one that is right."""
    if error["type"] not in ("union_tag_not_found", "union_tag_invalid"):
        return []
    tag, union = error["ctx"]["discriminator"].strip("'"), _annotation(kind, _location(raw, kind, error))
    of_each: list[dict[Any, dict[str, Any]]] = []
    for member in _members(union):
        try:
            TypeAdapter(member).validate_python({**error["input"], tag: _tag(member)})
        except ValidationError as fault:
            of_each.append(
                {(e["loc"], e["type"], e["msg"]): {**e, "loc": error["loc"] + e["loc"]} for e in fault.errors()}
            )
        else:
            return []
    return [fault for key, fault in of_each[0].items() if all(key in others for others in of_each)]


def _fault(raw: Any, kind: type[BaseModel], error: dict[str, Any], places: Places) -> str:
    location = _location(raw, kind, error)
    # A group's own fault is of its name or kind, or begins with the option: `cutoff is -1`, `split.test is 0`.
    option = error.get("ctx", {}).get("discriminator") or error["msg"].removeprefix("Value error, ").partition(" ")[0]
    about = (*location, *option.strip("':,").split("."))
    said = (places.get(about[:depth]) for depth in range(len(about), 0, -1))
    return f"{next(filter(None, said), '')}{_what_is_wrong(raw, kind, error, location)}"


def _location(raw: Any, kind: type[BaseModel], error: dict[str, Any]) -> list[str]:
    # The tag of a discriminated union is part of pydantic's location, but not of the file's.
    location: list[str] = []
    node = raw
    for part in error["loc"]:
        if isinstance(node, dict) and part not in node and part in _tags(_annotation(kind, location)):
            continue
        location.append(str(part))
        node = node[part] if isinstance(node, dict) and part in node else node
    return location


def _what_is_wrong(raw: Any, kind: type[BaseModel], error: dict[str, Any], location: list[str]) -> str:
    name = ".".join(location)
    if error["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        valid = _keys(kind, raw, location[:-1])
        near = difflib.get_close_matches(location[-1], valid, n=1, cutoff=0.5)
        hint = f"did you mean {'.'.join([*location[:-1], near[0]])}?" if near else f"valid here: {', '.join(valid)}."
        return f"{name}: unknown option; {hint}"
    if error["type"] in ("union_tag_not_found", "union_tag_invalid"):
        given = f"is {error['ctx']['tag']!r}" if error["type"] == "union_tag_invalid" else "is not given"
        tag = error["ctx"]["discriminator"].strip("'")
        tags = _tags(_annotation(kind, location))
        hint = did_you_mean(str(error["ctx"].get("tag", "")), tags)
        return f"{name}.{tag}: {given}; expected {' or '.join(tags)}.{hint}"
    if error["type"] == "missing":
        return f"{name}: required, but not given."
    if error["type"] == "model_attributes_type":
        union = _annotation(kind, location)
        key = "kind" if hasattr(_members(union)[0], "model_fields") else "name"
        tags = [tag for tag in _tags(union) if tag == error["input"]] or _tags(union)
        meant = " or ".join(f"{name}.{key}={tag}" for tag in tags)
        return f"{name}: a group of options, got {error['input']!r}; did you mean {meant}?"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "literal_error":
        hint = did_you_mean(str(error["input"]), re.findall(r"'([^']*)'", error["ctx"]["expected"]))
        return f"{name}: {message}; got {error['input']!r}.{hint}"
    if not name:  # a fault of several options together names them itself
        return f"{message}."
    return f"{name}: {message}." if error["type"] == "value_error" else f"{name}: {message}; got {error['input']!r}."


def _annotation(kind: Any, location: list[str]) -> Any:
    """The type of the option at `location`; None for one inside a union, or unknown."""
    for part in location:
        known = getattr(kind, "model_fields", {})
        if get_origin(kind) in (dict, tuple):
            kind = get_args(kind)[get_origin(kind) is dict]
        else:
            kind = known[part].annotation if part in known else None
    return kind


def _keys(kind: Any, raw: Any, location: list[str]) -> list[str]:
    """The options that are valid at `location`: of a group whose kind or name is wrong, those of each right one."""
    kinds = [kind]
    for part in location:
        raw = raw[int(part)] if isinstance(raw, list) else raw.get(part, {}) if isinstance(raw, dict) else {}
        kind = _annotation(kinds[0], [part])
        if get_origin(kind) in (dict, tuple):
            kinds = [kind]
            continue
        members = _members(kind)
        named = raw.get("kind" if hasattr(members[0], "model_fields") else "name")
        known = [member for member in members if _tag(member) == named]
        kinds = known or (members[:1] if named is None else members)
    return sorted({name for kind in kinds for name in _options(kind)})


def _options(kind: Any) -> list[str]:
    return [field.name for field in fields(kind)] if is_dataclass(kind) else list(getattr(kind, "model_fields", {}))


def _members(annotation: Any) -> list[Any]:
    """The classes of a union, or the one class."""
    return [m for m in get_args(annotation) if isinstance(m, type)] or [annotation]


def _tags(annotation: Any) -> list[str]:
    return [tag for m in _members(annotation) if (tag := _tag(m)) is not None]


def _tag(options: Any) -> Any:
    """What tells these options from others of their union: their kind, or their name."""
    known = getattr(options, "model_fields", {})
    return known["kind"].default if "kind" in known else getattr(options, "name", None)
