"""The training step that is measured, and the implementations of each network that take it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from crystals import labelled
from plain_models import PlainCGConv, PlainET
from torch.nn import functional

from dpt_hpc.models import CGCNN, NETWORKS, EnergyModel, TorchMDET, build_model, model_options, predict
from dpt_hpc.models.derivatives import build_graph
from dpt_hpc.structure import Batch, Structure

MODELS = ("cgcnn", "torchmd_et")
"""The paper's networks."""
OTHERS = tuple(options.name for options, _ in NETWORKS if options.name not in MODELS)
"""Networks that are measured on request, beside the plain twins of our ops, and of which no limit is known."""
IMPLEMENTATIONS = ("plain", "reference", "pyg", "exact", "table")
NATIVE = ("exact", "table")


def build(model: str, implementation: str) -> EnergyModel:
    """The network at the paper's sizes, in float32, with the same weights in every implementation.

    plain: every intermediate of an edge stored, as in the paper's code (CGCNN: the gate on the concatenation) ·
    reference, pyg: the plain twins of our ops · exact: the fused kernels, radial functions evaluated on every edge ·
    table: the fused kernels, filters interpolated on 512 intervals.
    """
    torch.manual_seed(0)
    options: Any = model_options(
        {
            "name": model,
            "filters": "table" if implementation == "table" else "exact",
            "backend": "native" if implementation in NATIVE else "pyg" if implementation == "pyg" else "reference",
        }
    )
    network = build_model(options).network
    if implementation == "plain" and isinstance(network, CGCNN):
        for convolution in network.convolutions:
            convolution.__class__ = PlainCGConv
    elif implementation == "plain" and isinstance(network, TorchMDET):
        network = PlainET(
            dict(network.state_dict()),
            heads=options.heads,
            cutoff=options.cutoff,
            max_neighbors=options.max_neighbors,
        )
    elif implementation == "plain":
        raise ValueError(f"{model} has no implementation 'plain', expected one of {', '.join(IMPLEMENTATIONS[1:])}")
    return network.train()


class TrainingStep:
    """Graph, forward, forces and stress, loss (1 : 500 : 500), its backward, clipping, AdamW."""

    def __init__(self, model: EnergyModel) -> None:
        self.model = model
        # A rate of zero: every step is the same.
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, fused=True)

    def __call__(self, batch: Batch, mark: Callable[[str], object] = lambda phase: None) -> float | torch.Tensor:
        """One step; mark is called after each phase. The loss, still on its device."""
        self.optimizer.zero_grad()
        prediction = predict(self.model, batch)
        assert prediction.forces is not None
        assert prediction.stress is not None
        mark("prediction")
        loss = functional.l1_loss(prediction.energy, batch.energy)
        loss = loss + 500 * functional.l1_loss(prediction.forces, batch.forces)
        loss = loss + 500 * functional.l1_loss(prediction.stress, batch.stress)
        loss.backward()
        mark("loss_backward")
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 10.0)
        self.optimizer.step()
        mark("optimizer")
        return loss.detach()


def batch_within(structures: list[Structure], model: EnergyModel, most_edges: int) -> Batch:
    """The first structures, at least one, whose graph has at most so many edges."""
    chosen: list[Structure] = []
    edges = 0
    for structure in structures:
        edges += build_graph(model, Batch.from_structures([structure])).num_edges
        if chosen and edges > most_edges:
            break
        chosen.append(labelled(structure))
    return Batch.from_structures(chosen)
