"""What the page shows of one run: how far it is, its numbers of this moment, its charts, and what went wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from dpt_hpc.report.runs import Run
from dpt_hpc.report.summary import best_epoch, metric, quantities_of, steps_per_epoch, subject
from dpt_hpc.report.wording import count, duration, integer, number, percent, plain, quantity
from dpt_hpc.watch.faults import last_error, skipped_steps
from dpt_hpc.watch.log import Log, is_finite
from dpt_hpc.watch.thinned import thinned

Points = list[tuple[float, float]]
Record = Mapping[str, Any]

TITLES = {"grad_norm": "Gradient norm", "seconds": "Seconds of training in an epoch", "gpu_memory_gb": "GPU memory, GB"}
"""Names of numbers in the log; any other number that it holds, now or later, is shown under its own."""


def view(run: Run, log: Log, *, running: bool) -> dict[str, Any]:
    """All of `run`, whose log has been read, as JSON. Only a run that is running has an end in sight."""
    run = replace(run, epochs=tuple(log.epochs))
    left = seconds_left(run, log)
    total = round(steps_per_epoch(run) * (run.total_epochs or 0))
    return {
        "path": str(run.path),
        "subject": subject(run) if run.config else "",
        "command": str(run.environment.get("command") or ""),
        "done": 1.0 if run.finished else min(1.0, log.step / total) if total else None,
        "left": left if running else None,
        "time": log.time or None,
        "reading": log.behind,
        "numbers": [[name, value, note] for name, value, note in _numbers(run, log, total, left)],
        "charts": [chart for chart in _charts(run, log) if chart["lines"]],
        "error": last_error(run.path),
        "skipped": skipped_steps(run.path),
        "doubts": _doubts(log),
        "settings": settings(run),
    }


def settings(run: Run) -> list[list[str]]:
    """Where and since when it runs, as names and values."""
    known = run.environment
    resumed = known.get("resumed")
    found = [
        ("Started", known.get("started")),
        ("Resumed", count(len(resumed), "time") if isinstance(resumed, list) and resumed else None),
        ("Device", known.get("gpu") if "cuda" in str(known.get("device")) else known.get("device")),
        ("Ranks", known.get("world_size")),
        ("Nodes", ", ".join(map(str, known["nodes"])) if isinstance(known.get("nodes"), list) else None),
        ("Launched by", known.get("launched_by")),
    ]
    return [[name, str(value)] for name, value in found if value is not None]


def seconds_left(run: Run, log: Log) -> float | None:
    """At the pace of the later half of the steps since the last start, for machines slow down and recover; None while
    that is not known, and where nothing is left."""
    total = steps_per_epoch(run) * (run.total_epochs or 0)
    if run.finished or not total or "time" not in log.steps:
        return None
    since = _last_start(run)
    times = [(step, time) for step, time in log.steps["time"].points if time >= since]
    if len(times) < 2:
        return None
    (first, began), (last, ended) = times[(len(times) - 1) // 2], times[-1]
    pace = (ended - began) / (last - first)
    return max(0.0, total - log.step) * pace


def _last_start(run: Run) -> float:
    resumed = run.environment.get("resumed")
    text = resumed[-1] if isinstance(resumed, list) and resumed else run.environment.get("started")
    try:
        return datetime.fromisoformat(str(text)).timestamp()
    except ValueError:
        return 0.0


def _numbers(run: Run, log: Log, total: int, left: float | None) -> Iterable[tuple[str, str, str]]:
    """Name, value and remark of what stands above the charts."""
    last = run.epochs[-1] if run.epochs else {}
    of = f"of {integer(run.total_epochs)}" if run.total_epochs else ""
    yield "Epochs done", integer(run.last_epoch), of
    yield "Step", integer(log.step), f"of {integer(total)}" if total else ""
    if left:
        early = isinstance(run.config.get("training"), dict) and run.config["training"].get("early_stopping")
        yield "Time left", duration(left if left < 120 else 60 * round(left / 60)), "at the most" if early else ""
    best = best_epoch(run)
    for q in quantities_of(run):
        value = metric(last, "validation", q.metric)
        if value is not None:
            at_best = metric(best, "validation", q.metric) if best is not None else None
            note = "" if at_best is None or best is None else f"{number(at_best * q.error_factor)} at the best epoch"
            yield f"{q.name}, validation", quantity(value * q.error_factor, q.error_unit), note
    for name in (name for name in _names(run, log) if name.endswith("_per_second")):
        yield _title(name), number(_latest(name, log, last)), ""
    if is_finite(last.get("data_wait")):
        yield "Without data", percent(100 * last["data_wait"], 1).lstrip("+"), "of the last epoch"
    if is_finite(metric(last, "imbalance", "mean")):
        yield "Imbalance", number(last["imbalance"]["mean"], 4), "fullest rank over the mean"
    rate = _latest("learning_rate", log, last)
    if is_finite(rate):
        yield "Learning rate", plain(float(f"{rate:.3g}")), ""


def _charts(run: Run, log: Log) -> Iterable[dict[str, Any]]:
    per_epoch = steps_per_epoch(run)
    best = best_epoch(run)

    def of_steps(name: str) -> Points:
        points = log.steps[name].points if name in log.steps else []
        return [(step / (per_epoch or 1), value) for step, value in points]

    def of_epochs(value_of: Callable[[Record], Any], factor: float = 1.0) -> Points:
        found = [(float(r["epoch"]), value_of(r)) for r in run.epochs]
        return thinned((x, value * factor) for x, value in found if is_finite(value))

    def errors(name: str, factor: float) -> list[dict[str, Any]]:
        parts = (("train", "first"), ("validation", "second"))
        return [_line(part, role, of_epochs(partial(metric, part=part, name=name), factor)) for part, role in parts]

    def chart(key: str, title: str, lines: list[dict[str, Any]], unit: str = "", **more: Any) -> dict[str, Any]:
        lines = [line for line in lines if line["points"]]
        x = "epoch" if per_epoch else "step"
        return {"key": key, "title": title, "unit": unit, "x": x, "lines": lines, "log": True, "best": None, **more}

    at = None if best is None else best["epoch"]
    steps = _line("single steps", "first", of_steps("loss"), faint=True)
    yield chart("loss", "Loss", [steps, *errors("loss", 1.0)], best=at)
    for q in quantities_of(run):
        title = f"{q.name}: mean absolute error"
        yield chart(q.label, title, errors(q.metric, q.error_factor), q.error_unit, best=at)
    rate = of_steps("learning_rate") or of_epochs(partial(_field, "learning_rate"))
    yield chart("learning_rate", "Learning rate", [_line("learning rate", "third", rate)])
    waits = [
        _line("without data", "first", of_epochs(partial(_field, "data_wait"), 100.0)),
        _line("fullest rank over the mean", "second", of_epochs(_excess, 100.0)),
    ]
    yield chart("waiting", "Waiting", waits, "%", log=False)
    shown = {"kind", "epoch", "step", "time", "loss", "learning_rate", "data_wait"}
    for name in (name for name in _names(run, log) if name not in shown):
        lines = [_line("single steps", "first", of_steps(name), faint=True)]
        lines.append(_line("epochs", "first", of_epochs(partial(_field, name))))
        yield chart(name, _title(name), lines, log=name == "grad_norm")


def _latest(name: str, log: Log, last: Record) -> Any:
    """Of the last steps, else of the last epoch."""
    points = log.steps[name].points if name in log.steps else []
    return points[-1][1] if points else last.get(name)


def _field(name: str, record: Record) -> Any:
    return record.get(name)


def _names(run: Run, log: Log) -> list[str]:
    """Every number that steps or epochs have, rates first."""
    names = dict.fromkeys([*log.steps, *(name for r in run.epochs[-1:] for name, v in r.items() if is_finite(v))])
    return sorted(names, key=lambda name: not name.endswith("_per_second"))


def _title(name: str) -> str:
    return TITLES.get(name) or name.replace("_", " ").capitalize()


def _excess(record: Record) -> float | None:
    """By how much the fullest rank's edges exceeded the mean of all."""
    mean = metric(record, "imbalance", "mean")
    return None if mean is None else mean - 1


def _line(label: str, role: str, points: Points, *, faint: bool = False) -> dict[str, Any]:
    rounded = [[float(f"{x:.6g}"), float(f"{y:.6g}")] for x, y in points]
    return {"label": label, "role": role, "faint": faint, "points": rounded}


def _doubts(log: Log) -> list[str]:
    """What a reader must know of the log itself, and what the run has warned of."""
    found = []
    if log.not_finite:
        found.append(f"The loss of {count(log.not_finite, 'step')} was not a number (NaN or infinite); left out.")
    if log.damaged:
        found.append(f"{count(log.damaged, 'line')} of metrics.jsonl cannot be read; left out.")
    return [*found, *log.warnings]


def empty(path: Path, reason: str) -> dict[str, Any]:
    """In the place of a run whose files cannot be read."""
    return {"path": str(path), "subject": reason, "numbers": [], "charts": [], "doubts": [], "settings": []}
