"""Run directories as the trainer leaves them, finished or still running, read for the report."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.errors import DataError
from dpt_hpc.plain_text import from_json, from_yaml
from dpt_hpc.report.accuracy import Predictions

PARTS = ("test", "validation", "train")
"""Parts of a split, the most telling first."""


@dataclass(frozen=True)
class Source:
    """A dataset that a run was trained on: what the run noted, and the dataset's own manifest where it can be found."""

    path: str
    structures: int | None
    digest: str | None
    manifest: Mapping[str, Any]

    @property
    def name(self) -> str:
        return Path(self.path).name

    @property
    def changed(self) -> bool:
        """Whether the dataset at `path` is no longer the one that the run read."""
        return bool(self.digest and self.manifest.get("digest") and self.digest != self.manifest["digest"])


@dataclass(frozen=True)
class Run:
    """One training run.

    config, environment, results: config.yaml, run.json, results.json ({} where missing). epochs, steps: records of
    metrics.jsonl in their order. cut: its last line was only half written. split: structures in each part.
    """

    path: Path
    name: str
    config: Mapping[str, Any]
    environment: Mapping[str, Any]
    results: Mapping[str, Any]
    epochs: tuple[Mapping[str, Any], ...]
    steps: tuple[Mapping[str, Any], ...]
    cut: bool
    predictions: Predictions | None
    split: Mapping[str, int]
    sources: tuple[Source, ...]

    @property
    def finished(self) -> bool:
        """Whether it has come to its end, and does not go on to more epochs."""
        return "finished" in self.environment if "started" in self.environment else bool(self.results)

    @property
    def objective(self) -> Mapping[str, Any]:
        return _mapping(self.config.get("objective"))

    @property
    def task(self) -> str:
        return str(self.config.get("task") or self.results.get("task") or "training")

    @property
    def kind(self) -> str:
        """derivatives, derivative_denoising, head_denoising, mixed or property."""
        labels = {"mixed": ("noise", "energy"), "derivative_denoising": ("noise",), "property": ("target",)}
        arrays = self.predictions.arrays if self.predictions else {}
        found = [kind for kind, own in labels.items() if all(f"{label}_true" in arrays for label in own)]
        default = "property" if self.task == "finetune" else (found or ["derivatives"])[0]
        return str(self.objective.get("kind", default))

    @property
    def network(self) -> str:
        return str(_mapping(self.config.get("model")).get("name") or self.environment.get("network") or "network")

    @property
    def total_epochs(self) -> int | None:
        epochs = _mapping(self.config.get("training")).get("epochs")
        return epochs if isinstance(epochs, int) else None

    @property
    def last_epoch(self) -> int:
        return max((int(r["epoch"]) for r in self.epochs), default=0)

    @property
    def last_time(self) -> float | None:
        """Unix time of the last record."""
        times = [r["time"] for r in (*self.epochs[-1:], *self.steps[-1:]) if isinstance(r.get("time"), (int, float))]
        return max(times, default=None)


@dataclass(frozen=True)
class FineTuning:
    """Fine-tuning over several seeds: the summary ({} until all are finished), and a run per seed."""

    path: Path
    name: str
    results: Mapping[str, Any]
    seeds: tuple[tuple[int, Run], ...]
    expected: int

    @property
    def finished(self) -> bool:
        return bool(self.results) or (len(self.seeds) >= self.expected and all(run.finished for run in self.runs))

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for _, run in self.seeds)


def load_runs(paths: Sequence[Path]) -> list[Run | FineTuning]:
    """Read every run directory; a directory with seed_<n> folders is a fine-tuning.

    Raises DataError for a directory that holds no run, and for a file that cannot be read, naming file and line.
    """
    if not paths:
        raise DataError("report: no run given.\nName one run directory or several.")
    unique = list(dict.fromkeys(Path(p).resolve() for p in paths))
    names = _names(unique)
    return [_load(path, name) for path, name in zip(unique, names, strict=True)]


def _names(paths: Sequence[Path]) -> list[str]:
    """The shortest names that tell the runs apart: relative to the folder that they share."""
    if len(paths) == 1:
        return [paths[0].name]
    shared = os.path.commonpath([str(p.parent) for p in paths])
    return [str(p.relative_to(shared)) for p in paths]


def _load(path: Path, name: str) -> Run | FineTuning:
    if not path.is_dir():
        raise DataError(f"run {path}: no such directory.\nName a directory that a training run wrote.")
    folders = [p for p in path.glob("seed_*") if p.is_dir() and p.name.removeprefix("seed_").isdigit()]
    if folders:
        seeds = sorted((int(p.name.removeprefix("seed_")), p) for p in folders)
        runs = tuple((seed, load_run(p, f"{name}/{p.name}")) for seed, p in seeds)
        planned = runs[0][1].config.get("seeds")
        expected = len(planned) if isinstance(planned, list) else len(runs)
        return FineTuning(path, name, read_json(path / "results.json"), runs, expected)
    if not any((path / f).exists() for f in ("config.yaml", "run.json", "metrics.jsonl", "results.json")):
        raise DataError(
            f"run {path}: holds no run: no config.yaml, run.json, metrics.jsonl, results.json or seed_<n> folder.\n"
            "Name a directory that a training run wrote."
        )
    run = load_run(path, name)
    if run.task != "finetune":
        return run
    seed = run.environment.get("seed")
    return FineTuning(path, name, {}, ((seed if isinstance(seed, int) else 0, run),), 1)


