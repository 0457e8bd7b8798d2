"""The store `cluster`: one copy of the dataset over the memory of all nodes; others' structures come by one-sided MPI.

Each node holds a contiguous part, of equal bytes, in memory that its ranks share. Local rank 0 exposes it to the ranks
of other nodes, which get what they need of a window in the background, many requests at a time. A door of mpi4py, as
are train/world.py and train/one_sided.py.
"""

from __future__ import annotations

import os
import threading
import time
from typing import Any

import numpy as np

from dpt_hpc.data.group import Group, agree
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.store import Store
from dpt_hpc.data.store_node import hold, size_of
from dpt_hpc.data.tables import Indices, Layout, Tables
from dpt_hpc.errors import EnvironmentFault

IN_FLIGHT = 256
"""Requests that wait for their answers at a time."""
REQUEST_BYTES = 16 << 20
"""At most so much comes with one request (or one structure, if it has more)."""
PROGRESS_SECONDS = 5e-4


class ClusterStore(Store):
    """Collective among all ranks of `everyone`, those of `node` being this rank's node, number `node_rank` of all.

    Raises EnvironmentFault, on every rank, if MPI does not connect the same ranks, or not several threads at a time.
    """

    kind = "cluster"

    def __init__(self, dataset: Dataset, layout: Layout, everyone: Group, node: Group, node_rank: int) -> None:
        super().__init__(dataset, layout)
        check_mpi(everyone)
        from mpi4py import MPI

        self._mpi = MPI
        leaders = {n: rank for rank, (n, local) in reversed([*enumerate(everyone.all_gather((node_rank, node.rank)))])}
        self._owner = [leaders[n] for n in range(len(leaders))]
        self._bounds = node_bounds(dataset, layout, len(leaders))
        self._node_rank = node_rank
        mine = self._part(node_rank)
        self._held, self._tables = agree(everyone, lambda: hold(dataset, layout, mine, node))
        self._before = [size_of(dataset, layout, self._part(n))[1] for n in range(len(leaders))]
        exposed = self._held if node.rank == 0 else None
        self._communicator = MPI.COMM_WORLD.Dup()
        self._window = MPI.Win.Create(exposed, 1, comm=self._communicator)
        # One access for the whole run: nobody writes, so no rank ever waits for a lock.
        self._window.Lock_all(MPI.MODE_NOCHECK)
        self._stop = threading.Event()
        self._progress = threading.Thread(target=self._serve, daemon=True)
        self._progress.start()

    def fetch(self, indices: Indices) -> Tables:
        dataset, index = self.dataset, np.unique(indices)
        count = dataset.atom_ptr[index + 1] - dataset.atom_ptr[index]
        tables = Tables.empty(self.layout, index, np.concatenate([[0], np.cumsum(count)]).astype(np.int64))
        places = np.searchsorted(index, self._bounds)
        requests: list[Any] = []
        # Ranks begin with different nodes: all of them at one node's door would queue there.
        for n in np.roll(np.arange(len(self._owner)), -self._node_rank).tolist():
            start, stop = int(places[n]), int(places[n + 1])
            if start == stop:
                continue
            if n == self._node_rank:
                self._copy(tables, start, stop)
                continue
            for low, high in self._runs(index, start, stop):
                requests += self._get(tables, n, low, high)
                if len(requests) >= IN_FLIGHT:
                    self._mpi.Request.Waitall(requests)
                    requests = []
        self._mpi.Request.Waitall(requests)
        return tables

    def close(self, *, failed: bool = False) -> None:
        """Collective, unless something has failed: then nobody is waited for, and the process must end."""
        super().close(failed=failed)
        if not failed:
            self._window.Unlock_all()
            self._window.Free()
            self._stop.set()
            self._progress.join()
            self._communicator.Free()
        self._stop.set()

    def _part(self, n: int) -> range:
        return range(int(self._bounds[n]), int(self._bounds[n + 1]))

    def _copy(self, tables: Tables, start: int, stop: int) -> None:
        """Places start to stop of `tables`, from this node's own memory."""
        held = self._tables
        at = np.asarray(tables.index[start:stop], dtype=np.int64) - int(self._bounds[self._node_rank])
        tables.structures[start:stop] = held.structures[at]
        low, high = int(tables.atom_ptr[start]), int(tables.atom_ptr[stop])
        count = np.diff(tables.atom_ptr[start : stop + 1])
        rows = np.arange(low, high) + np.repeat(held.atom_ptr[at] - tables.atom_ptr[start:stop], count)
        tables.atoms[low:high] = held.atoms[rows]

    def _runs(self, index: Indices, start: int, stop: int) -> list[tuple[int, int]]:
        """Stretches of places whose structures follow each other in memory."""
        borders = np.flatnonzero(np.diff(index[start:stop]) != 1) + 1 + start
        runs = []
        most = REQUEST_BYTES // self.layout.atoms.itemsize
        for low, high in zip([start, *borders.tolist()], [*borders.tolist(), stop], strict=True):
            while low < high:
                limit = self.dataset.atom_ptr[index[low]] + most
                end = low + int(np.searchsorted(self.dataset.atom_ptr[index[low:high] + 1], limit, side="right"))
                end = max(end, low + 1)
                runs.append((low, end))
                low = end
        return runs

    def _get(self, tables: Tables, n: int, low: int, high: int) -> list[Any]:
        """Ask node `n` for the places low to high of `tables`: two stretches of bytes."""
        byte, part = self._mpi.BYTE, self._part(n)
        first = int(tables.index[low]) - part.start
        atom = int(self.dataset.atom_ptr[tables.index[low]] - self.dataset.atom_ptr[part.start])
        structures = tables.structures[low:high].view(np.uint8)
        atoms = tables.atoms[int(tables.atom_ptr[low]) : int(tables.atom_ptr[high])].view(np.uint8)
        places = (first * self.layout.structures.itemsize, self._before[n] + atom * self.layout.atoms.itemsize)
        return [
            self._window.Rget([into, len(into), byte], self._owner[n], target=(place, len(into), byte))
            for into, place in zip((structures, atoms), places, strict=True)
        ]

    def _serve(self) -> None:
        """Answer other ranks' requests while this one computes, or waits in a collective call of another library.

        Over TCP a one-sided request is answered only while its target is inside some call of MPI: without this, a rank
        that waits in a collective for one that waits for its data would wait for ever.
        """
        while not self._stop.is_set():
            self._communicator.Iprobe()
            time.sleep(PROGRESS_SECONDS)


