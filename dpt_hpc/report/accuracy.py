"""How good predictions are: errors over all components, by element, and the worst structures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.errors import DataError
from dpt_hpc.structure import MAX_ATOMIC_NUMBER, SYMBOLS

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

PER_ATOM = ("forces", "noise")
"""Labels with a row per atom; the others have a row per structure."""


@dataclass(frozen=True)
class Predictions:
    """predictions_<part>.npz, or several of them pooled.

    arrays: structure_ids (S,), num_atoms (S,), atomic_numbers (A,), and <label>_true, <label>_pred (R, ...) with
    optionally <label>_structure (R,), the structure of each row, for those structures that have the label.
    """

    part: str
    arrays: Mapping[str, NDArray[Any]]
    origin: str

    def array(self, name: str) -> NDArray[Any]:
        """An array of the file. Raises DataError if it is missing."""
        if name not in self.arrays:
            raise DataError(
                f"{self.origin}: array {name!r} is missing; found: {', '.join(sorted(self.arrays))}.\n"
                "Evaluate the run again."
            )
        return self.arrays[name]

    @property
    def num_atoms(self) -> IntArray:
        return self.array("num_atoms").astype(np.int64)

    @property
    def structure_of_atom(self) -> IntArray:
        """(A,)"""
        return np.repeat(np.arange(len(self.num_atoms)), self.num_atoms)


@dataclass(frozen=True)
class Values:
    """True and predicted values of one label, (R, ...), with each row's structure (R,)."""

    label: str
    true: FloatArray
    predicted: FloatArray
    structure: IntArray

    @property
    def row_errors(self) -> FloatArray:
        """(R,) mean absolute error over the components of a row."""
        return np.abs(self.predicted - self.true).reshape(len(self.true), -1).mean(axis=1)


@dataclass(frozen=True)
class Accuracy:
    """Over the `count` components whose values are finite; `not_finite` are left out.

    spread: mean absolute deviation of the labels from their median, the error of the best constant guess.
    r2: nan where all labels are equal.
    """

    mae: float
    rmse: float
    r2: float
    spread: float
    count: int
    not_finite: int


@dataclass(frozen=True)
class ElementError:
    """Mean absolute error of one element: over the force components of its `count` atoms, or over the `count`
    structures that contain it."""

    atomic_number: int
    mae: float
    count: int

    @property
    def symbol(self) -> str:
        return SYMBOLS[self.atomic_number]


@dataclass(frozen=True)
class Worst:
    """A structure with one of the largest errors. For labels per atom, the atom whose error vector is longest."""

    structure_id: str
    formula: str
    num_atoms: int
    true: float
    predicted: float
    error: float


def pool(parts: Sequence[Predictions]) -> Predictions | None:
    """Predictions of several seeds as one; arrays that not all of them have are left out."""
    if len(parts) <= 1:
        return parts[0] if parts else None
    names = set.intersection(*(set(p.arrays) for p in parts))
    offsets = np.cumsum([0, *(len(p.num_atoms) for p in parts[:-1])])
    joined = {}
    for name in names:
        shift = offsets if name.endswith("_structure") else np.zeros_like(offsets)
        pieces = [p.arrays[name] + s if s else p.arrays[name] for p, s in zip(parts, shift, strict=True)]
        joined[name] = np.concatenate(pieces)
    return Predictions(parts[0].part, joined, parts[0].origin)


def values_of(predictions: Predictions, label: str) -> Values | None:
    """The values of a label; None if it was not predicted. Energies per atom are derived from totals if need be.

    Raises DataError if arrays do not fit together.
    """
    arrays = predictions.arrays
    if f"{label}_true" not in arrays:
        if label != "energy_per_atom" or "energy_true" not in arrays:
            return None
        total = values_of(predictions, "energy")
        assert total is not None
        atoms = predictions.num_atoms[total.structure]
        return Values(label, total.true / atoms, total.predicted / atoms, total.structure)
    true = arrays[f"{label}_true"].astype(np.float64)
    predicted = predictions.array(f"{label}_pred").astype(np.float64)
    if f"{label}_structure" in arrays:
        structure = arrays[f"{label}_structure"].astype(np.int64)
    elif label in PER_ATOM:
        structure = predictions.structure_of_atom
    else:
        structure = np.arange(len(predictions.num_atoms))
    if true.shape != predicted.shape or len(true) != len(structure):
        raise DataError(
            f"{predictions.origin}: {label}_true {true.shape}, {label}_pred {predicted.shape} and the structures "
            f"of their rows ({len(structure)},) do not fit together.\nEvaluate the run again."
        )
    return Values(label, true, predicted, structure)