def load_run(path: Path, name: str) -> Run:
    """Read one run directory; what is not there yet is empty."""
    records, cut = read_metrics(path / "metrics.jsonl")
    return replace(
        facts_of(path, name),
        epochs=tuple(r for r in records if r.get("kind") == "epoch" and isinstance(r.get("epoch"), int)),
        steps=tuple(r for r in records if r.get("kind") == "step" and isinstance(r.get("step"), int)),
        cut=cut,
        predictions=_predictions(path),
    )


def facts_of(path: Path, name: str) -> Run:
    """A run without its log and its predictions: the small files of its directory."""
    environment = read_json(path / "run.json")
    noted = environment.get("dataset")
    return Run(
        path=path,
        name=name,
        config=_yaml(path / "config.yaml"),
        environment=environment,
        results=read_json(path / "results.json"),
        epochs=(),
        steps=(),
        cut=False,
        predictions=None,
        split=_split(environment.get("split"), path / "split.npz"),
        sources=tuple(_source(n, path) for n in noted if isinstance(n, dict)) if isinstance(noted, list) else (),
    )


def read_metrics(path: Path) -> tuple[list[dict[str, Any]], bool]:
    """Records of a metrics.jsonl, and whether its last line was cut short (its run was killed or is writing it).

    Raises DataError, with file and line, if any other line is not a JSON object.
    """
    if not path.exists():
        return [], False
    lines = path.read_bytes().split(b"\n")
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = from_json(line)
        except ValueError as error:
            if number == len(lines):  # no newline after it
                return records, True
            raise DataError(
                f"{path}:{number}: not a line of JSON ({error}).\n"
                "Only the last line of a running log may be incomplete: restore the file, or leave this run out."
            ) from None
        if not isinstance(record, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, got {type(record).__name__}.\nRestore the file.")
        records.append(record)
    return records, False


def find_run(path: str | None, near: Path) -> Path | None:
    """The run directory that `path` (a run or one of its checkpoints, as a config names it) lies in.

    Relative paths are tried from the current directory and from every folder above `near`. None for the weights of a
    run that is elsewhere: a name, an exported file.
    """
    if not path:
        return None
    candidates = [Path(path)] if Path(path).is_absolute() else [Path(path), *(p / path for p in near.parents)]
    for candidate in candidates:
        folder = candidate.parent if candidate.name in ("model.yaml", "model.safetensors") else candidate
        folder = folder.parent.parent if folder.parent.name == "checkpoints" else folder
        if (folder / "config.yaml").is_file():
            return folder.resolve()
    return None


def run_behind(name: str, noted: Mapping[str, Any]) -> Run:
    """The pre-training of weights whose run is not here, as the run that begins from them noted it."""
    learnt, epochs = noted["trained_on"], noted.get("epochs")
    split = {part: n for part, n in (learnt.get("split") or {}).items() if part in PARTS}
    return Run(
        path=Path(name),
        name=name,
        config={"task": "pretrain", "objective": learnt.get("objective") or {}},
        environment={},
        results={},
        epochs=({"epoch": epochs},) if isinstance(epochs, int) else (),
        steps=(),
        cut=False,
        predictions=None,
        split=split,
        sources=(),
    )


def _source(noted: Mapping[str, Any], run: Path) -> Source:
    path = str(noted.get("path", ""))
    places = [Path(path)] if Path(path).is_absolute() else [Path(path), *(p / path for p in run.parents)]
    found = next((p / "dataset.json" for p in places if path and (p / "dataset.json").is_file()), None)
    manifest: Mapping[str, Any] = {}
    if found is not None:
        try:
            manifest = read_json(found)
        except DataError:
            manifest = {}  # the report is about the run: a dataset that is being rewritten must not stop it
    structures = noted.get("structures")
    return Source(path, structures if isinstance(structures, int) else None, noted.get("digest"), manifest)


def _split(noted: Any, stored: Path) -> dict[str, int]:
    """Structures of each part, as noted by the run or counted in its split.npz."""
    if isinstance(noted, dict) and noted and all(isinstance(n, int) for n in noted.values()):
        return dict(noted)
    return {part: len(ids) for part, ids in (_arrays(stored) or {}).items()}


def _predictions(path: Path) -> Predictions | None:
    for part in PARTS:
        arrays = _arrays(path / f"predictions_{part}.npz")
        if arrays:
            return Predictions(part, arrays, str(path / f"predictions_{part}.npz"))
    return None


def _arrays(path: Path) -> dict[str, NDArray[Any]] | None:
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as stored:
            return {name: stored[name] for name in stored.files}
    except Exception as error:  # numpy and zipfile raise nearly anything for a damaged file
        raise DataError(f"{path}: cannot be read: {error}.\nEvaluate the run again, or delete the file.") from None


def read_json(path: Path) -> Mapping[str, Any]:
    """The object in a JSON file; {} where it is missing or holds another value. Raises DataError for a damaged one."""
    if not path.exists():
        return {}
    try:
        return _mapping(from_json(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}).\nRestore the file, or leave this run out.") from None


def _yaml(path: Path) -> Mapping[str, Any]:
    if not path.exists():
        return {}
    try:
        return _mapping(from_yaml(path.read_text(encoding="utf-8")))
    except ValueError as error:
        raise DataError(f"{path}: not valid YAML.\n{error}") from None


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
