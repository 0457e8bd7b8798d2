"""What all objectives are: one scalar loss, exact for any division of a step over ranks and micro-batches.

A loss term is a mean over components of a whole step. Each micro-batch contributes its local sum divided by the
step's global count, so the sum over micro-batches and ranks is the loss, whatever their sizes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from copy import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dpt_hpc.models import EnergyModel
from dpt_hpc.structure import Batch

Sums = dict[str, Tensor]
"""Sums over a micro-batch in float64: "<label>_error" of absolute errors, "<label>_count" of components, and, for a
label that is learnt by another error, "<label>_<name of the error>"."""

Labels = dict[str, tuple[Tensor, Tensor, Tensor]]
"""Per label: predicted and true values (R,...), and which rows (R,) have the label."""


@dataclass(frozen=True)
class Error:
    """How far a component is off: a function of predicted minus true, and the name of its sums."""

    name: str
    of: Callable[[Tensor], Tensor]


ABSOLUTE = Error("error", torch.abs)
SQUARE = Error("squared_error", torch.square)
ERRORS = {"mae": ABSOLUTE, "mse": SQUARE}
"""By the names of their means in the options."""


@dataclass(frozen=True)
class Term:
    """A term of a loss: `weight` times the mean of `error` over all components of a label."""

    weight: float
    error: Error = ABSOLUTE


class Objective(nn.Module):
    """The module that the engine wraps: it holds the model, and its output is the scalar loss.

    labels: what it predicts and reports, by mean absolute errors. terms: of the loss, for the labels that it learns.
    """

    labels: tuple[str, ...]
    terms: Mapping[str, Term]

    def __init__(self, model: EnergyModel) -> None:
        super().__init__()
        self.model = model

    @property
    def sum_names(self) -> list[str]:
        """The keys of the sums that `forward` returns in eval mode."""
        reported = [f"{label}_{kind}" for label in self.labels for kind in (ABSOLUTE.name, "count")]
        return list(dict.fromkeys(reported + [f"{label}_{term.error.name}" for label, term in self.terms.items()]))

    def around(self, model: EnergyModel) -> Objective:
        """The same objective around another model."""
        other = copy(self)
        other._modules = {"model": model}
        return other

    def counts(self, batch: Batch) -> dict[str, int]:
        """Components of each label in `batch`: the denominators of the loss, before they are summed over ranks."""
        raise TypeError(f"{type(self).__name__} does not say what it counts")

    def predictions(self, batch: Batch, epoch: int) -> Labels:
        """Predicted and true values of the labels; in eval mode of all of them."""
        raise TypeError(f"{type(self).__name__} does not say what it predicts")

    def forward(self, batch: Batch, epoch: int, counts: Mapping[str, float]) -> tuple[Tensor, Sums]:
        """This micro-batch's share of the step's loss, and detached sums.

        counts: components of each label in the whole step, over all ranks and micro-batches.
        """
        loss = batch.positions.new_zeros(())
        sums: Sums = {}
        own = self.counts(batch)
        for label, (predicted, true, mask) in self.predictions(batch, epoch).items():
            difference = predicted - true
            rows = mask.reshape(-1, *[1] * (difference.dim() - 1))
            absolute = ABSOLUTE.of(difference) * rows
            sums[f"{label}_{ABSOLUTE.name}"] = absolute.detach().sum(dtype=torch.float64)
            sums[f"{label}_count"] = torch.tensor(float(own[label]), dtype=torch.float64)
            if label in self.terms:
                term = self.terms[label]
                errors = absolute if term.error is ABSOLUTE else term.error.of(difference) * rows
                sums[f"{label}_{term.error.name}"] = errors.detach().sum(dtype=torch.float64)
                loss = loss + term.weight * errors.sum() / max(counts[label], 1)
        if not loss.requires_grad and self.training:
            # A micro-batch without atoms or edges: every rank must still take part in the backward pass.
            loss = loss + sum(0.0 * p.sum() for p in self.model.parameters())
        return loss, sums

    def loss_of(self, sums: Mapping[str, float]) -> float:
        """The loss over everything that `sums` cover."""
        return sum(
            term.weight * sums[f"{label}_{term.error.name}"] / max(sums[f"{label}_count"], 1)
            for label, term in self.terms.items()
        )

    def metrics_of(self, sums: Mapping[str, float]) -> dict[str, float]:
        """The loss and the mean absolute error of every label that `sums` cover."""
        covered = [label for label in self.labels if sums.get(f"{label}_count")]
        errors = {f"{k}_mae": sums[f"{k}_{ABSOLUTE.name}"] / sums[f"{k}_count"] for k in covered}
        return {"loss": self.loss_of(sums), **errors}


def components(mask: Tensor, per_row: Tensor | int) -> int:
    """How many components the rows of `mask` have."""
    return int((mask * per_row).sum())
