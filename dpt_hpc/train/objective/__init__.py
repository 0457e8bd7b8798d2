"""Objectives: what a network learns, as one scalar loss."""

from __future__ import annotations

from collections.abc import Sequence

from dpt_hpc.models import EnergyModel, ModelOptions, Scaling, build_model
from dpt_hpc.train.config import (
    DenoisingOptions,
    DerivativesOptions,
    HeadDenoisingOptions,
    MixedOptions,
    ObjectiveOptions,
    TransferOptions,
)
from dpt_hpc.train.objective.base import Objective, Sums
from dpt_hpc.train.objective.denoising import VALIDATION_EPOCH, Denoising, HeadDenoising, Mixed
from dpt_hpc.train.objective.labels import Derivatives, Property
from dpt_hpc.train.transfer import HEAD, freeze

__all__ = ["VALIDATION_EPOCH", "Objective", "Sums", "build_network", "build_objective"]


def build_network(model: ModelOptions, objective: ObjectiveOptions) -> Scaling:
    """A freshly initialised network, with the head that its objective trains.

    Denoising by a head does not reach the read-out of the energy: it stays as it was drawn, and does not decay.
    """
    denoises = isinstance(objective, HeadDenoisingOptions)
    network = build_model(model, noise_head=denoises)
    if denoises:
        freeze(network, TransferOptions(freeze=(HEAD,)))
    return network


def build_objective(
    model: EnergyModel, options: ObjectiveOptions, seed: int, denoised: Sequence[range] = ()
) -> Objective:
    """The objective that `options` describe, around `model`; `seed` seeds the noise of denoising.

    denoised: of kind mixed, the stretches of indices of its `denoise_datasets`.
    """
    if isinstance(options, DerivativesOptions):
        return Derivatives(model, options)
    if isinstance(options, DenoisingOptions):
        return Denoising(model, options, seed)
    if isinstance(options, HeadDenoisingOptions):
        return HeadDenoising(model, options, seed)
    if isinstance(options, MixedOptions):
        return Mixed(model, options, seed, denoised)
    return Property(model)
