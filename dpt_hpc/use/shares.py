"""Energies of atoms: how the energy of a structure divides among its atoms."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from dpt_hpc.errors import DataError
from dpt_hpc.models import NodeFeatures, Scaling

KNOTS = 16
"""Of the quadrature over the path; what is left of the sum by it is divided evenly."""


def check_shares(pooling: str | None) -> None:
    """Raise DataError for a network whose energy is no sum over atoms."""
    if pooling == "mean":
        raise DataError(
            "energies per atom: this network takes the mean over its atoms (model.pooling=mean), so that its energy is "
            "no sum over them, and an atom has none of its own.\nAsk for the energy, or train with model.pooling=add."
        )


def atomic_energies(
    model: Scaling, features: NodeFeatures, energy: Tensor, atomic_numbers: Tensor, atom_ptr: Tensor
) -> Tensor:
    """(N,) eV, float64: each atom's share of the energy. The shares of a structure add up to its energy.

    features: of `model`, for the energy · energy (B,) eV, what they give · atomic_numbers (N,) · atom_ptr (B+1,).

    Where the read-out is a sum over atoms, the share is the atom's term. Where it is not (the paper's networks add the
    features of all atoms, and then apply a nonlinear map), the share is that of Aumann and Shapley (1974): the integral
    over t from 0 to 1 of features_i dE(t features) / d features_i, as if all atoms grew together; it is the only
    division that adds up, is linear in E, and agrees with the sum where there is one. Element references belong to
    their atoms, constants are divided evenly.
    """
    counts = atom_ptr.diff()
    structure = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    whole = [values.detach() for values in (features.scalars, features.vectors) if values is not None]
    shares = whole[0].new_zeros(len(atomic_numbers))
    nodes, weights = np.polynomial.legendre.leggauss(KNOTS)
    for place, weight in zip((nodes + 1) / 2, weights / 2, strict=True):
        with torch.enable_grad():
            grown = [(float(place) * values).requires_grad_() for values in whole]
            raw = model.read_out(NodeFeatures(*grown), atom_ptr)
            slopes = torch.autograd.grad(raw.sum(), grown, allow_unused=True, materialize_grads=True)
        for slope, values in zip(slopes, whole, strict=True):
            shares += float(weight) * (slope * values).flatten(1).sum(1)
    shares = (model.scale * shares + model.element_references.to(shares).index_select(0, atomic_numbers)).double()
    # What is left: the constants, and the error of the quadrature.
    left = energy.double() - torch.zeros_like(energy, dtype=torch.float64).index_add(0, structure, shares)
    return shares + (left / counts.clamp(min=1)).index_select(0, structure)
