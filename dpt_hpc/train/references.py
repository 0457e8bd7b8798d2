"""What the output scaling is set to: element references and spreads, fitted on the training split alone."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from dpt_hpc.data.group import agree
from dpt_hpc.errors import DataError
from dpt_hpc.models import Scaling
from dpt_hpc.structure import MAX_ATOMIC_NUMBER, Batch
from dpt_hpc.train.config import DenoisingOptions, DerivativesOptions, PropertyOptions
from dpt_hpc.train.data import Data
from dpt_hpc.train.ranks import Ranks

BLOCK = 512
"""Structures read at a time."""


def fit_scaling(scaling: Scaling, options: DerivativesOptions | DenoisingOptions | PropertyOptions, data: Data) -> None:
    """Set `scaling` as the objective's options ask; the identity where they ask for nothing."""
    if isinstance(options, DerivativesOptions) and (options.element_references or options.normalise):
        composition, energy = _compositions(data)
        references = element_references(composition, energy) if options.element_references else None
        residual = energy - composition @ references if references is not None else energy
        spread = float(np.std(residual / composition.sum(1))) if options.normalise else 1.0
        _check_spread(spread, "energy per atom")
        scaling.set(scale=spread, element_references=None if references is None else torch.from_numpy(references))
    elif isinstance(options, PropertyOptions) and options.normalise:
        target = torch.cat([b.target[b.target_mask] for b in _blocks(data)]).double()
        spread = float(target.std(correction=0))
        _check_spread(spread, options.target)
        scaling.set(scale=spread, shift=float(target.mean()))


def element_references(composition: np.ndarray, energy: np.ndarray) -> np.ndarray:
    """Energies per atom by atomic number (119,), the least-squares solution of composition @ x = energy.

    composition (S,119): atoms of each element. Where the equations leave x open (elements that only occur together),
    the solution of least norm is taken; elements that never occur get 0.
    """
    solution: np.ndarray = np.linalg.lstsq(composition, energy, rcond=None)[0]
    return solution


def training_elements(data: Data, ranks: Ranks) -> tuple[int, ...]:
    """Sorted atomic numbers of the training part. Collective: each rank looks at its share."""

    def look() -> set[int]:
        found: set[int] = set()
        for block in data.batches(np.array_split(data.split.train, ranks.size)[ranks.rank], BLOCK):
            found.update(block.atomic_numbers.unique().tolist())
        return found

    return tuple(sorted(set().union(*ranks.all_gather(agree(ranks, look)))))


def _blocks(data: Data) -> Iterator[Batch]:
    return data.batches(data.split.train, BLOCK)


def _compositions(data: Data) -> tuple[np.ndarray, np.ndarray]:
    rows, energies = [], []
    for block in _blocks(data):
        flat = block.batch * (MAX_ATOMIC_NUMBER + 1) + block.atomic_numbers
        count: Tensor = torch.bincount(flat, minlength=block.num_structures * (MAX_ATOMIC_NUMBER + 1))
        rows.append(count.reshape(block.num_structures, -1)[block.energy_mask].cpu().double().numpy())
        energies.append(block.energy[block.energy_mask].cpu().double().numpy())
    if not sum(map(len, energies)):
        raise DataError(
            "objective: element_references and normalise need energies, but no training structure has one.\n"
            "Set both to false."
        )
    return np.concatenate(rows), np.concatenate(energies)


def _check_spread(spread: float, label: str) -> None:
    if not spread > 0:
        raise DataError(
            f"objective.normalise: the training values of {label} have a spread of {spread:g}, expected > 0.\n"
            "Set objective.normalise=false."
        )
