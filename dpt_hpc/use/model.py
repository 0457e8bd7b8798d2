"""A trained network in use: `load` it, then `Model.predict` and `Model.embed`."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch

from dpt_hpc.errors import ConfigError, DataError, EnvironmentFault
from dpt_hpc.models import Prediction, Scaling, predict, predict_noise
from dpt_hpc.models.derivatives import edge_vectors
from dpt_hpc.ops import NATIVE_DEVICES, RadiusGraph
from dpt_hpc.structure import SYMBOLS, Batch, Structure
from dpt_hpc.train.card import ModelCard
from dpt_hpc.train.checkpoint import find_checkpoint, load_card, load_model
from dpt_hpc.use.batching import EDGE_BUDGET, Batching, Compute, OnFault, Pair, Result
from dpt_hpc.use.doubts import doubts
from dpt_hpc.use.files import read_structures
from dpt_hpc.use.predicted import Embedding, Predicted
from dpt_hpc.use.shares import atomic_energies, check_shares
from dpt_hpc.use.structures import as_structure, has_stress

Many = str | Path | list[Any] | tuple[Any, ...]
"""A path, or several structures: what is answered by a list."""

DTYPES = {"float32": torch.float32, "float64": torch.float64}


def load(
    path: str | Path,
    *,
    device: str = "auto",
    dtype: str | None = None,
    allow_unknown_elements: bool = False,
    edge_budget: int = EDGE_BUDGET,
) -> Model:
    """The network of a run (its best weights), of a checkpoint, of an exported directory or file, or of a name that
    `dpt-hpc models` lists.

    device: auto (a GPU if there is one that the kernels are built for), cpu, cuda, cuda:1. dtype: float32 or float64 to
    compute in; None for that of the weights. allow_unknown_elements: predict, with a warning, for elements that the
    network was not trained on. edge_budget: directed edges of a batch; a structure with more goes alone.

    No file is unpickled. Raises DataError if there is no model at `path` or it is damaged, ConfigError for another
    dtype, EnvironmentFault for a device that is not there.
    """
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"load: dtype is {dtype!r}, expected {' or '.join(DTYPES)}.")
    if edge_budget < 1:
        raise ConfigError(f"load: edge_budget is {edge_budget}, expected 1 or more.")
    chosen = _device(device)
    network = load_model(path, None if dtype is None else DTYPES[dtype])
    assert isinstance(network, Scaling)
    model = Model(network.to(chosen), load_card(path), find_checkpoint(path))
    model.allow_unknown_elements, model.edge_budget = allow_unknown_elements, edge_budget
    return model


class Model:
    """A trained network: what `load` returns.

    network: the torch module · card: what it learnt, from what, how well · path: where it was loaded from.
    """

    def __init__(self, network: Scaling, card: ModelCard, path: Path) -> None:
        self.network = network.eval()
        self.card = card
        self.path = path
        self.allow_unknown_elements = False
        self.edge_budget = EDGE_BUDGET
        kind = card.objective.get("kind", "derivatives")
        self.gives = kind if kind == "property" else "noise" if kind.endswith("denoising") else "energy"
        """What it predicts: energy (and its derivatives), noise, or property."""

    def __repr__(self) -> str:
        options = self.card.options
        given = ", ".join(self.units)
        return f"<dpt_hpc.Model {options.name} {self.path}: {given}; {len(self.card.elements)} elements>"

    @property
    def device(self) -> torch.device:
        return self.network.scale.device

    @property
    def dtype(self) -> torch.dtype:
        return self.network.scale.dtype

    @property
    def units(self) -> dict[str, str]:
        """Name, unit and sign of every number that it gives."""
        return self.card.units

    @property
    def cutoff(self) -> float:
        """Å"""
        return self.network.cutoff

    @overload
    def predict(
        self, what: Many, *, forces: bool = True, stress: bool = True, energies: bool = False
    ) -> list[Predicted]: ...

    @overload
    def predict(self, what: Any, *, forces: bool = True, stress: bool = True, energies: bool = False) -> Predicted: ...

    def predict(
        self, what: Any, *, forces: bool = True, stress: bool = True, energies: bool = False
    ) -> Predicted | list[Predicted]:
        """Energies, forces, stress and energies per atom, or whatever else the network learnt.

        what: Atoms of ASE, a Structure of pymatgen or dpt_hpc: one `Predicted`. A list of them, or the path of a file,
        directory or dataset: a list (`stream` holds no list). forces, stress: without them it takes two fifths of the
        time. energies: of the atoms, too.

        Doubtful input is warned of: atoms nearly on top of each other, atoms without neighbours, a stress over vacuum,
        elements that are allowed but unknown. Raises DataError for input that cannot be answered: no structure,
        elements that the network was not trained on, two atoms in one place, energies of atoms of a network that has
        none.
        """
        if _is_one(what):
            (found,) = self.stream([as_structure(what)], forces=forces, stress=stress, energies=energies)
            return _warned(found[1])
        pairs = self.stream(_structures(what), forces=forces, stress=stress, energies=energies)
        return [_warned(predicted) for _, predicted in pairs]

    def stream(
        self,
        structures: Iterable[Structure],
        *,
        forces: bool = True,
        stress: bool = True,
        energies: bool = False,
        on_fault: OnFault = None,
    ) -> Iterator[Pair[Predicted]]:
        """Each structure with what is predicted for it, in order; holds one batch at a time.

        on_fault: told of each structure that cannot be answered, which is left out; None to raise as `predict` does.
        """
        self.check_request(energies=energies)

        def compute(part: list[Structure], graph: RadiusGraph, batch: Batch) -> list[Predicted]:
            return self._predict(part, graph, batch, forces=forces, stress=stress, energies=energies)

        return self._batched(structures, compute, on_fault)

    @overload
    def embed(self, what: Many) -> list[Embedding]: ...

    @overload
    def embed(self, what: Any) -> Embedding: ...

    def embed(self, what: Any) -> Embedding | list[Embedding]:
        """The features of the atoms before the read-out, for `what` as in `predict`."""
        if _is_one(what):
            (found,) = self.stream_embeddings([as_structure(what)])
            return found[1]
        return [embedding for _, embedding in self.stream_embeddings(_structures(what))]

    def stream_embeddings(
        self, structures: Iterable[Structure], *, on_fault: OnFault = None
    ) -> Iterator[Pair[Embedding]]:
        """Each structure with its embedding, in order; holds one batch at a time. on_fault: as for `stream`."""
        return self._batched(structures, self._embed, on_fault)

    def check_request(self, *, energies: bool) -> None:
        """Raise DataError if energies of atoms are asked of a network that has none."""
        if energies and self.gives != "energy":
            raise DataError(f"energies per atom: {self.path} gives {', '.join(self.units)}, no energy.")
        if energies:
            check_shares(self.card.options.pooling)

    def _batched(
        self, structures: Iterable[Structure], compute: Compute[Result], on_fault: OnFault
    ) -> Iterator[Pair[Result]]:
        return Batching(self.network, self.edge_budget, compute, on_fault).run(structures, self._check_elements)

    def _predict(
        self, part: list[Structure], graph: RadiusGraph, batch: Batch, *, forces: bool, stress: bool, energies: bool
    ) -> list[Predicted]:
        model, learnt = self.network, self.card.objective
        derived: dict[str, torch.Tensor | None] = {}
        if learnt.get("kind") == "head_denoising":
            p = Prediction(batch.positions.new_zeros(len(part)))
            derived["noise"] = learnt["noise_scale"] * predict_noise(model, batch, graph=graph)
        elif self.gives == "noise":
            p = predict(model, batch, forces=True, stress=False, graph=graph)
            derived["noise"] = p.forces if learnt.get("sign") == "paper" or p.forces is None else -p.forces
        else:
            derives = self.gives == "energy"
            p = predict(model, batch, forces=derives and forces, stress=derives and stress, graph=graph)
            derived = {"forces": p.forces, "stress": p.stress}
        if energies:
            vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
            features = model.features_for_energy(batch.atomic_numbers, vectors, graph)
            derived["energies"] = atomic_energies(model, features, p.energy, batch.atomic_numbers, batch.atom_ptr)
        doubtful = doubts(part, graph, batch, self.cutoff, self.card.elements, stress=derived.get("stress") is not None)
        values = p.energy.double().tolist()
        arrays = {name: v.detach().cpu().numpy() for name, v in derived.items() if v is not None}
        ptr = batch.atom_ptr.tolist()
        found = []
        for k, structure in enumerate(part):
            own: dict[str, Any] = {n: rows[ptr[k] : ptr[k + 1]] for n, rows in arrays.items() if n != "stress"}
            if "stress" in arrays and has_stress(structure):
                own["stress"] = arrays["stress"][k]
            if self.gives == "energy":
                own["energy"] = values[k]
            elif self.gives == "property":
                own["properties"] = {learnt["target"]: values[k]}
            found.append(Predicted(structure.structure_id, structure.num_atoms, **own, warnings=doubtful[k]))
        _check_finite(found)
        return found

    def _embed(self, part: list[Structure], graph: RadiusGraph, batch: Batch) -> list[Embedding]:
        vectors = edge_vectors(batch.positions, batch.cell, graph, batch.batch)
        scalars = self.network.features_for_energy(batch.atomic_numbers, vectors, graph).scalars
        rows = scalars.detach().cpu().numpy()
        ptr = batch.atom_ptr.tolist()
        return [Embedding(s.structure_id, rows[ptr[k] : ptr[k + 1]]) for k, s in enumerate(part)]

    def _check_elements(self, structure: Structure) -> None:
        name = structure.structure_id or "structure"
        present = sorted(set(structure.atomic_numbers.tolist()))
        most = self.card.options.num_elements
        if beyond := [SYMBOLS[z] for z in present if z > most]:
            raise DataError(
                f"{name}: contains {', '.join(beyond)}, beyond the {most} elements that this network can tell apart.\n"
                "Leave it out, or train a network with a larger model.num_elements."
            )
        unknown = [SYMBOLS[z] for z in present if z not in self.card.elements]
        if unknown and not self.allow_unknown_elements:
            raise DataError(
                f"{name}: contains {', '.join(unknown)}, unknown to {self.path}.\n"
                "Its predictions for them would be those of random weights.\n"
                "To see them anyway: --allow-unknown-elements, or allow_unknown_elements=True."
            )


def _check_finite(found: Sequence[Predicted]) -> None:
    for place, predicted in enumerate(found):
        numbers = [
            predicted.energy,
            predicted.forces,
            predicted.stress,
            predicted.noise,
            *predicted.properties.values(),
        ]
        if any(v is not None and not np.isfinite(v).all() for v in numbers):
            raise DataError(
                "the network's answer is not a finite number.\n"
                "Such a structure is far from all that it has seen: look at its distances and its volume.",
                place,
            )


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if "cuda" in NATIVE_DEVICES and torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ConfigError(f"device is {name!r}, expected auto, cpu, cuda, or cuda:0, cuda:1, ...") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise EnvironmentFault(f"device is {name}, but torch finds no GPU here.\nUse device cpu, or auto.")
    return device


def _is_one(what: Any) -> bool:
    """Whether `what` is one structure: pymatgen's and ASE's are themselves sequences, of their atoms."""
    if isinstance(what, (str, Path)):
        return False
    return any(hasattr(what, key) for key in ("positions", "cart_coords")) or not isinstance(what, Iterable)


def _structures(what: Any) -> Iterator[Structure]:
    if isinstance(what, (str, Path)):
        yield from read_structures([what])
        return
    for place, item in enumerate(what):
        if isinstance(item, (str, Path)):
            yield from read_structures([item])
        else:
            yield as_structure(item, f"structure {place}")


def _warned(predicted: Predicted) -> Predicted:
    for text in predicted.warnings:
        warnings.warn(f"{predicted.structure_id or 'structure'}: {text}", stacklevel=3)
    return predicted
