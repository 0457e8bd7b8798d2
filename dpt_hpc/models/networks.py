"""Every network there is: the one place that a new one is added to."""

from __future__ import annotations

from typing import Any

from dpt_hpc.models.cgcnn import CGCNN
from dpt_hpc.models.energy_model import EnergyModel
from dpt_hpc.models.heads import noise_head as build_noise_head
from dpt_hpc.models.painn import PaiNN
from dpt_hpc.models.scaling import Scaling
from dpt_hpc.models.schnet import SchNet
from dpt_hpc.models.torchmd_et import TorchMDET
from dpt_hpc.network_options import (
    CGCNNOptions,
    ModelOptions,
    NetworkOptions,
    PaiNNOptions,
    SchNetOptions,
    TorchMDETOptions,
)

NETWORKS: tuple[tuple[type[NetworkOptions], type[EnergyModel]], ...] = (
    (CGCNNOptions, CGCNN),
    (TorchMDETOptions, TorchMDET),
    (SchNetOptions, SchNet),
    (PaiNNOptions, PaiNN),
)
"""The options of each network, and the network that is built from them."""


def model_options(content: dict[str, object]) -> ModelOptions:
    """The options that were written down as `content`. Raises TypeError for options that no network has, ValueError for
    values out of range."""
    kinds: dict[str, Any] = {options.name: options for options, _ in NETWORKS}
    name = content.get("name")
    if not isinstance(name, str) or name not in kinds:
        raise ValueError(f"name is {name!r}, expected {' or '.join(kinds)}")
    found: ModelOptions = kinds[name](**content)
    return found


def build_model(options: ModelOptions, *, noise_head: bool = False) -> Scaling:
    """A freshly initialised network for its options, wrapped with the identity scaling.

    noise_head: with a head that predicts the noise of every atom, drawn after the network, which is the same without.
    """
    kind: Any = next(network for kind, network in NETWORKS if isinstance(options, kind))
    network: EnergyModel = kind(options)
    return Scaling(network, build_noise_head(network) if noise_head else None)
