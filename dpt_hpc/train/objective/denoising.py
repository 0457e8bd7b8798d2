"""Denoising: structures at equilibrium are displaced at random, and the displacement is what is learnt.

The noise is drawn anew in every epoch, for each structure from its own stream, so that it depends on neither ranks nor
batches. That of structures of one atom counts in no mean: it cannot be learnt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from dpt_hpc.models import EnergyModel, Scaling, predict, predict_noise
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import DenoisingOptions, HeadDenoisingOptions, MixedOptions
from dpt_hpc.train.objective.base import ERRORS, SQUARE, Labels, Objective, Term, components
from dpt_hpc.train.objective.labels import Derivatives, energy_forces_stress

VALIDATION_EPOCH = 0
"""Training epochs count from 1, so that noise drawn at epoch 0 is the same in every validation."""


def draw_noise(batch: Batch, scale: float, seed: int, epoch: int) -> Tensor:
    """(N,3) Å, normal with standard deviation `scale`: of each structure of `batch` in the `epoch` of a run."""
    draws = [
        np.random.Generator(np.random.Philox(key=[seed, epoch], counter=[0, 0, 0, index])).normal(
            scale=scale, size=(atoms, 3)
        )
        for index, atoms in zip(batch.structure_index.tolist(), batch.atoms_per_structure.tolist(), strict=True)
    ]
    values = np.concatenate(draws) if draws else np.zeros((0, 3))
    return torch.from_numpy(values).to(batch.positions)


def has_noise_to_learn(batch: Batch) -> Tensor:
    """(B,) bool: the structures of more than one atom. One atom and its images move together: no distance changes."""
    return batch.atoms_per_structure > 1


class Denoising(Objective):
    """Derivative-based denoising (paper, eq. 5): -dE/dpositions, in eV/Å, is the noise in Å."""

    labels = ("noise",)

    def __init__(self, model: EnergyModel, options: DenoisingOptions, seed: int) -> None:
        super().__init__(model)
        self.terms = {"noise": Term(1.0, ERRORS[options.loss])}
        self.options = options
        self.seed = seed

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"noise": components(has_noise_to_learn(batch), 3 * batch.atoms_per_structure)}

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        noise = self.noise(batch, epoch if self.training else VALIDATION_EPOCH)
        p = predict(self.model, replace(batch, positions=batch.positions + noise), forces=True, stress=False)
        assert p.forces is not None
        target = noise if self.options.sign == "paper" else -noise
        return {"noise": (p.forces, target, has_noise_to_learn(batch).index_select(0, batch.batch))}

    def noise(self, batch: Batch, epoch: int) -> Tensor:
        """(N,3) Å."""
        return draw_noise(batch, self.options.noise_scale, self.seed, epoch)


class HeadDenoising(Objective):
    """Denoising by a head (Zaidi et al. 2022): its output is noise / noise_scale, of unit variance.

    Predictions and the reported error are in Å; the loss is that of noise / noise_scale.
    """

    labels = ("noise",)

    def __init__(self, model: EnergyModel, options: HeadDenoisingOptions, seed: int) -> None:
        super().__init__(model)
        error = ERRORS[options.loss]
        unit = 1 / options.noise_scale
        self.terms = {"noise": Term(unit**2 if error is SQUARE else unit, error)}
        self.options = options
        self.seed = seed

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"noise": components(has_noise_to_learn(batch), 3 * batch.atoms_per_structure)}

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        assert isinstance(self.model, Scaling)
        scale = self.options.noise_scale
        noise = draw_noise(batch, scale, self.seed, epoch if self.training else VALIDATION_EPOCH)
        predicted = scale * predict_noise(self.model, replace(batch, positions=batch.positions + noise))
        return {"noise": (predicted, noise, has_noise_to_learn(batch).index_select(0, batch.batch))}


class Mixed(Derivatives):
    """Derivatives where there are labels, derivative denoising where there are none, in one forward pass.

    Forces of the denoised structures are restoring ones, -stiffness * noise; their error is reported as that of the
    noise, in Å, and weighs in the loss as one of forces. denoised: stretches of the dataset's indices that are denoised
    whatever labels they have.
    """

    labels = (*Derivatives.labels, "noise")

    def __init__(self, model: EnergyModel, options: MixedOptions, seed: int, denoised: Sequence[range]) -> None:
        super().__init__(model, options)
        error = ERRORS[options.loss]
        unit = options.stiffness
        weight = options.denoising_weight * (unit**2 if error is SQUARE else unit)
        self.terms = {**self.terms, "noise": Term(weight, error)}
        self.options = options
        self.seed = seed
        self.denoised_ranges = tuple(denoised)

    def denoised(self, batch: Batch) -> Tensor:
        """(B,) bool: the structures to which noise is added."""
        return to_denoise(batch, self.options, self.denoised_ranges)

    def counts(self, batch: Batch) -> dict[str, int]:
        denoised = self.denoised(batch)
        noise = components(denoised & has_noise_to_learn(batch), 3 * batch.atoms_per_structure)
        return {**super().counts(_without_labels(batch, denoised)), "noise": noise}

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        denoised = self.denoised(batch)
        atoms = denoised.index_select(0, batch.batch)
        epoch = epoch if self.training else VALIDATION_EPOCH
        noise = draw_noise(batch, self.options.noise_scale, self.seed, epoch) * atoms[:, None]
        batch = replace(_without_labels(batch, denoised), positions=batch.positions + noise)
        p = self.predict(batch, forces=True)
        assert p.forces is not None
        learnt = (denoised & has_noise_to_learn(batch)).index_select(0, batch.batch)
        return {**energy_forces_stress(p, batch), "noise": (p.forces / -self.options.stiffness, noise, learnt)}


def to_denoise(batch: Batch, options: MixedOptions, ranges: Sequence[range]) -> Tensor:
    """(B,) bool: the structures that `options` denoise. ranges: stretches of the dataset's indices, all denoised."""
    found = ~(batch.energy_mask | batch.forces_mask | batch.stress_mask) | within(batch.structure_index, ranges)
    return found if options.denoise_max_force is None else found | at_rest(batch, options.denoise_max_force)


def at_rest(batch: Batch, max_force: float) -> Tensor:
    """(B,) bool: the structures with forces, none of which is longer than `max_force`, eV/Å.

    A structure of one atom is not: symmetry keeps its force zero, and it has no noise to learn.
    """
    largest = batch.forces.new_zeros(batch.num_structures)
    largest = largest.scatter_reduce(0, batch.batch, torch.linalg.vector_norm(batch.forces, dim=1), "amax")
    return batch.forces_mask & has_noise_to_learn(batch) & (largest <= max_force)


def within(index: Tensor, ranges: Sequence[range]) -> Tensor:
    """Which of the indices lie in one of the ranges: (B,) -> (B,) bool."""
    found = torch.zeros_like(index, dtype=torch.bool)
    for stretch in ranges:
        found |= (index >= stretch.start) & (index < stretch.stop)
    return found


def _without_labels(batch: Batch, structures: Tensor) -> Batch:
    """`batch` with no label of the structures (B,) bool."""
    return replace(
        batch,
        energy_mask=batch.energy_mask & ~structures,
        forces_mask=batch.forces_mask & ~structures,
        stress_mask=batch.stress_mask & ~structures,
    )