def accuracy(values: Values) -> Accuracy:
    """Errors over all components."""
    true, predicted = values.true.ravel(), values.predicted.ravel()
    finite = np.isfinite(true) & np.isfinite(predicted)
    true, error = true[finite], (predicted - true)[finite]
    left_out = int((~finite).sum())
    if not len(true):
        return Accuracy(np.nan, np.nan, np.nan, np.nan, 0, left_out)
    variance = float(((true - true.mean()) ** 2).mean())
    square = float((error**2).mean())
    return Accuracy(
        mae=float(np.abs(error).mean()),
        rmse=square**0.5,
        r2=1 - square / variance if variance > 0 else np.nan,
        spread=float(np.abs(true - np.median(true)).mean()),
        count=len(true),
        not_finite=left_out,
    )


def errors_by_element(values: Values, predictions: Predictions) -> list[ElementError]:
    """Mean absolute error of every element, in the order of atomic numbers; values that are not finite are left out."""
    numbers = predictions.array("atomic_numbers").astype(np.int64)
    structure_of_atom = predictions.structure_of_atom
    errors = values.row_errors
    if values.label in PER_ATOM:
        labelled = np.isin(structure_of_atom, values.structure)
        if int(labelled.sum()) != len(errors):
            raise DataError(
                f"{predictions.origin}: {len(errors)} rows of {values.label} for {int(labelled.sum())} atoms.\n"
                "Evaluate the run again."
            )
        numbers = numbers[labelled]
    else:
        per_structure = np.full(len(predictions.num_atoms), np.nan)
        per_structure[values.structure] = errors
        pairs = np.unique(structure_of_atom * (MAX_ATOMIC_NUMBER + 1) + numbers)
        numbers, errors = pairs % (MAX_ATOMIC_NUMBER + 1), per_structure[pairs // (MAX_ATOMIC_NUMBER + 1)]
    finite = np.isfinite(errors)
    counts = np.bincount(numbers[finite], minlength=MAX_ATOMIC_NUMBER + 1)
    totals = np.bincount(numbers[finite], weights=errors[finite], minlength=MAX_ATOMIC_NUMBER + 1)
    return [ElementError(int(z), float(totals[z] / counts[z]), int(counts[z])) for z in np.flatnonzero(counts) if z]


def worst_structures(values: Values, predictions: Predictions, number: int = 8) -> list[Worst]:
    """The structures with the largest errors, the largest first.

    true and predicted are the value itself for scalars, and the norm for vectors and tensors; error is the norm of
    the difference.
    """
    flat = (len(values.true), -1)
    error = np.linalg.norm((values.predicted - values.true).reshape(flat), axis=1)
    error = np.where(np.isfinite(error), error, np.inf)
    found: list[Worst] = []
    seen: set[int] = set()
    numbers = predictions.array("atomic_numbers")
    offsets = np.concatenate([[0], np.cumsum(predictions.num_atoms)])
    for row in np.argsort(-error, kind="stable"):
        s = int(values.structure[row])
        if s in seen:
            continue
        seen.add(s)
        pair = values.true[row], values.predicted[row]
        true, predicted = (float(v) if v.ndim == 0 else float(np.linalg.norm(v)) for v in pair)
        identity = str(predictions.array("structure_ids")[s])
        composition = formula(numbers[offsets[s] : offsets[s + 1]])
        found.append(Worst(identity, composition, int(predictions.num_atoms[s]), true, predicted, float(error[row])))
        if len(found) == number:
            break
    return found


def formula(atomic_numbers: NDArray[Any]) -> str:
    """Composition of a cell, elements in the order of their symbols, counts as subscripts: Li₂O."""
    numbers, counts = np.unique(np.asarray(atomic_numbers, dtype=np.int64), return_counts=True)
    pairs = sorted((SYMBOLS[z], n) for z, n in zip(numbers, counts, strict=True))
    subscripts = str.maketrans("0123456789", "₀₁₂₃₄₅₆₇₈₉")
    return "".join(symbol + (str(n).translate(subscripts) if n > 1 else "") for symbol, n in pairs)
