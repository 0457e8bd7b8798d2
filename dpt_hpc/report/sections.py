"""How good the predictions of a run, or of all its seeds, are: parity, errors by element, worst structures."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from markupsafe import Markup

from dpt_hpc.report.accuracy import (
    PER_ATOM,
    Accuracy,
    ElementError,
    Predictions,
    accuracy,
    errors_by_element,
    pool,
    values_of,
    worst_structures,
)
from dpt_hpc.report.figures import parity
from dpt_hpc.report.runs import Run
from dpt_hpc.report.summary import quantities_of
from dpt_hpc.report.training import Figure
from dpt_hpc.report.wording import NO_BREAK, Quantity, integer, number, quantity, r_squared, short

MANY_ELEMENTS = 8
"""More elements than this are shown as a periodic table."""


def accuracy_figures(parts: Sequence[Predictions], run: Run, key: str) -> list[Figure]:
    """A parity plot of every label, the seeds of a fine-tuning together."""
    predictions = pool(parts)
    found = []
    for q in quantities_of(run):
        values = values_of(predictions, q.label) if predictions else None
        if values is None or predictions is None or not len(values.true):
            continue
        true, predicted = values.true.ravel() * q.factor, values.predicted.ravel() * q.factor
        a = accuracy(values)
        title = f"{q.name}, {predictions.part}"
        label = f"{title}: predicted against true. {_numbers(a, q)}"
        svg = parity(f"{key}-parity-{q.label}", label, true, predicted, q.unit)
        seeds = (
            f" {len(parts)} seeds together, each on its own {predictions.part} structures." if len(parts) > 1 else ""
        )
        left_out = f" {integer(a.not_finite)} not a number (NaN or infinite): left out." if a.not_finite else ""
        found.append(Figure(Markup(svg), title, f"{_numbers(a, q)}.{seeds}{left_out}"))
    return found


def _numbers(a: Accuracy, q: Quantity) -> str:
    return (
        f"MAE{NO_BREAK}{quantity(a.mae * q.error_factor, q.error_unit)}, "
        f"RMSE{NO_BREAK}{quantity(a.rmse * q.error_factor, q.error_unit)}, "
        f"R²{NO_BREAK}{r_squared(a.r2)}, {integer(a.count)}{NO_BREAK}{q.rows}"
    )


def elements(parts: Sequence[Predictions], run: Run) -> list[dict[str, Any]]:
    """Errors by element for every label that has them, as cells of a periodic table and as rows of a list."""
    predictions = pool(parts)
    found = []
    for q in quantities_of(run):
        values = values_of(predictions, q.label) if predictions else None
        if values is None or predictions is None or q.label == "stress":
            continue
        errors = errors_by_element(values, predictions)
        if not errors:
            continue
        per_atom = q.label in PER_ATOM
        shades = _shades(errors)
        rows = [
            {
                "symbol": e.symbol,
                "mae": number(e.mae * q.error_factor),
                "short": short(e.mae * q.error_factor),
                "count": integer(e.count),
                "width": f"{100 * e.mae / max(o.mae for o in errors):.1f}" if e.mae > 0 else "0",
                "shade": f"{shades[e.atomic_number]:.2f}",
                "row": place(e.atomic_number)[0],
                "column": place(e.atomic_number)[1],
                "few": e.count < 10,
            }
            for e in errors
        ]
        worst_first = sorted(zip(errors, rows, strict=True), key=lambda pair: -pair[0].mae)
        finite = [e.mae * q.error_factor for e in errors]
        found.append(
            {
                "title": f"{q.name} by element",
                "unit": q.error_unit,
                "counted": "atoms" if per_atom else "structures",
                "how": (
                    f"Mean absolute error over the components of each element's atoms, {predictions.part} structures."
                    if per_atom
                    else f"Mean absolute error over the {predictions.part} structures that contain the element."
                ),
                "cells": rows,
                "rows": [row for _, row in worst_first],
                "table": len(rows) > MANY_ELEMENTS,
                "low": number(min(finite), 2),
                "high": number(max(finite), 2),
                "seldom": any(row["few"] for row in rows),
            }
        )
    return found


def _shades(errors: Sequence[ElementError]) -> dict[int, float]:
    """Opacity of every element, by the logarithm of its error; under a hundredth of the largest, all are pale."""
    floor = max(e.mae for e in errors) / 100 or 1.0
    logs = {e.atomic_number: math.log(max(e.mae, floor)) for e in errors}
    low, high = min(logs.values()), max(logs.values())
    return {z: 0.08 + 0.5 * ((value - low) / (high - low) if high > low else 0.5) for z, value in logs.items()}


def place(atomic_number: int) -> tuple[int, int]:
    """Row and column (from 1) in an 18-column periodic table; lanthanides and actinides in rows 9 and 10."""
    z = atomic_number
    if 57 <= z <= 71 or 89 <= z <= 103:
        return (9, z - 57 + 3) if z <= 71 else (10, z - 89 + 3)
    for period, (first, last) in enumerate(((1, 2), (3, 10), (11, 18), (19, 36), (37, 54), (55, 86), (87, 118)), 1):
        if first <= z <= last:
            left = 1 if period == 1 else 2
            from_left = z - first + 1
            return period, from_left if from_left <= left else 18 - (last - z)
    raise ValueError(f"no element has the atomic number {z}")


def worst(parts: Sequence[Predictions], run: Run) -> list[dict[str, Any]]:
    """The structures with the largest errors of every label."""
    predictions = pool(parts)
    found = []
    for q in quantities_of(run):
        values = values_of(predictions, q.label) if predictions else None
        if values is None or predictions is None or not len(values.true):
            continue
        vectors = values.true.ndim > 1
        found.append(
            {
                "title": q.name,
                "unit": q.unit,
                "vectors": vectors,
                "per_atom": q.label in PER_ATOM,
                "rows": [
                    {
                        "id": w.structure_id,
                        "formula": w.formula,
                        "atoms": w.num_atoms,
                        "true": number(w.true * q.factor, 4),
                        "predicted": number(w.predicted * q.factor, 4),
                        "error": number(w.error * q.factor if np.isfinite(w.error) else math.nan),
                    }
                    for w in worst_structures(values, predictions)
                ],
            }
        )
    return found