def node_bounds(dataset: Dataset, layout: Layout, num_nodes: int) -> Indices:
    """(num_nodes + 1,) the first structure of each node's part; the parts take nearly the same number of bytes."""
    end = dataset.atom_ptr * layout.atoms.itemsize + np.arange(len(dataset) + 1) * layout.structures.itemsize
    bounds = np.searchsorted(end, np.linspace(0, end[-1], num_nodes + 1)).astype(np.int64)
    bounds[0], bounds[-1] = 0, len(dataset)
    return bounds


def mpi_missing(size: int) -> str | None:
    """Why MPI cannot connect `size` ranks, as far as that can be known without starting it; None if it may."""
    try:
        import mpi4py

        # A process that fails must not wait for the others at its end: train/world.py finalises where all went well.
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = False
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        return f"mpi4py cannot be loaded: {str(error).splitlines()[0]}"
    if MPI.Is_initialized():
        return None
    library = MPI.Get_library_version().split(",")[0].strip("\0 \n")
    # Asked before MPI_Init: with a launcher that is not its own it aborts, or silently makes worlds of one.
    speaks = ("PMIX_RANK",) if "Open MPI" in library else ("PMI_RANK", "PMI_FD", "PMIX_RANK")
    if size > 1 and not any(name in os.environ for name in speaks):
        return (
            f"{library} finds none of {', '.join(speaks)} in the environment: its own launcher did not start this rank"
        )
    return None


ADVICE = "Start with mpirun, or srun --mpi=pmix (or pmi2) of the MPI that mpi4py loads; else data.store=disk or node."


def check_mpi(everyone: Group) -> None:
    """Start MPI where it is not running. Collective; raises EnvironmentFault, on every rank, if it does not connect the
    ranks of `everyone`, or not several threads at a time."""
    # MPI_Init waits for all ranks: none may begin it while another has refused.
    agree(everyone, lambda: _refuse_missing(everyone.size))
    agree(everyone, lambda: _connect(everyone))


def _refuse_missing(size: int) -> None:
    if (missing := mpi_missing(size)) is not None:
        raise EnvironmentFault(f"data.store is cluster, but {missing}.\n{ADVICE}")


def _connect(everyone: Group) -> None:
    from mpi4py import MPI

    if not MPI.Is_initialized():
        MPI.Init_thread(MPI.THREAD_MULTIPLE)
    size, rank = MPI.COMM_WORLD.Get_size(), MPI.COMM_WORLD.Get_rank()
    if (size, rank) != (everyone.size, everyone.rank):
        raise EnvironmentFault(
            f"data.store is cluster, but MPI sees rank {rank} of {size} where the launcher started rank "
            f"{everyone.rank} of {everyone.size}.\n{ADVICE}"
        )
    if MPI.Query_thread() < MPI.THREAD_MULTIPLE:
        raise EnvironmentFault(
            f"data.store is cluster, but {MPI.Get_library_version().split(',')[0]} serves one thread at a time "
            f"(level {MPI.Query_thread()}, needed {MPI.THREAD_MULTIPLE}): its answers would wait for the training.\n"
            "Use an MPI with MPI_THREAD_MULTIPLE, or data.store=disk or node."
        )
