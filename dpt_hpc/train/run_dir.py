"""Who may write into a run directory: a new run into an empty one, the same run into its own."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.plain_text import from_json, from_yaml
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.durable import publish_file

FREE_TO_CHANGE = (
    "run_dir",
    "compat",
    "data.path",
    "data.store",
    "data.memory",
    "data.stage",
    "training.epochs",
    "training.evaluation_batch_size",
    "training.edge_budget",
    "training.grad_accumulation",
    "training.max_skipped_steps",
    "checkpoint.",
    "engine.",
)
"""Options that may differ when a run is resumed, as the number of its ranks may: they do not change what has been
computed so far, nor the structures of a step. (A dataset may be moved; that it is the same one is checked by its
digest. compat stands for other options, which are compared.)"""

SAME_ON_RESUME = ("dataset", "pretrained", "excluded", "folds", "denoised")
"""Facts of run.json that a resumed run must find unchanged: what it learns from, and what it is tested on."""


RESTORE = "Restore the file from a copy, or start a new run with --set run_dir=DIR."


def claim_run_dir(path: Path, config: RunConfig, *, resume: bool) -> None:
    """Refuse a directory that holds another run, or anything else. Writes nothing.

    Raises ConfigError that names what differs, or says how to continue the run that is there.
    """
    if (path / "config.yaml").exists():
        if not resume:
            raise ConfigError(
                f"run_dir {path}: already holds a run.\n"
                "Continue it with --resume, or choose another directory with --set run_dir=DIR."
            )
        _check_same_options(config, path / "config.yaml")
    # A name that begins with a dot is the lock, the account of the starts, or what is left of a start that was killed
    # while it was writing.
    elif path.exists() and (not path.is_dir() or any(not found.name.startswith(".") for found in path.iterdir())):
        raise ConfigError(
            f"run_dir {path}: is not empty, and holds no run that could be continued.\n"
            "Choose another directory with --set run_dir=DIR."
        )


def check_same_sources(path: Path, facts: Mapping[str, Any]) -> None:
    """Refuse to resume on other data or other pre-trained weights than the run in `path` began with."""
    if not (path / "run.json").exists():
        return
    before = _kept(path / "run.json", from_json)
    for name in SAME_ON_RESUME:
        if name in before and _digests(before[name]) != _digests(facts.get(name)):
            raise ConfigError(
                f"run {path}: its {name} has changed since it began: "
                f"was {_told(before[name])}, now {_told(facts.get(name))}.\n"
                "Restore it (what an early version ingested or exported, made anew, has another digest), or start a "
                "new run with --set run_dir=DIR."
            )


def save_config(config: RunConfig, path: Path) -> None:
    """The resolved config, every default spelled out; written and renamed."""
    temporary = path.with_name(
        f".{path.name}.{os.uname().nodename}.{os.getpid()}"
    )  # the seeds of one run may be several jobs
    temporary.write_text(yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False))
    publish_file(temporary, path)


def read_settings(path: Path) -> dict[str, Any]:
    """The config.yaml of a run, as it was written."""
    return _kept(path, from_yaml)


def changed_options(config: RunConfig, raw: Mapping[str, Any], free: tuple[str, ...] = FREE_TO_CHANGE) -> list[str]:
    """What computes something else in `config` than in the settings `raw`: "training.batch_size: was 8, now 50".

    free: how the names of options begin that may differ. An option that the version which wrote `raw` did not have
    counts as its default.
    """
    with suppress(ValidationError):  # of another version: compared as it is
        # Settings are written out whole: a preset could only fill in what that version did not have, or did otherwise.
        raw = type(config).model_validate({**raw, "compat": "exact"}).model_dump(mode="json")
    before, now = _flat(raw), _flat(config.model_dump(mode="json"))
    return [
        f"{key}: was {before.get(key)!r}, now {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]


def _check_same_options(config: RunConfig, path: Path) -> None:
    changed = [f"  {option}" for option in changed_options(config, read_settings(path))]
    if changed:
        raise ConfigError(
            "\n".join([f"run {path.parent}: cannot resume with other options.", *changed])
            + "\nRestore them, or start a new run with --set run_dir=DIR."
        )


def _kept(path: Path, parse: Callable[[str], Any]) -> Any:
    """The mapping in a file of a run. Raises DataError for a damaged one."""
    try:
        content = parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: cannot be read: {error}.\n{RESTORE}") from None
    if not isinstance(content, dict):
        raise DataError(f"{path}: holds {type(content).__name__}, expected the options or facts of a run.\n{RESTORE}")
    return content


def _digests(sources: Any) -> Any:
    """The part that says what the data are, wherever they lie."""
    if isinstance(sources, Mapping):
        return sources.get("digest")
    return [_digests(s) for s in sources] if isinstance(sources, list) else sources


def _told(sources: Any) -> str:
    """Their places, digests and plain facts; what their weights learnt from is long."""
    if isinstance(sources, Mapping):
        return ", ".join(f"{key} {value}" for key, value in sources.items() if isinstance(value, (str, int)))
    return "; ".join(map(_told, sources)) if isinstance(sources, list) else str(sources)


def _flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in options.items():
        found.update(_flat(value, f"{prefix}{key}.") if isinstance(value, Mapping) else {f"{prefix}{key}": value})
    return found
