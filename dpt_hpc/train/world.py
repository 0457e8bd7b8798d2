"""Who this process is among all ranks, whichever launcher started it. The only door of mpi4py."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.interfaces import node_name

DEFAULT_PORT = 29500


@dataclass(frozen=True)
class World:
    """Who this process is among all ranks, and where rank 0 listens.

    node: name of this process's node, distinct between nodes; local_rank, local_world_size: this process among the
    ranks of its node, ordered by rank; node_rank: nodes are numbered in the order of their first ranks. source: which
    launcher said so.
    """

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    node: str = field(default_factory=node_name)
    node_rank: int = 0
    num_nodes: int = 1
    master_address: str = "127.0.0.1"
    master_port: int = DEFAULT_PORT
    source: str = "no launcher: one process"

    def environment(self) -> dict[str, str]:
        """The variables that torch.distributed reads."""
        return {
            "RANK": str(self.rank),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "WORLD_SIZE": str(self.world_size),
            "MASTER_ADDR": self.master_address,
            "MASTER_PORT": str(self.master_port),
        }


@dataclass(frozen=True)
class _Launcher:
    name: str
    rank: str
    local_rank: str
    world_size: str


# In the order in which they are asked: a launcher that runs inside another one comes first.
_LAUNCHERS = (
    _Launcher("torchrun or deepspeed", "RANK", "LOCAL_RANK", "WORLD_SIZE"),
    _Launcher("mpirun (Open MPI)", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_SIZE"),
    _Launcher("mpirun (MPICH)", "PMI_RANK", "MPI_LOCALRANKID", "PMI_SIZE"),
    _Launcher("srun", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_STEP_NUM_TASKS"),
)


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher's environment variables describe it.

    Before the ranks have met: local_world_size, node_rank and num_nodes are those of one process. Raises
    EnvironmentFault if a variable is missing or contradicts another.
    """
    node = node_name(environment)
    for launcher in _LAUNCHERS:
        if launcher.rank not in environment or launcher.world_size not in environment:
            continue
        rank = _integer(environment, launcher.rank)
        world_size = _integer(environment, launcher.world_size)
        local_rank = _integer(environment, launcher.local_rank) if launcher.local_rank in environment else 0
        if not 0 <= rank < world_size:
            raise EnvironmentFault(f"{launcher.name}: {launcher.rank}={rank}, but {launcher.world_size}={world_size}.")
        if world_size == 1:
            return World(node=node, source=f"{launcher.name}: one process")
        address, port = _rendezvous(environment, launcher)
        return World(
            rank, local_rank, world_size, node=node, master_address=address, master_port=port, source=launcher.name
        )
    return World(node=node)


def leave_mpi() -> None:
    """Finalise MPI if this process has started it: the last thing that a rank of a run that went well does."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _rendezvous(environment: Mapping[str, str], launcher: _Launcher) -> tuple[str, int]:
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", DEFAULT_PORT))
    if launcher.name.startswith("mpirun"):
        return _rendezvous_over_mpi(_integer(environment, launcher.world_size))
    if launcher.name == "srun":
        # Same on every rank of a job step, distinct between jobs that share a node.
        port = 20000 + int(environment.get("SLURM_JOB_ID", "0")) % 20000
        return _first_host(environment.get("SLURM_STEP_NODELIST", "localhost")), port
    raise EnvironmentFault(f"{launcher.name}: MASTER_ADDR is not set, so ranks cannot meet.\nSet it to rank 0's host.")


def _rendezvous_over_mpi(world_size: int) -> tuple[str, int]:
    import mpi4py

    # At the end of a failed process, Finalize would wait for the other ranks: `leave_mpi` calls it where all went well.
    mpi4py.rc.finalize = False
    from mpi4py import MPI

    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != world_size:
        raise EnvironmentFault(
            f"mpirun started {world_size} ranks, but mpi4py sees {communicator.Get_size()}: "
            "it is linked against another MPI library than the mpirun in use.\n"
            "Use the mpiexec of the environment that mpi4py was installed in."
        )
    mine = None
    if communicator.Get_rank() == 0:
        with socket.socket() as free:
            free.bind(("", 0))
            mine = (socket.gethostname(), free.getsockname()[1])
    host, port = communicator.bcast(mine)
    one_node = len(set(communicator.allgather(socket.gethostname()))) == 1
    return ("127.0.0.1" if one_node else host), port


def _first_host(nodelist: str) -> str:
    """`n[1-4,7],m2` -> `n1`: the first host of a Slurm node list."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    return head + rest.split("]")[0].split(",")[0].split("-")[0]


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise EnvironmentFault(f"{name} is {environment.get(name)!r}, expected an integer.") from None
