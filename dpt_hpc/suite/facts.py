"""What the finished runs of a cell, here or recorded, say of themselves, and whether they agree: never what its config
says now."""

from __future__ import annotations

import json
import shlex
from collections.abc import Hashable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from dpt_hpc.errors import DataError
from dpt_hpc.plain_text import from_yaml
from dpt_hpc.suite.plan import FinetuneCell, PretrainCell
from dpt_hpc.suite.records import FREE, pretraining_record, without_roots
from dpt_hpc.suite.weights import UNRECORDED, began_from, fault_of, finetuning_record
from dpt_hpc.suite.work import Unit, units_of
from dpt_hpc.train.checkpoint import weights_digest
from dpt_hpc.train.run_dir import changed_options, read_settings

SUMMED_UP = ("git", "device", "split", "parameters")
"""Facts of run.json that a cell's file keeps."""


def facts_of(cell: PretrainCell | FinetuneCell) -> dict[str, Any]:
    """All that is to be kept of a cell: of its finished runs, and of its record; {} if there are none.

    faults: why they are no result. A pre-training that was run here is what counts; seeds of a fine-tuning are joined.
    """
    here = _run_here(cell)
    if isinstance(cell, PretrainCell):
        return here or pretraining_record(cell)[0] or {}
    record, _ = finetuning_record(cell)
    return _joined(cell, here, record) if record else here


def unused_record(cell: PretrainCell | FinetuneCell) -> str | None:
    """Why the record of a cell says nothing of it; None where it does, or is not needed, or is not there."""
    if isinstance(cell, FinetuneCell):
        return finetuning_record(cell)[1]
    return None if units_of(cell)[0].ended else pretraining_record(cell)[1]


def _joined(cell: FinetuneCell, here: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """Facts of a fine-tuning of which some seeds were run here and some elsewhere, those of the first seed for all."""
    planned = [str(seed) for seed in cell.config.seeds]
    sides = [side for side in (here, record) if side]
    whose = {seed: next((s for s in sides if seed in s["test_mae"]), None) for seed in planned}
    found = {seed: side for seed, side in whose.items() if side is not None}
    if not found:
        return here
    seconds = {id(side): dict(zip(side["test_mae"], side["wall_seconds"], strict=False)) for side in sides}
    return {
        **next(iter(found.values())),
        "command": record["command"] or cell.command,
        "pretrained_sha256": record["pretrained_sha256"] or (here and here["pretrained_sha256"]) or None,
        "wall_seconds": [seconds[id(side)].get(seed) for seed, side in found.items()],
        "other_options": [],
        "faults": here["faults"] if here else [],
        "notes": list(dict.fromkeys(note for side in sides for note in side["notes"])),
        "unit": (here and here["unit"]) or record["unit"],
        "test_mae": {seed: side["test_mae"][seed] for seed, side in found.items()},
        "best_epoch": {seed: side["best_epoch"][seed] for seed, side in found.items()},
    }


def _run_here(cell: PretrainCell | FinetuneCell) -> dict[str, Any]:
    """The facts of a cell's finished runs in the run directory; {} if there are none."""
    done = [unit for unit in units_of(cell) if unit.ended]
    if not done:
        return {}
    runs = [(read_json(unit.path / "run.json"), read_json(unit.path / "results.json")) for unit in done]
    written = [read_settings(unit.path / "config.yaml") for unit in done]
    options = [changed_options(cell.config, settings, free=FREE) for settings in written]
    first, results = runs[0]
    settings = _settings(cell, done[0].path / "config.yaml")
    common: dict[str, Any] = {
        "network": cell.network,
        "command": cell.command if not any(options) else None,
        "recorded_command": plain(str(first.get("command", ""))),
        **{name: first.get(name) for name in SUMMED_UP},
        "versions": {name: first.get("versions", {}).get(name) for name in ("dpt-hpc", "torch")},
        "dataset": [
            {"name": Path(s["path"]).name, "structures": s["structures"], "digest": s["digest"]}
            for s in first["dataset"]
        ],
        "epochs": results.get("epochs", settings.get("training", {}).get("epochs")),
        "wall_seconds": [run.get("wall_seconds") for run, _ in runs],
        "other_options": list(dict.fromkeys(option for own in options for option in own)),
        "config": settings,
    }
    if isinstance(cell, PretrainCell):
        kept = {name: results.get(name) for name in ("objective", "best_epoch", "validation", "test")}
        with suppress(DataError):  # its checkpoints were deleted: nothing can begin from it
            kept["weights_sha256"] = weights_digest(cell.path)
        return {"pretraining": cell.name, **common, **kept}
    digests = [tuple(source["digest"] for source in run["dataset"]) for run, _ in runs]
    faults = _differing("datasets", done, digests) + _differing("options", done, map(tuple, options))
    wrong = [fault for unit in done if (fault := fault_of(cell, unit.path))]
    faults += [fault.splitlines()[0].removeprefix(f"{cell.path}/").replace(str(cell.path), ".") for fault in wrong]
    began = [began_from(unit.path) for unit in done]
    return {
        "pooling": cell.pooling,
        "pretraining": cell.start.name,
        **common,
        "pretrained_sha256": began[0] or None,
        "faults": faults,
        "notes": [UNRECORDED] if "" in began else [],
        "property": cell.config.objective.target,
        "unit": unit_of(cell),
        "test_mae": {str(u.seed): r["test"]["target_mae"] for u, (_, r) in zip(done, runs, strict=True)},
        "best_epoch": {str(u.seed): r["best_epoch"] for u, (_, r) in zip(done, runs, strict=True)},
    }


def unit_of(cell: FinetuneCell) -> str:
    """Of the property, from the cell's summary or its dataset; "" if neither is at hand."""
    if unit := read_json(cell.path / "results.json").get("unit"):
        return str(unit)
    for path in cell.config.data.path:
        units = read_json(Path(path) / "dataset.json").get("property_units", {})
        if cell.config.objective.target in units:
            return str(units[cell.config.objective.target])
    return ""


def plain(command: str) -> str:
    """A recorded command as one types it, without the directories of the machine that it ran on."""
    if not command:
        return ""
    program, *words = shlex.split(command)
    return shlex.join(["dpt-hpc" if program == "__main__.py" else program, *map(_without_folders, words)])


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _differing(what: str, units: list[Unit], values: Iterable[Hashable]) -> list[str]:
    """A fault where the seeds of a cell do not agree."""
    found: dict[Hashable, list[str]] = {}
    for unit, value in zip(units, values, strict=True):
        found.setdefault(value, []).append(str(unit.seed))
    if len(found) < 2:
        return []
    return [f"its seeds have different {what}: seeds {' | '.join(', '.join(seeds) for seeds in found.values())}"]


def _settings(cell: PretrainCell | FinetuneCell, path: Path) -> dict[str, Any]:
    """The resolved config of a run, every default spelled out, without the directories of the machine it ran on."""
    raw = from_yaml(path.read_text(encoding="utf-8")) or {}
    with suppress(ValidationError):  # of another version: kept as it is
        raw = type(cell.config).model_validate(raw).model_dump(mode="json")
    raw.pop("run_dir", None)
    found: dict[str, Any] = without_roots(raw)
    return found


def _without_folders(word: str) -> str:
    if word.endswith(".yaml") and "configs/" in word:
        return f"configs/{word.rpartition('configs/')[2]}"
    key, equals, value = word.partition("=")
    return f"{key}={Path(value).name}" if equals and value.startswith("/") else word
