"""Tables in the form of the paper's Tables 2-5: rows are pre-trainings, columns are datasets; and their arithmetic.

Improvement: 100 (baseline - row) / baseline of the mean test errors, in %, positive is better; a row's average is over
its datasets, as the paper's last column. A cell that was not run is missing: nothing stands in for it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

DRAWS = 10_000
METHOD = (
    f"Intervals: 95 % percentile bootstrap, {DRAWS:,} draws (NumPy's PCG64, seed 0). A draw takes as many seeds as "
    "there are, with replacement, anew for every dataset, and the same ones for row and baseline, since a seed sets "
    "the split of both. Five seeds are few: such an interval is rather too narrow. Every row is "
    "one pre-training, by one seed: how much another one would differ is not in the interval."
)


@dataclass(frozen=True)
class Result:
    """Test errors of one fine-tuning by its seeds (or folds), in the dataset's unit.

    expected: how many seeds are planned. paper: the paper's mean error, where its dataset is the same. notes: what a
    reader must know of this very cell.
    """

    errors: Mapping[int, float]
    expected: int
    paper: float | None = None
    paper_table: int | None = None
    notes: tuple[str, ...] = ()

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.errors.values()) if self.errors else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds."""
        return statistics.stdev(self.errors.values()) if len(self.errors) > 1 else None

    @property
    def complete(self) -> bool:
        return len(self.errors) == self.expected


@dataclass(frozen=True)
class Row:
    """A pre-training with its fine-tunings. results: by dataset; one that was not run is not in it.

    structures: in the training part of the pre-training. command: what made the pre-training.
    """

    name: str
    label: str
    results: Mapping[str, Result]
    structures: int | None = None
    epochs: int | None = None
    dataset: str | None = None
    command: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Column:
    """A dataset. structures, unit: "" and None while no run of it is at hand."""

    dataset: str
    title: str
    unit: str = ""
    structures: int | None = None


@dataclass(frozen=True)
class Table:
    """One network and pooling. paper_table: the number of the paper's table of the same form."""

    network: str
    pooling: str
    title: str
    columns: tuple[Column, ...]
    rows: tuple[Row, ...]
    paper_table: int | None = None
    notes: tuple[str, ...] = field(default=())

    @property
    def baseline(self) -> Row | None:
        return next((row for row in self.rows if row.name == "baseline"), None)


@dataclass(frozen=True)
class Improvement:
    """Of a row over the baseline, in %. interval: 95 %; None where fewer than two seeds are shared.

    datasets: over which the average is taken. seeds: the fewest that row and baseline share on any of them, and how
    many are planned. paper: the paper's, over the same datasets; None unless it has all.
    """

    value: float
    interval: tuple[float, float] | None
    datasets: tuple[str, ...]
    paper: float | None
    seeds: tuple[int, int]


def improvement_on(table: Table, row: Row, dataset: str) -> Improvement | None:
    """Of `row` on one dataset, over the seeds that it shares with the baseline; None without any."""
    return improvement_over(table, row, [dataset])


def improvement_over(table: Table, row: Row, datasets: Sequence[str] | None = None) -> Improvement | None:
    """The average over `datasets` (None: all of the table's), of those on which `row` and the baseline share seeds."""
    baseline = table.baseline
    if baseline is None or row.name == baseline.name:
        return None
    chosen = [c.dataset for c in table.columns] if datasets is None else list(datasets)
    pairs: dict[str, list[tuple[float, float]]] = {}
    for dataset in chosen:
        if dataset in row.results and dataset in baseline.results:
            ours, base = row.results[dataset].errors, baseline.results[dataset].errors
            if shared := sorted(ours.keys() & base.keys()):
                pairs[dataset] = [(ours[seed], base[seed]) for seed in shared]
    if not pairs:
        return None
    values = [_improvement(np.array(seeds)) for seeds in pairs.values()]
    papers = []
    for dataset in pairs:
        ours_there, base_there = row.results[dataset].paper, baseline.results[dataset].paper
        if ours_there is not None and base_there:
            papers.append(100 * (base_there - ours_there) / base_there)
    paper = statistics.fmean(papers) if len(papers) == len(pairs) else None
    seeds = min(map(len, pairs.values())), max(row.results[dataset].expected for dataset in pairs)
    return Improvement(float(np.mean(values)), bootstrap(list(pairs.values())), tuple(pairs), paper, seeds)


def bootstrap(pairs: Sequence[Sequence[tuple[float, float]]], draws: int = DRAWS) -> tuple[float, float] | None:
    """The 95 % interval of the average improvement (METHOD). pairs: per dataset, the errors of row and baseline for
    each seed. None where a dataset has fewer than two seeds, or an error is not finite."""
    if any(len(seeds) < 2 for seeds in pairs) or not all(math.isfinite(e) for s in pairs for pair in s for e in pair):
        return None
    random = np.random.default_rng(0)
    total = np.zeros(draws)
    for seeds in pairs:
        errors = np.array(seeds)
        total += _improvement(errors[random.integers(0, len(errors), size=(draws, len(errors)))])
    low, high = np.percentile(total / len(pairs), [2.5, 97.5])
    return float(low), float(high)


def _improvement(errors: NDArray[np.float64]) -> NDArray[np.float64]:
    """errors (..., seeds, 2) of row and baseline -> (...) in %."""
    ours, base = np.moveaxis(errors.mean(axis=-2), -1, 0)
    found: NDArray[np.float64] = 100 * (base - ours) / base
    return found
