"""Objectives: one scalar loss, exact for any division of a step over ranks and micro-batches.

A loss term is a mean over components of a whole step. Each micro-batch contributes its local sum divided by the
step's global count, so the sum over micro-batches and ranks is the loss, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import copy
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from dpt_hpc.models import EnergyModel, Prediction, predict
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import DenoisingOptions, DerivativesOptions, PropertyOptions

Sums = dict[str, Tensor]
"""Sums over a micro-batch in float64: "<label>_error" of absolute errors, "<label>_count" of components."""

ObjectiveOptions = DerivativesOptions | DenoisingOptions | PropertyOptions

VALIDATION_EPOCH = 0
"""Training epochs count from 1, so that noise drawn at epoch 0 is the same in every validation."""


class Objective(nn.Module):
    """The module that the engine wraps: it holds the model, and its output is the scalar loss.

    labels: what it predicts and reports. weights: of the loss's terms, for those labels that it learns.
    """

    labels: tuple[str, ...]
    weights: Mapping[str, float]

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model

    @property
    def sum_names(self) -> list[str]:
        """The keys of the sums that `forward` returns in eval mode."""
        return [f"{label}_{kind}" for label in self.labels for kind in ("error", "count")]

    def around(self, model: EnergyModel) -> Objective:
        """The same objective around another model."""
        other = copy(self)
        other._modules = {"model": model}
        return other

    def counts(self, batch: Batch) -> dict[str, int]:
        """Components of each label in `batch`: the denominators of the loss, before they are summed over ranks."""
        raise TypeError(f"{type(self).__name__} does not say what it counts")

    def predictions(self, batch: Batch, epoch: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Per label: predicted and true values, and which rows have the label."""
        raise TypeError(f"{type(self).__name__} does not say what it predicts")

    def forward(self, batch: Batch, epoch: int, counts: Mapping[str, float]) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the step's loss, and detached sums.

        counts: components of each label in the whole step, over all ranks and micro-batches.
        """
        loss = batch.positions.new_zeros(())
        sums: Sums = {}
        own = self.counts(batch)
        for label, (predicted, true, mask) in self.predictions(batch, epoch).items():
            errors = _absolute_errors(predicted, true, mask)
            sums[f"{label}_error"] = errors.detach().sum(dtype=torch.float64)
            sums[f"{label}_count"] = torch.tensor(float(own[label]), dtype=torch.float64)
            if label in self.weights:
                loss = loss + self.weights[label] * errors.sum() / max(counts[label], 1)
        if not loss.requires_grad and self.training:
            # A micro-batch without atoms or edges: every rank must still take part in the backward pass.
            loss = loss + sum(0.0 * p.sum() for p in self.model.parameters())
        return loss, sums

    def loss_of(self, sums: Mapping[str, float]) -> float:
        """The loss over everything that `sums` cover."""
        return sum(w * sums[f"{k}_error"] / max(sums[f"{k}_count"], 1) for k, w in self.weights.items())

    def metrics_of(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss and the mean absolute error of every label that `sums` cover."""
        labels = [key.removesuffix("_error") for key in sums if key.endswith("_error")]
        errors = {f"{k}_mae": sums[f"{k}_error"] / sums[f"{k}_count"] for k in labels if sums[f"{k}_count"]}
        return {"loss": self.loss_of(sums), **errors}


def _absolute_errors(predicted: Tensor, true: Tensor, mask: Tensor) -> Tensor:
    errors = (predicted - true).abs()
    return errors * mask.reshape(-1, *[1] * (errors.dim() - 1))


def _components(mask: Tensor, per_row: Tensor | int) -> int:
    return int((mask * per_row).sum())


