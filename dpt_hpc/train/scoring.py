"""Errors and predictions of a network over some structures, all ranks taking their share."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dpt_hpc.data.group import agree
from dpt_hpc.data.progress import Progress
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.tables import Indices
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.structure import Batch
from dpt_hpc.train import signals
from dpt_hpc.train.data import PIECE, Data
from dpt_hpc.train.engine import Engine
from dpt_hpc.train.growing import GrowingArrays
from dpt_hpc.train.objective import VALIDATION_EPOCH, Objective
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.signals import Interrupted

Result = TypeVar("Result")
GATHERED = 8192
"""Structures whose predictions rank 0 may hold at a time."""
PLACE = "_structure"
"""Ends the names of arrays that hold the places of structures."""


def zeros(objective: Objective) -> Counter[str]:
    """Sums to add to: every key on every rank, also on one that has no structure with some label."""
    return Counter(dict.fromkeys(objective.sum_names, 0.0))


@dataclass(frozen=True)
class EdgeLimit:
    """What a batch may hold. edges (S,): of the whole dataset's structures · budget: None for any number."""

    edges: NDArray[np.int64]
    budget: int | None


@dataclass(frozen=True)
class Scoring:
    """What is the same in all evaluations of a network. batch_size, limit: how much it is given at a time.
    progress: told of every batch."""

    objective: Objective
    engine: Engine
    data: Data
    batch_size: int
    limit: EdgeLimit | None = None
    progress: Progress | None = None

    def batches(self, parts: Iterable[Indices]) -> Iterator[Batch]:
        """Those of `parts`, each cut to what a batch may hold."""
        for batch in self.data.parts(piece for part in parts for piece in cut(part, self.batch_size, self.limit)):
            yield batch
            if self.progress is not None:
                self.progress.reach(self.progress.count + batch.num_structures)

    def computed(self, batch: Batch, compute: Callable[[Batch], Result]) -> Iterator[tuple[Batch, Result]]:
        """`batch` and what `compute` makes of it; of its halves, in their order, where the GPU has no memory for it.

        Raises EnvironmentFault if a structure alone is too large.
        """
        result = self._tried(batch, compute)
        if result is not None:
            yield batch, result
            return
        torch.cuda.empty_cache()
        _warn_once(
            f"rank {self.engine.rank}: out of memory on {self.engine.device} in an evaluation; repeated in halves. Set "
            "training.evaluation_batch_size lower, or training.edge_budget, and it goes faster."
        )
        for half in np.array_split(batch.structure_index.cpu().numpy(), 2):
            yield from self.computed(self.data.store.read(half).to(self.engine.device), compute)

    def _tried(self, batch: Batch, compute: Callable[[Batch], Result]) -> Result | None:
        """None: out of memory, and here nothing of the attempt is held any more."""
        try:
            with torch.no_grad(), self.data.naming(batch):
                return compute(batch)
        except torch.OutOfMemoryError:
            if batch.num_structures > 1:
                return None
        name = self.data.dataset.ids(batch.structure_index.cpu().numpy())[0]
        raise EnvironmentFault(
            f"rank {self.engine.rank}: out of memory on {self.engine.device} in an evaluation, with one structure of "
            f"{batch.num_atoms} atoms: {name}.\nUse a smaller network, or a larger GPU."
        )


@cache
def _warn_once(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr)


def cut(indices: Indices, size: int, limit: EdgeLimit | None) -> Iterator[Indices]:
    """The structures `indices` in their order, at most `size` at a time, and no more than `limit` allows.

    A structure above the limit goes alone.
    """
    for start in range(0, len(indices), size):
        part = indices[start : start + size]
        if limit is None or limit.budget is None:
            yield part
            continue
        first, held = 0, 0
        for k, edges in enumerate(limit.edges[part].tolist()):
            if k > first and held + edges > limit.budget:
                yield part[first:k]
                first, held = k, 0
            held += edges
        yield part[first:]


def evaluate(scoring: Scoring, indices: Indices) -> dict[str, float]:
    """Loss and mean absolute errors over `indices`; collective.

    Raises Interrupted, on all ranks, if one is told to stop.
    """
    objective, engine = scoring.objective, scoring.engine
    was_training = objective.training
    objective.eval()
    total = zeros(objective)
    counts = dict.fromkeys(objective.terms, 1.0)
    for batch in scoring.batches([indices[engine.rank :: engine.world_size]]):
        if signals.received():
            break  # an evaluation is made again, from the checkpoint before it
        for _, (_, errors) in scoring.computed(batch, lambda part: objective(part, VALIDATION_EPOCH, counts)):
            total.update({k: float(v) for k, v in errors.items()})
    objective.train(was_training)
    sums = engine.ranks.sum({**total, "asked_to_stop": bool(signals.received())})
    _stop_if_asked(sums)
    return objective.metrics_of(sums)


