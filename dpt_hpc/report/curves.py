"""Fine-tuning errors against the length of the pre-training (the paper's Table 5), or against its structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

from dpt_hpc.report.tables import Column, Result, Row, Table

X = Literal["epochs", "structures"]
AXES: Mapping[X, str] = {"epochs": "epochs of the pre-training", "structures": "structures of the pre-training"}
COLOURS = ("#0b6e99", "#c8553d", "#5b8c5a", "#7d5ba6")


def curve(rows: Sequence[Row], dataset: str, x: X) -> list[tuple[int, Result]]:
    """The points of one line: where it is known, and what was measured there; sorted. A row not run has none."""
    found = [(getattr(row, x), row.results.get(dataset)) for row in rows]
    return sorted(((at, result) for at, result in found if at and result and result.errors), key=lambda point: point[0])


def draw_curves(table: Table, lines: Mapping[str, Sequence[str]], x: X, out: Path) -> Path | None:
    """One panel for each dataset; mean and standard deviation over the seeds, the baseline as a band, the paper's
    numbers as hollow marks. lines: labels, and the names of the rows of each. Returns `out`, or None if nothing is
    there to be drawn."""
    rows = {label: [row for row in table.rows if row.name in names] for label, names in lines.items()}
    columns = [c for c in table.columns if any(curve(own, c.dataset, x) for own in rows.values())]
    if not columns:
        return None
    figure = Figure(figsize=(3.4 * len(columns), 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, column in zip(figure.subplots(1, len(columns), squeeze=False)[0], columns, strict=True):
        ticks: set[int] = set()
        for (label, own), colour in zip(rows.items(), COLOURS, strict=False):
            points = curve(own, column.dataset, x)
            if points:
                ticks |= _draw(axes, points, label, colour)
        _draw_baseline(axes, table.baseline, column)
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(FixedLocator(sorted(ticks)))
        axes.xaxis.set_major_formatter(FixedFormatter([f"{tick:,}" for tick in sorted(ticks)]))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set_xlabel(AXES[x])
        axes.set_ylabel(f"test MAE, {column.unit}" if column.unit else "test MAE")
        axes.set_title(column.title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=8)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=140)
    return out


def _draw(axes: Any, points: Sequence[tuple[int, Result]], label: str, colour: str) -> set[int]:
    places = np.array([at for at, _ in points])
    means = np.array([result.mean for _, result in points], dtype=float)
    spreads = np.array([result.std or 0.0 for _, result in points])
    axes.errorbar(places, means, yerr=spreads, marker="o", markersize=4, capsize=2, color=colour, label=label)
    if papers := [(at, result.paper) for at, result in points if result.paper is not None]:
        axes.plot(*zip(*papers, strict=True), "s", markersize=5, mfc="none", color=colour, label=f"{label}, the paper")
    return set(places.tolist())


def _draw_baseline(axes: Any, baseline: Row | None, column: Column) -> None:
    result = baseline.results.get(column.dataset) if baseline is not None else None
    if result is None or result.mean is None:
        return
    axes.axhline(result.mean, color="#777777", linewidth=1, label="not pre-trained")
    if result.std is not None:
        axes.axhspan(result.mean - result.std, result.mean + result.std, color="#777777", alpha=0.15, linewidth=0)
