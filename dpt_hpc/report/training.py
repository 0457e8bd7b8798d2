"""Curves of training: losses, errors and learning rate over epochs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from markupsafe import Markup

from dpt_hpc.report.figures import FIRST, SECOND, THIRD, Array, Line, curves
from dpt_hpc.report.runs import Run
from dpt_hpc.report.summary import best_epoch, metric, quantities_of, steps_per_epoch
from dpt_hpc.report.wording import Quantity, count, number

WORTH_SHOWING = 1.0
"""Per cent; a run that waited less in every epoch has no figure about it."""
BINS = 240
"""Losses of single steps are drawn as medians over at most this many bins."""


@dataclass(frozen=True)
class Figure:
    """An <svg> and the sentence below it."""

    svg: Markup
    title: str
    caption: str


def training_curves(runs: Sequence[Run], key: str) -> list[Figure]:
    """Loss, and the error of every label, on training and validation part. Several runs are seeds of one: each faint,
    their mean strong."""
    found = [_figure(runs, f"{key}-loss", "loss", "Loss", "", 1.0)]
    for q in quantities_of(runs[0]):
        found.append(_figure(runs, f"{key}-{q.label}", q.metric, _error_title(q), q.error_unit, q.error_factor))
    return [figure for figure in found if figure is not None]


def learning_rate(runs: Sequence[Run], key: str) -> list[Figure]:
    """The learning rate over epochs."""
    lines: list[Line] = []
    for run in runs:
        records = [r for r in run.epochs if isinstance(r.get("learning_rate"), (int, float))]
        if len(records) > 1:
            x, y = ([float(r[k]) for r in records] for k in ("epoch", "learning_rate"))
            lines.append(Line("", np.array(x), np.array(y), THIRD))
    if not lines:
        return []
    first, last = lines[0].y[0], lines[0].y[-1]
    caption = f"From {number(first, 2)} to {number(last, 2)}." if first != last else f"Constant at {number(first, 2)}."
    if len(lines) > 1:
        caption = "One line per seed."
    title = "Learning rate"
    return [Figure(Markup(curves(f"{key}-lr", title, lines, "epoch", "")), title, caption)]


def waiting(runs: Sequence[Run], key: str) -> list[Figure]:
    """What epochs lost to waiting, where they lost anything: for data, and for the rank with most edges."""
    losses = (("without data", FIRST, _data_wait), ("fullest rank over the mean", SECOND, _excess))
    lines: list[Line] = []
    for label, role, loss_of in losses:
        for i, run in enumerate(runs):
            points = [
                (float(r["epoch"]), 100 * loss_of(r)) for r in run.epochs if "data_wait" in r and "imbalance" in r
            ]
            if len(points) > 1 and max(y for _, y in points) >= WORTH_SHOWING:
                x, y = np.array(points).T
                lines.append(Line("" if i else label, x, y, role))
    if not lines:
        return []
    title = "Waiting"
    caption = (
        "Per cent of the time in which the rank that waited most was without data, and by how many per cent the "
        "fullest rank's edges exceeded the mean of all, averaged over the steps of an epoch."
    )
    return [Figure(Markup(curves(f"{key}-waiting", title, lines, "epoch", "%", log=False)), title, caption)]


def _data_wait(record: Mapping[str, Any]) -> float:
    return float(record["data_wait"])


def _excess(record: Mapping[str, Any]) -> float:
    return float(record["imbalance"]["mean"]) - 1


def compared_curves(runs: Sequence[Run]) -> list[Figure]:
    """Validation errors of several pre-training runs in one figure per label; [] for fewer than two."""
    found = []
    quantities = list(dict.fromkeys(q for run in runs for q in quantities_of(run)))
    for q in quantities:
        lines: list[Line] = []
        for run in runs:
            x, y = _series(run, "validation", q.metric, q.error_factor)
            if len(x) > 1 and q in quantities_of(run):
                name = run.name if len(run.name) <= 24 else f"…{run.name[-23:]}"
                role = (FIRST, SECOND, THIRD)[len(lines) % 3]
                lines.append(Line(name, x, y, role, dashed=len(lines) >= 3))
        if 2 <= len(lines) <= 6:
            title = f"{_error_title(q)}, validation"
            svg = curves(f"all-{q.label}", title, lines, "epoch", q.error_unit)
            found.append(Figure(Markup(svg), title, "Mean absolute error on each run's own validation structures."))
    return found


def _error_title(q: Quantity) -> str:
    return f"{q.name}: mean absolute error"


def _figure(runs: Sequence[Run], key: str, name: str, title: str, unit: str, factor: float) -> Figure | None:
    lines: list[Line] = []
    missing = 0
    for part, role in (("train", FIRST), ("validation", SECOND)):
        series = [s for s in (_series(run, part, name, factor) for run in runs) if len(s[0])]
        missing += sum(int((~np.isfinite(y)).sum()) for _, y in series)
        series = [(x, y) for x, y in series if np.isfinite(y).any()]
        if len(series) > 1:
            lines += [Line("", x, y, role, faint=True) for x, y in series]
            lines.append(Line(f"{part} (mean)", *_mean(series), role))
        elif series:
            lines.append(Line(part, *series[0], role))
    steps = _step_losses(runs[0]) if name == "loss" and len(runs) == 1 else None
    if steps is not None:
        lines.insert(0, steps)
    if all(len(line.x) < 2 for line in lines):
        return None
    best = best_epoch(runs[0]) if len(runs) == 1 else None
    place = float(best["epoch"]) if best is not None else None
    svg = curves(key, f"{title}, over epochs", lines, "epoch", unit, best=place)
    return Figure(Markup(svg), title, _caption(runs, name, best, missing, factor, unit))


def _caption(runs: Sequence[Run], name: str, best: object, missing: int, factor: float, unit: str) -> str:
    sentences = []
    if len(runs) > 1:
        sentences.append("Faint: single seeds.")
    elif isinstance(best, dict):
        value = metric(best, "validation", name)
        if value is not None:
            shown = f"{number(value * factor)} {unit}".strip()
            sentences.append(f"{shown} on validation at the best epoch, {best['epoch']} (dotted).")
    if name == "loss" and len(runs) == 1 and runs[0].steps:
        sentences.append("Faint: single steps.")
    if missing:
        sentences.append(f"{count(missing, 'value')} not a number (NaN or infinite): left out.")
    return " ".join(sentences)


def _series(run: Run, part: str, name: str, factor: float) -> tuple[Array, Array]:
    """Epochs and values; nan for what is not finite."""
    pairs = [(float(r["epoch"]), metric(r, part, name)) for r in run.epochs]
    known = [(epoch, value) for epoch, value in pairs if value is not None]
    x, y = np.array([e for e, _ in known]), np.array([v for _, v in known]) * factor
    return x, np.where(np.isfinite(y), y, np.nan)


def _mean(series: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """The mean over those runs that are furthest, so that it does not jump where a run ends."""
    last = max(float(x[-1]) for x, _ in series)
    furthest = [dict(zip(x.tolist(), y.tolist(), strict=True)) for x, y in series if x[-1] == last]
    shared = sorted(set.intersection(*(set(values) for values in furthest)))
    return np.array(shared), np.array([np.mean([values[epoch] for values in furthest]) for epoch in shared])


def _step_losses(run: Run) -> Line | None:
    """Losses of single steps, placed between epochs."""
    known = [(int(r["step"]), r.get("loss")) for r in run.steps]
    pairs = [(step, loss) for step, loss in known if isinstance(loss, (int, float)) and np.isfinite(loss)]
    per_epoch = steps_per_epoch(run)
    if not pairs or not per_epoch:
        return None
    x = np.array([step for step, _ in pairs]) / per_epoch
    y = np.array([float(loss) for _, loss in pairs])
    groups = np.array_split(np.arange(len(x)), min(BINS, len(x)))
    medians = np.array([np.median(y[g]) for g in groups])
    return Line("", np.array([x[g].mean() for g in groups]), medians, FIRST, faint=True)
