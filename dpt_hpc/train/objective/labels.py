"""What is learnt from labels: energy and its derivatives, or a property of a structure."""

from __future__ import annotations

from dpt_hpc.models import EnergyModel, Prediction, predict
from dpt_hpc.structure import Batch
from dpt_hpc.train.config import LabelOptions
from dpt_hpc.train.objective.base import Labels, Objective, Term, components


class Derivatives(Objective):
    """wE L1(energy) + wF L1(forces) + wS L1(stress), as the paper's eq. 7 with the means of method.md, "Losses"."""

    labels: tuple[str, ...] = ("energy", "energy_per_atom", "forces", "stress")

    def __init__(self, model: EnergyModel, options: LabelOptions) -> None:
        super().__init__(model)
        weights = {
            "energy": options.energy_weight,
            "forces": options.forces_weight,
            "stress": options.stress_weight,
        }
        self.terms = {label: Term(weight) for label, weight in weights.items() if weight > 0}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {
            "energy": components(batch.energy_mask, 1),
            "energy_per_atom": components(batch.energy_mask, 1),
            "forces": components(batch.forces_mask, 3 * batch.atoms_per_structure),
            "stress": components(batch.stress_mask, 9),
        }

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        return energy_forces_stress(self.predict(batch, forces="forces" in self.terms), batch)

    def predict(self, batch: Batch, *, forces: bool) -> Prediction:
        """Validation reports every label; training pays only for what it learns, and for `forces` if they are asked.

        Stress is asked of the structures that have it: others may have no volume.
        """
        all_labels = not self.training
        stress = (all_labels or "stress" in self.terms) and bool(batch.stress_mask.any())
        return predict(
            self.model,
            batch,
            forces=all_labels or forces,
            stress=batch.stress_mask if stress else False,
        )


def energy_forces_stress(p: Prediction, batch: Batch) -> Labels:
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


class Property(Objective):
    """L1 of one number per structure."""

    labels = ("target",)

    def __init__(self, model: EnergyModel) -> None:
        super().__init__(model)
        self.terms = {"target": Term(1.0)}

    def counts(self, batch: Batch) -> dict[str, int]:
        return {"target": components(batch.target_mask, 1)}

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        p = predict(self.model, batch, forces=False, stress=False)
        return {"target": (p.energy, batch.target, batch.target_mask)}
