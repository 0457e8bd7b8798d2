"""What a radius search can find wrong with a batch, said in words."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.errors import DataError
from dpt_hpc.structure import CLOSEST_ATOMS

MOST_EDGES = 2**31 - 1
"""Of a batch; more are refused (the CPU kernels have the same limit)."""


class Fault(Protocol):
    """The first fault of a batch; atoms are counted over the whole batch. Fields that its kind does not need: -1, 0."""

    @property
    def kind(self) -> _C.RadiusFault.Kind: ...
    @property
    def structure(self) -> int: ...
    @property
    def target(self) -> int: ...
    @property
    def source(self) -> int: ...
    @property
    def value(self) -> float: ...


def fault_error(fault: Fault, atom_ptr: Tensor, cells: Tensor, cutoff: float) -> DataError:
    """The error for the fault, naming structure and atoms as their user counts them."""
    kinds = _C.RadiusFault.Kind
    if fault.kind == kinds.EDGES:
        return DataError(
            f"radius_graph: the batch has {int(fault.value)} edges or more, expected fewer than 2^31.\n"
            "Make the batches smaller, or set max_neighbors."
        )
    place = f"structure {fault.structure} of the batch"
    first = int(atom_ptr[fault.structure])
    if fault.kind == kinds.POSITIONS:
        return DataError(
            f"radius_graph: positions of {place}, atom {fault.target - first}: expected finite numbers below 1e15 Å, "
            f"got {fault.value}.\nA model that diverged writes such positions; so does a broken file.",
            fault.structure,
        )
    if fault.kind == kinds.COINCIDENT:
        return DataError(
            f"radius_graph: atoms {fault.source - first} and {fault.target - first} of {place} are {fault.value:.3g} Å "
            f"apart, expected more than {CLOSEST_ATOMS} Å.\n"
            "The direction between them is undefined, so they can have no forces.\n"
            "Remove the duplicate atom, or leave the structure out.",
            fault.structure,
        )
    cell = cells[fault.structure].tolist()
    if fault.kind == kinds.CELL:
        return DataError(
            f"radius_graph: cell of {place}: expected periodic vectors that span a volume, got {cell}.\n"
            "Set pbc to False on the axes that are open, or mend the cell.",
            fault.structure,
        )
    return DataError(
        f"radius_graph: {place} has about {fault.value:.3g} periodic images within the cutoff of {cutoff} Å, too many "
        f"to list.\nIts cell is {cell}: a unit other than Å, or positions far outside the cell?",
        fault.structure,
    )


def check_offsets(atom_ptr: Tensor, num_atoms: int) -> None:
    """ValueError unless atom_ptr (B+1,) rises from 0 to num_atoms."""
    ends = int(atom_ptr[0]), int(atom_ptr[-1])
    if ends != (0, num_atoms) or bool((atom_ptr[1:] < atom_ptr[:-1]).any()):
        raise ValueError(
            f"radius_graph: atom_ptr: expected offsets rising from 0 to N = {num_atoms}, "
            f"got {atom_ptr.tolist() if atom_ptr.numel() <= 8 else f'{ends[0]} ... {ends[1]}'}."
        )


def check_cells(cells: Tensor) -> None:
    """DataError, naming the structure, unless the cells (B,3,3) are finite."""
    if bool(cells.isfinite().all()):
        return
    structure = int((~cells.isfinite()).flatten(1).any(1).nonzero()[0])
    raise DataError(
        f"radius_graph: cell of structure {structure} of the batch: expected finite numbers, "
        f"got {cells[structure].tolist()}.",
        structure,
    )