class Derivatives(Objective):
    """wE L1(energy) + wF L1(forces) + wS L1(stress), as the paper's eq. 7 with the means of method.md, "Losses"."""

    labels = ("energy", "energy_per_atom", "forces", "stress")

    def __init__(self, model: EnergyModel, options: DerivativesOptions) -> None:
        super().__init__(model)
        weights = {
            "energy": options.energy_weight,
            "forces": options.forces_weight,
            "stress": options.stress_weight,
        }
        self.weights = {label: weight for label, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            "energy": _components(batch.energy_mask, 1),
            "energy_per_atom": _components(batch.energy_mask, 1),
            "forces": _components(batch.forces_mask, 3 * batch.atoms_per_structure),
            "stress": _components(batch.stress_mask, 9),
        }

    def predictions(self, batch: Batch, epoch: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        # Validation reports every label; training pays only for what it learns.
        all_labels = not self.training
        p = predict(
            self.model,
            batch,
            forces=all_labels or "forces" in self.weights,
            stress=(all_labels or "stress" in self.weights) and bool(batch.stress_mask.any()),
        )
        return energy_forces_stress(p, batch)


def energy_forces_stress(p: Prediction, batch: Batch) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Predicted, true, mask of each label that was computed, energy per atom beside the energy."""
    atoms = batch.atoms_per_structure.clamp(min=1)
    found = {
        "energy": (p.energy, batch.energy, batch.energy_mask),
        "energy_per_atom": (p.energy / atoms, batch.energy / atoms, batch.energy_mask),
    }
    if p.forces is not None:
        found["forces"] = (p.forces, batch.forces, batch.forces_mask.index_select(0, batch.batch))
    if p.stress is not None:
        found["stress"] = (p.stress, batch.stress, batch.stress_mask)
    return found


class Denoising(Objective):
    """Derivative-based denoising (paper, eq. 5): the noise is drawn anew in every epoch, for each structure from its
    own stream, so that it depends on neither ranks nor batches."""

    labels = ("noise",)

    def __init__(self, model: EnergyModel, options: DenoisingOptions, seed: int) -> None:
        super().__init__(model)
        self.weights = {"noise": 1.0}
        self.options = options
        self.seed = seed

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"noise": 3 * batch.num_atoms}

    def predictions(self, batch: Batch, epoch: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        noise = self.noise(batch, epoch if self.training else VALIDATION_EPOCH)
        noised = replace(batch, positions=batch.positions + noise)
        p = predict(self.model, noised, forces=True, stress=False)
        assert p.forces is not None
        target = noise if self.options.sign == "paper" else -noise
        return {"noise": (p.forces, target, torch.ones(batch.num_atoms, dtype=torch.bool, device=noise.device))}

    def noise(self, batch: Batch, epoch: int) -> Tensor:
        """(N,3) Å."""
        draws = [
            np.random.Generator(np.random.Philox(key=[self.seed, epoch], counter=[0, 0, 0, index])).normal(
                scale=self.options.noise_scale, size=(atoms, 3)
            )
            for index, atoms in zip(batch.structure_index.tolist(), batch.atoms_per_structure.tolist(), strict=True)
        ]
        values = np.concatenate(draws) if draws else np.zeros((0, 3))
        return torch.from_numpy(values).to(batch.positions)


class Property(Objective):
    """L1 of one number per structure."""

    labels = ("target",)

    def __init__(self, model: EnergyModel, options: PropertyOptions) -> None:
        super().__init__(model)
        self.weights = {"target": 1.0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"target": _components(batch.target_mask, 1)}

    def predictions(self, batch: Batch, epoch: int) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        p = predict(self.model, batch, forces=False, stress=False)
        return {"target": (p.energy, batch.target, batch.target_mask)}


def build_objective(model: EnergyModel, options: ObjectiveOptions, seed: int) -> Objective:
    """The objective that `options` describe, around `model`; `seed` seeds the noise of denoising."""
    if isinstance(options, DerivativesOptions):
        return Derivatives(model, options)
    if isinstance(options, DenoisingOptions):
        return Denoising(model, options, seed)
    return Property(model, options)
