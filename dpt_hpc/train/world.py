"""Who this process is among all ranks, whichever launcher started it.

A door of mpi4py, as are data/store_cluster.py and train/one_sided.py.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.interfaces import interfaces, node_name, resolves

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

    @property
    def place(self) -> str:
        """What messages call this process."""
        return f"rank {self.rank} on {self.node}"

    @property
    def launched(self) -> bool:
        """Whether this process is the child of a launcher, and should not outlive it."""
        return self.source.startswith(tuple(launcher.name for launcher in LAUNCHERS))

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
class Launcher:
    """The variables by which a launcher tells a process its place. sign: a variable that this launcher alone sets."""

    name: str
    sign: str
    rank: str
    world_size: str
    local_rank: str


# A launcher may run inside another one (torchrun, or mpirun's daemons, one per node, inside srun): the first of this
# list is the innermost, and knows.
LAUNCHERS = (
    Launcher("torchrun", "TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    Launcher("deepspeed", "CROSS_RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK"),
    Launcher("mpirun (Open MPI)", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
             "OMPI_COMM_WORLD_LOCAL_RANK"),
    Launcher("mpiexec (MPICH)", "MPI_LOCALRANKID", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    Launcher("mpiexec (PALS)", "PALS_RANKID", "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID"),
    Launcher("srun", "SLURM_STEP_NUM_TASKS", "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"),
    Launcher("mpiexec (PMI)", "PMI_SIZE", "PMI_RANK", "PMI_SIZE", "LOCAL_RANK"),
)  # fmt: skip
BY_HAND = Launcher("RANK and WORLD_SIZE, set by hand", "RANK", "RANK", "WORLD_SIZE", "LOCAL_RANK")


def find_world(environment: Mapping[str, str] = os.environ) -> World:
    """The world as the launcher's environment variables describe it.

    Before the ranks have met: local_world_size, node_rank and num_nodes are those of one process. Raises
    EnvironmentFault if a variable is missing or contradicts another.
    """
    node = node_name(environment)
    launcher = next((known for known in LAUNCHERS if known.sign in environment), BY_HAND)
    hosts = _host_file(environment)
    sizes = {launcher.world_size: str(len(hosts))} if launcher is BY_HAND and hosts else {}
    if launcher.rank not in environment:
        if launcher is not BY_HAND:
            raise EnvironmentFault(
                f"{launcher.name} has set {launcher.sign}, but not {launcher.rank}: this process has no rank.\n"
                f"Start every rank by {launcher.name}, and keep the variables that it sets."
            )
        if "WORLD_SIZE" in environment and _integer(environment, "WORLD_SIZE") > 1:
            raise EnvironmentFault(
                f"WORLD_SIZE is {environment['WORLD_SIZE']}, but RANK is not set and no launcher was found.\n"
                "Start the ranks by srun, mpirun, deepspeed or torchrun, or set RANK for each."
            )
        return World(node=node, source=_alone(environment, hosts))
    known = {**sizes, **environment}
    rank, world_size = _integer(known, launcher.rank), _integer(known, launcher.world_size)
    if not 0 <= rank < world_size:
        raise EnvironmentFault(
            f"{launcher.name}: {launcher.rank}={rank}, but {launcher.world_size}={world_size}.\n"
            "Ranks are counted from 0: one of the two is left over from another job, or set by hand."
        )
    _check_agreement(environment, launcher, rank, world_size)
    source = f"srun ({flavour})" if launcher.name == "srun" and (flavour := _pmi(environment)) else launcher.name
    if world_size == 1:
        alone = _alone(environment, hosts) if launcher.name == "srun" else f"{source}: one process"
        return World(node=node, source=alone)
    local_rank = _integer(environment, launcher.local_rank) if launcher.local_rank in environment else 0
    if not 0 <= local_rank < world_size:
        raise EnvironmentFault(
            f"{launcher.name}: {launcher.local_rank}={local_rank}, but {launcher.world_size}={world_size}.\n"
            "Ranks of a node are counted from 0: one of the two is left over from another job, or set by hand."
        )
    address, port = _rendezvous(environment, launcher, world_size, hosts)
    return World(rank, local_rank, world_size, node=node, master_address=address, master_port=port, source=source)


def place_so_far(environment: Mapping[str, str] = os.environ) -> tuple[int, int]:
    """Rank and world size as the variables say, checked or not: for messages, also before the ranks have met."""
    launcher = next((known for known in LAUNCHERS if known.sign in environment), BY_HAND)
    try:
        return int(environment[launcher.rank]), int(environment[launcher.world_size])
    except (KeyError, ValueError):
        return 0, 1


def leave_mpi() -> None:
    """Finalise MPI if this process has started it: the last thing that a rank of a run that went well does."""
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.Finalize()


def _check_agreement(environment: Mapping[str, str], launcher: Launcher, rank: int, world_size: int) -> None:
    """RANK and WORLD_SIZE set by hand, and PMI's and PMIx's variables under srun, must say what the launcher says."""
    tasks = _integer({"SLURM_STEP_NUM_TASKS": "1", **environment}, "SLURM_STEP_NUM_TASKS")
    if tasks > world_size:  # a launcher inside srun has at least one rank per task
        raise EnvironmentFault(
            f"srun started {tasks} tasks, but {launcher.name} says {launcher.world_size}={world_size}.\n"
            f"Each of them would train alone, all in one directory. Unset {launcher.sign}: it is left from another job "
            "or shell."
        )
    others = [("RANK", "WORLD_SIZE")]
    if launcher.name == "srun":
        others += [("PMI_RANK", "PMI_SIZE"), ("PMIX_RANK", "PMI_SIZE")]
    for other_rank, other_size in others:
        for name, own_name, value in (
            (other_rank, launcher.rank, rank),
            (other_size, launcher.world_size, world_size),
        ):
            if name in environment and name != own_name and _integer(environment, name) != value:
                raise EnvironmentFault(
                    f"{launcher.name} says {own_name}={value}, but {name}={environment[name]}.\n"
                    "The ranks would not find each other, or each would train alone. "
                    f"Unset {name}, or start the ranks by one launcher only."
                )


def _pmi(environment: Mapping[str, str]) -> str | None:
    return "pmix" if "PMIX_RANK" in environment else "pmi2" if "PMI_RANK" in environment else None


def _alone(environment: Mapping[str, str], hosts: list[str]) -> str:
    """One process; says if the job has room for more, as it does where srun or, under PBS, mpiexec was forgotten."""
    tasks = environment.get("SLURM_NTASKS", "1")
    if tasks != "1" and environment.get("SLURM_STEP_NUM_TASKS", "1") == "1":
        return f"one process, although the job has {tasks} tasks: start it with srun to use them"
    if len(hosts) > 1 and "SLURM_STEP_NUM_TASKS" not in environment:
        return f"one process, although the job has {len(hosts)} ranks: start it with mpiexec to use them"
    return "no launcher: one process" if "SLURM_STEP_NUM_TASKS" not in environment else "srun: one process"


def _host_file(environment: Mapping[str, str]) -> list[str]:
    """One line per rank, as PBS writes it: empty without such a file."""
    path = environment.get("PBS_NODEFILE")
    if path is None:
        return []
    try:
        lines = Path(path).read_text().split("\n")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise EnvironmentFault(
            f"PBS_NODEFILE is {path}, which cannot be read: {reason}.\nStart the ranks inside the PBS job."
        ) from None
    return [line.split()[0] for line in lines if line.strip()]


def _rendezvous(
    environment: Mapping[str, str], launcher: Launcher, world_size: int, hosts: list[str]
) -> tuple[str, int]:
    port = _integer({"MASTER_PORT": str(DEFAULT_PORT), **environment}, "MASTER_PORT")
    if not 0 < port < 65536:
        raise EnvironmentFault(f"MASTER_PORT is {port}, expected 1 to 65535.\nSet it to a free port of rank 0's host.")
    if "MASTER_ADDR" in environment:
        return environment["MASTER_ADDR"], port
    if launcher.name.startswith("mpi"):
        return _rendezvous_over_mpi(world_size)
    if launcher.name == "srun":
        # Same on every rank of a job step, distinct between steps and jobs that share a node; and a job that is queued
        # again does not meet a rank of its former self that still listens.
        names = ("SLURM_JOB_ID", "SLURM_STEP_ID", "SLURM_RESTART_COUNT")
        job, step, restart = (_integer({name: "0", **environment}, name) for name in names)
        port = port if "MASTER_PORT" in environment else 20000 + (job * 13 + step + restart * 5003) % 12000
        one_node = environment.get("SLURM_STEP_NUM_NODES") == "1"
        return "127.0.0.1" if one_node else first_host(environment.get("SLURM_STEP_NODELIST", "localhost")), port
    if hosts:
        return hosts[0], port
    raise EnvironmentFault(f"{launcher.name}: MASTER_ADDR is not set, so ranks cannot meet.\nSet it to rank 0's host.")


def _rendezvous_over_mpi(world_size: int) -> tuple[str, int]:
    try:
        import mpi4py
    except ImportError as error:
        raise _no_mpi4py(error) from None

    # At the end of a failed process, Finalize would wait for the other ranks: `leave_mpi` calls it where all went well.
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI
    except ImportError as error:  # of the MPI library
        raise _no_mpi4py(error) from None

    communicator = MPI.COMM_WORLD
    if communicator.Get_size() != world_size:
        raise EnvironmentFault(
            f"mpirun started {world_size} ranks, but mpi4py sees {communicator.Get_size()}: "
            "it is linked against another MPI library than the mpirun in use.\n"
            "Use the mpiexec of the environment that mpi4py was installed in."
        )
    mine = None
    if communicator.Get_rank() == 0:
        addresses = [address for address in interfaces().values() if not address.startswith("127.")]
        with socket.socket() as free:
            free.bind(("", 0))
            mine = (socket.gethostname(), addresses, free.getsockname()[1])
    host, addresses, port = communicator.bcast(mine)
    if len(set(communicator.allgather(socket.gethostname()))) == 1:
        return "127.0.0.1", port
    known = all(communicator.allgather(resolves(host)))
    return (host if known or not addresses else addresses[0]), port


def _no_mpi4py(error: ImportError) -> EnvironmentFault:
    return EnvironmentFault(
        f"mpirun's ranks find each other by mpi4py, which cannot be imported: {' '.join(str(error).split())}.\n"
        "Install it for the MPI of mpirun, or set MASTER_ADDR and MASTER_PORT to rank 0's host and a free port."
    )


def first_host(nodelist: str) -> str:
    """`n[1-4,7],m2` -> `n1`: the first host of a Slurm node list."""
    head, bracket, rest = nodelist.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    inside, _, suffix = rest.partition("]")
    return head + inside.split(",")[0].split("-")[0] + suffix.split(",")[0].split("[")[0]


def _integer(environment: Mapping[str, str], name: str) -> int:
    try:
        return int(environment[name])
    except (KeyError, ValueError):
        raise EnvironmentFault(f"{name} is {environment.get(name)!r}, expected an integer.") from None