def write_predictions(path: Path, scoring: Scoring, indices: Indices) -> None:
    """Write predicted and true values of every label over `indices`, in their order, to the npz `path`; collective.

    Keys: structure_ids, num_atoms (S,), atomic_numbers (A,), and <label>_true, <label>_pred of the rows that have
    the label, with <label>_structure: the position in `indices` of each row's structure. No rank ever holds more than
    GATHERED structures (or one of every rank). Raises Interrupted as above; EnvironmentFault, on every rank, if rank 0
    cannot write.
    """
    objective, ranks = scoring.objective, scoring.engine.ranks
    objective.eval()
    share = share_of(ranks.size, scoring.batch_size)
    # In each round every rank takes a stretch, and rank 0 appends them in the order of ranks.
    rounds = range(0, len(indices), share * ranks.size)
    own = [min(start + share * ranks.rank, len(indices)) for start in rounds]
    batches = scoring.batches(indices[first : first + share] for first in own)
    file = writing(ranks, path, lambda: GrowingArrays(path))
    for start, first in zip(rounds, own, strict=True):
        found: dict[str, list[NDArray[Any]]] = {}
        at, end = first, min(first + share, len(indices))
        while at < end and not signals.received():
            for part, arrays in scoring.computed(next(batches), partial(_predicted, objective)):
                for key, rows in arrays.items():
                    found.setdefault(key, []).append(rows + at if key.endswith(PLACE) else rows)
                at += part.num_structures
        _stop_if_asked(ranks.sum({"asked_to_stop": bool(signals.received())}))
        gathered = ranks.gather({k: np.concatenate(v) for k, v in found.items()})
        told = indices[start : start + share * ranks.size]
        writing(ranks, path, partial(_append, file, gathered or [], scoring.data.dataset, told))
    writing(ranks, path, lambda: file.publish() if file is not None else None)


def share_of(ranks: int, batch_size: int) -> int:
    """How many structures a rank predicts before rank 0 gathers them: whole batches, unless that would be too many."""
    at_once = max(min(batch_size, GATHERED // ranks), 1)
    return at_once * max(PIECE // (at_once * ranks), 1)


def _predicted(objective: Objective, batch: Batch) -> dict[str, NDArray[Any]]:
    """The arrays of one batch; the places of structures count from its first one."""
    found: dict[str, Tensor] = {"atomic_numbers": batch.atomic_numbers}
    for label, (predicted, true, mask) in objective.predictions(batch, VALIDATION_EPOCH).items():
        structure = torch.arange(batch.num_structures, device=mask.device)
        if len(mask) != batch.num_structures:
            structure = structure.index_select(0, batch.batch)
        found[f"{label}_true"], found[f"{label}_pred"] = true[mask], predicted[mask]
        found[f"{label}{PLACE}"] = structure[mask]
    return {key: value.detach().cpu().numpy() for key, value in found.items()}


def _append(
    file: GrowingArrays | None, gathered: Sequence[Mapping[str, NDArray[Any]]], dataset: Dataset, indices: Indices
) -> None:
    if file is None:
        return
    for share in gathered:
        file.add(share)
    file.add({"structure_ids": dataset.id_array(indices), "num_atoms": dataset.num_atoms_of(indices)})


def writing(ranks: Ranks, path: Path, work: Callable[[], Result]) -> Result | None:
    """What `work` returns on rank 0; None elsewhere. Its error is raised on every rank."""

    def told() -> Result | None:
        if ranks.rank:
            return None
        try:
            return work()
        except OSError as error:
            raise EnvironmentFault(
                f"{path}: cannot be written: {error.strerror or error}.\n"
                "Make room there: training is complete, and the same command writes the predictions again."
            ) from None

    return agree(ranks, told)


def _stop_if_asked(sums: Mapping[str, float]) -> None:
    if sums["asked_to_stop"]:
        raise Interrupted(f"told to stop during an evaluation ({signals.received() or 'another rank'})")
