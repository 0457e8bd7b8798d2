"""What the output scaling is set to: element references and spreads, fitted on the training split alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpt_hpc.data.group import agree
from dpt_hpc.errors import DataError
from dpt_hpc.models import Scaling
from dpt_hpc.structure import MAX_ATOMIC_NUMBER, Batch
from dpt_hpc.train.config import LabelOptions, MixedOptions, ObjectiveOptions, PropertyOptions
from dpt_hpc.train.data import Data
from dpt_hpc.train.objective.denoising import to_denoise
from dpt_hpc.train.ranks import Ranks

Rows = NDArray[np.float64]

BLOCK = 512
"""Structures read at a time."""
EPSILON = float(np.finfo(np.float64).eps)


class Triangle:
    """The R of a QR decomposition of rows that come block by block (S,K): it is all of them that least squares needs.

    Each block is put below the R of those before it and reduced with it by Householder reflections (Golub and Van Loan,
    Matrix Computations, on updating QR): memory for one block, whatever S, and errors as small as those of all rows at
    once; sums of A^T A would square them.
    """

    def __init__(self, columns: int) -> None:
        self.rows = 0
        self.values: Rows = np.zeros((columns, columns))

    def add(self, rows: Rows) -> None:
        """Rows (B,K) more."""
        self.rows += len(rows)
        reduced: Any = np.linalg.qr(np.concatenate([self.values, rows]), mode="r")
        self.values = reduced

    def solve(self) -> Rows:
        """(K-1,) x of least norm among those that minimise |rows[:, :-1] @ x - rows[:, -1]|."""
        # What is below is noise of rounding in the rows themselves, as numpy takes it for the whole matrix.
        smallest = EPSILON * max(self.rows, len(self.values) - 1)
        solution: Any = np.linalg.lstsq(self.values[:, :-1], self.values[:, -1], rcond=smallest)[0]
        return np.asarray(solution)

    def spread(self, combination: Rows) -> float:
        """Standard deviation over the rows of rows @ combination (K,); the first column must be of ones.

        All but the first row of R are orthogonal to the ones, so the mean is out before anything is squared. What is no
        more than the rounding of its terms is 0.
        """
        found = float(np.linalg.norm((self.values @ combination)[1:]))
        noise = (
            EPSILON
            * max(self.rows, len(combination))
            * float(np.linalg.norm(np.abs(self.values) @ np.abs(combination)))
        )
        return found / math.sqrt(self.rows) if found > noise else 0.0


def fit_scaling(scaling: Scaling, options: ObjectiveOptions, data: Data, denoised: Sequence[range] = ()) -> None:
    """Set `scaling` as the objective's options ask; the identity where they ask for nothing.

    denoised: stretches of the dataset's indices whose energies are not learnt. Reads the training part once, a block at
    a time. Raises DataError if no structure has the label, or all of them the
    same value where it is to be divided by its spread.
    """
    if isinstance(options, LabelOptions) and (options.element_references or options.normalise):
        energies, per_atom = _compositions(data, options, denoised)
        references = energies.solve() if options.element_references else np.zeros(MAX_ATOMIC_NUMBER + 1)
        spread = per_atom.spread(np.concatenate([[0.0], -references, [1.0]])) if options.normalise else 1.0
        _check_spread(spread, "energy per atom")
        scaling.set(scale=spread, element_references=torch.from_numpy(references))
    elif isinstance(options, PropertyOptions) and options.normalise:
        targets = Triangle(2)
        for block in data.batches(data.split.train, BLOCK):
            value = _float64(block.target[block.target_mask])
            targets.add(np.stack([np.ones_like(value), value], axis=1))
        spread = targets.spread(np.array([0.0, 1.0]))
        _check_spread(spread, options.target)
        scaling.set(scale=spread, shift=float(targets.solve()[0]))


def training_elements(data: Data, ranks: Ranks) -> tuple[int, ...]:
    """Sorted atomic numbers of the training part. Collective: each rank looks at its share."""
    found = agree(ranks, lambda: data.dataset.elements_of(data.split.train, ranks))
    return tuple(sorted(set().union(*ranks.all_gather(found))))


def _compositions(data: Data, options: LabelOptions, denoised: Sequence[range]) -> tuple[Triangle, Triangle]:
    """Of the training structures that have an energy: [atoms of each element (119), energy], whose solution are the
    references; and [1, fraction of each element (119), energy per atom]."""
    energies, per_atom = Triangle(MAX_ATOMIC_NUMBER + 2), Triangle(MAX_ATOMIC_NUMBER + 3)
    for block in data.batches(data.split.train, BLOCK):
        learnt = block.energy_mask
        if isinstance(options, MixedOptions):
            learnt = learnt & ~to_denoise(block, options, denoised)
        composition = _composition(block)[learnt.cpu().numpy()]
        rows = np.concatenate([composition, _float64(block.energy[learnt])[:, None]], axis=1)
        energies.add(rows)
        per_atom.add(np.concatenate([np.ones((len(rows), 1)), rows / composition.sum(1, keepdims=True)], axis=1))
    if not energies.rows:
        raise DataError(
            "objective: element_references and normalise need energies, but no training structure has one.\n"
            "Set both to false."
        )
    return energies, per_atom


def _composition(block: Batch) -> Rows:
    """(B,119) atoms of each element."""
    elements = MAX_ATOMIC_NUMBER + 1
    flat = block.batch * elements + block.atomic_numbers
    return _float64(torch.bincount(flat, minlength=block.num_structures * elements)).reshape(-1, elements)


def _float64(values: Tensor) -> Rows:
    return values.cpu().double().numpy()


def _check_spread(spread: float, label: str) -> None:
    if not spread > 0:
        raise DataError(
            f"objective.normalise: the training values of {label} have a spread of {spread:g}, expected > 0.\n"
            "Set objective.normalise=false."
        )
