"""Who a process is among all ranks, by the environment variables that each launcher really sets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.launch import without_local_rank
from dpt_hpc.train.interfaces import interface_towards, own_address_towards, reachable
from dpt_hpc.train.ranks import Ranks
from dpt_hpc.train.world import World, find_world, first_host, place_so_far

TORCHRUN = {
    "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "1234",
    "TORCHELASTIC_RUN_ID": "none",
}  # fmt: skip
SRUN = {
    "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[1-2,4]",
    "SLURM_JOB_ID": "77", "SLURM_STEP_ID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_NUM_NODES": "3",
    "SLURMD_NODENAME": "node2",
}  # fmt: skip
RECORDED = {
    "torchrun": TORCHRUN,
    "torchrun in srun": {**SRUN, "SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", **TORCHRUN},
    "deepspeed": {
        "RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "1234",
        "CROSS_RANK": "1", "CROSS_SIZE": "4", "LOCAL_SIZE": "2",
    },
    "srun": SRUN,
    "srun (pmi2)": {**SRUN, "PMI_RANK": "3", "PMI_SIZE": "8", "PMI_FD": "11"},
    "srun (pmix)": {**SRUN, "PMIX_RANK": "3", "PMIX_NAMESPACE": "slurm.pmix.77.0"},
    "mpirun (Open MPI)": {
        "OMPI_COMM_WORLD_RANK": "3", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
        "PMIX_RANK": "3", "MASTER_ADDR": "node1",
        **{k: v for k, v in SRUN.items() if "STEP" not in k}, "SLURM_PROCID": "0",  # inside a batch script
    },
    "mpiexec (MPICH)": {
        "PMI_RANK": "3", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4", "MASTER_ADDR": "node1",
        "WORLD_SIZE": "8",  # by deepspeed --launcher mpich
    },
    "mpiexec (PALS)": {
        "PALS_RANKID": "3", "PMI_RANK": "3", "PMI_SIZE": "8", "PALS_LOCAL_RANKID": "1", "MASTER_ADDR": "node1",
    },
    "RANK and WORLD_SIZE, set by hand": {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1"},
}  # fmt: skip


@pytest.mark.parametrize("launcher", RECORDED)
def test_the_world_is_found(launcher: str) -> None:
    world = find_world(RECORDED[launcher])
    assert (world.rank, world.local_rank, world.world_size, world.master_address) == (3, 1, 8, "node1")
    assert world.source == launcher.split(" in ")[0]


def test_no_launcher_is_one_process() -> None:
    world = find_world({"DPT_HPC_NODE": "here"})
    assert (world.rank, world.world_size, world.node, world.source) == (0, 1, "here", "no launcher: one process")


def test_nodes_are_told_apart_by_the_name_that_slurm_gives_them() -> None:
    assert find_world(SRUN).node == "node2"
    assert find_world(SRUN | {"DPT_HPC_NODE": "mine"}).node == "mine"
    assert find_world(TORCHRUN).node == socket.gethostname()


def test_ranks_of_one_node_meet_on_the_node_itself() -> None:
    assert find_world(SRUN | {"SLURM_STEP_NUM_NODES": "1"}).master_address == "127.0.0.1"


def test_steps_of_a_job_do_not_share_a_port() -> None:
    ports = {find_world(SRUN | {"SLURM_STEP_ID": str(step)}).master_port for step in range(5)}
    assert len(ports) == 5
    assert find_world(SRUN | {"MASTER_PORT": "4321"}).master_port == 4321


def test_a_job_that_is_queued_again_does_not_meet_its_former_self() -> None:
    ports = {find_world(SRUN | {"SLURM_RESTART_COUNT": str(count)}).master_port for count in range(5)}
    assert len(ports) == 5
    assert find_world(SRUN).master_port in ports


@pytest.mark.parametrize(
    ("left", "sign"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "1", "OMPI_COMM_WORLD_RANK": "0"}, "OMPI_COMM_WORLD_SIZE"),
        ({"CROSS_RANK": "0", "RANK": "0", "WORLD_SIZE": "1"}, "CROSS_RANK"),
        ({"TORCHELASTIC_RUN_ID": "none", "RANK": "0", "WORLD_SIZE": "1"}, "TORCHELASTIC_RUN_ID"),
    ],
)
def test_srun_does_not_start_many_worlds_of_one(left: dict[str, str], sign: str) -> None:
    with pytest.raises(EnvironmentFault, match=rf"srun started 8 tasks, but .*=1\.\nEach of them.* Unset {sign}:"):
        find_world(SRUN | left)


def test_mpirun_without_mpi4py_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "mpi4py", None)
    place = {"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "2"}
    with pytest.raises(EnvironmentFault, match=r"by mpi4py, which cannot be imported: .*\nInstall it for the MPI"):
        find_world(place)


def test_the_place_of_a_rank_is_known_to_messages_before_the_ranks_have_met() -> None:
    assert place_so_far(SRUN) == (3, 8)
    assert place_so_far(SRUN | {"SLURM_PROCID": "three"}) == place_so_far({}) == (0, 1)
    assert World(rank=3, node="n2").place == "rank 3 on n2"


def test_a_launchers_ranks_do_not_outlive_it() -> None:
    sources = [find_world(variables | {"MASTER_ADDR": "node1"}) for variables in RECORDED.values()]
    assert [world.source for world in sources if not world.launched] == ["RANK and WORLD_SIZE, set by hand"]
    assert find_world({"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}).launched
    assert not find_world({}).launched


def test_the_limit_of_open_files_is_raised_or_told() -> None:
    program = (
        "import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 256))\n"
        "from dpt_hpc.train.ranks import allow_connections; from dpt_hpc.train.world import World\n"
        "allow_connections(World(world_size=44)); print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "allow_connections(World(rank=2, world_size=100))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.stdout == "(256, 256)\n", done.stderr
    assert "100 ranks need 450 open files in a process, but the hard limit here is 256.\nRaise it" in done.stderr


def test_a_forgotten_srun_is_told() -> None:
    """The batch shell of a job of four tasks, as Slurm starts it: nothing of a step in its environment."""
    batch = {"SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NTASKS": "4", "SLURM_JOB_ID": "7"}
    world = find_world(batch)
    assert (world.world_size, world.source) == (
        1, "one process, although the job has 4 tasks: start it with srun to use them",
    )  # fmt: skip
    assert find_world(batch | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_NTASKS": "1"}).source == "srun: one process"


def test_a_host_file_of_pbs_names_the_ranks_and_the_first_host(tmp_path: Path) -> None:
    hosts = tmp_path / "nodes"
    hosts.write_text("alpha\nalpha\nbeta\nbeta\n")
    world = find_world({"PBS_NODEFILE": str(hosts), "RANK": "2"})
    assert (world.rank, world.world_size, world.master_address) == (2, 4, "alpha")
    with pytest.raises(EnvironmentFault, match="RANK=4, but WORLD_SIZE=4"):
        find_world({"PBS_NODEFILE": str(hosts), "RANK": "4"})
    alone = find_world({"PBS_NODEFILE": str(hosts)})  # mpiexec forgotten
    said = "one process, although the job has 4 ranks: start it with mpiexec to use them"
    assert (alone.world_size, alone.source) == (1, said)
    hosts.write_text("alpha\n")
    assert find_world({"PBS_NODEFILE": str(hosts)}).source == "no launcher: one process"
    hosts.write_text("alpha\n" * 4)
    with pytest.raises(EnvironmentFault, match="PBS_NODEFILE is /nowhere, which cannot be read: No such file"):
        find_world({"PBS_NODEFILE": "/nowhere", "RANK": "0"})


def test_contradictions_are_refused() -> None:
    by_hand = RECORDED["RANK and WORLD_SIZE, set by hand"]
    with pytest.raises(EnvironmentFault, match="RANK=8, but WORLD_SIZE=8"):
        find_world(by_hand | {"RANK": "8"})
    with pytest.raises(EnvironmentFault, match="WORLD_SIZE is 'eight', expected an integer"):
        find_world(by_hand | {"WORLD_SIZE": "eight"})
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR is not set"):
        find_world({k: v for k, v in by_hand.items() if k != "MASTER_ADDR"})


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({"RANK": "0", "WORLD_SIZE": "8"}, r"srun says SLURM_PROCID=3, but RANK=0\.\n.*Unset RANK"),
        ({"WORLD_SIZE": "1"}, r"srun says SLURM_STEP_NUM_TASKS=8, but WORLD_SIZE=1\."),
        ({"PMI_RANK": "0", "PMI_SIZE": "1"}, r"srun says SLURM_PROCID=3, but PMI_RANK=0\."),
        ({"PMIX_RANK": "2"}, r"srun says SLURM_PROCID=3, but PMIX_RANK=2\."),
    ],
)
def test_sources_that_disagree_are_refused(extra: dict[str, str], message: str) -> None:
    with pytest.raises(EnvironmentFault, match=message):
        find_world(SRUN | extra)


def test_a_rank_that_was_not_told_its_place_is_refused() -> None:
    without = {k: v for k, v in SRUN.items() if k != "SLURM_PROCID"}
    with pytest.raises(EnvironmentFault, match="srun has set SLURM_STEP_NUM_TASKS, but not SLURM_PROCID"):
        find_world(without)
    with pytest.raises(EnvironmentFault, match="WORLD_SIZE is 4, but RANK is not set and no launcher was found"):
        find_world({"WORLD_SIZE": "4"})


@pytest.mark.parametrize(
    ("nodelist", "first"),
    [
        ("n1", "n1"), ("n1,n2", "n1"), ("n[1-4,7],m2", "n1"), ("a3,n[1-2]", "a3"), ("nid[0003-0004]", "nid0003"),
        ("rack[1-2]-n1", "rack1-n1"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodelist: str, first: str) -> None:
    assert first_host(nodelist) == first


def test_a_host_that_does_not_resolve_is_asked_of_slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """scontrol is a program of the same name and format, found first on the PATH."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text('#!/bin/sh\necho "NodeName=$4 Arch=x86_64 NodeAddr=${ADDRESS:-$4} NodeHostName=x"\n')
    scontrol.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert reachable("localhost") == "localhost"
    monkeypatch.setenv("ADDRESS", "127.0.0.1")
    assert reachable("n1.invalid") == "127.0.0.1"
    monkeypatch.delenv("ADDRESS")
    with pytest.raises(EnvironmentFault, match=r"rank 0, n1\.invalid, does not resolve on .*NodeAddr=n1\.invalid") as e:
        reachable("n1.invalid")
    assert "Set MASTER_ADDR to an address" in str(e.value)


def test_the_interface_towards_a_host_is_the_one_that_leads_there() -> None:
    assert own_address_towards("127.0.0.1") == "127.0.0.1"
    assert interface_towards("127.0.0.1") == "lo"
    assert interface_towards("no.such.host.invalid") is None


def test_the_local_rank_that_deepspeed_appends_is_taken_off() -> None:
    words = ["--local_rank=1", "a.yaml", "--set", "seed=2", "--local-rank", "3", "--resume"]
    assert without_local_rank(words) == ["a.yaml", "--set", "seed=2", "--resume"]


JOIN = """
import sys
from pathlib import Path
import numpy as np
from dpt_hpc.data import shared_memory
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.ranks import enter_world, leave_world
from dpt_hpc.train.once_a_node import assembled, from_first
try:
    ranks = enter_world(float(sys.argv[1]))
except EnvironmentFault as fault:
    sys.exit(f"FAULT {fault}")
w = ranks.world
print(w.rank, w.local_rank, w.local_world_size, w.node, w.node_rank, w.num_nodes, end=" ")
print(ranks.broadcast(f"from {w.rank}"), ranks.all_gather(w.rank), ranks.gather(w.rank), end=" ")
print(ranks.sum({"a": w.rank}), end=" ")
print(ranks.node.broadcast(f"from {w.rank}"), ranks.node.all_gather(w.rank), ranks.node.sum({"a": w.rank}), end=" ")
ranks.barrier()
ranks.node.barrier()
print(ranks.node.rank, ranks.node.size)
for folder in (shared_memory.SHARED, Path("/nowhere")):
    shared_memory.SHARED = folder
    first = from_first(np.arange(5, 8) if w.rank == 0 else None, ranks)
    empty = from_first(np.arange(0) if w.rank == 0 else None, ranks)
    each = assembled(3, ranks, lambda values: values.__setitem__(w.rank, 10 + w.rank))
    told = [*first.tolist(), len(empty), *each.tolist(), each.flags.writeable]
    ranks.barrier()
    each.flags.writeable = True
    each[w.rank] = 0
    ranks.barrier()
    print(*told, "changed:", *each.tolist())
leave_world()
"""


def together(places: list[dict[str, str]], seconds: float = 60) -> list[str]:
    """What processes with these variables, started at once, print: their output, or their error."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    said = [""] * len(places)

    def start(i: int) -> None:
        hand = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **places[i]}
        command = [sys.executable, "-c", JOIN, str(seconds)]
        done = subprocess.run(
            command, env=os.environ | hand, capture_output=True, text=True, timeout=seconds + 90, check=False
        )
        said[i] = done.stdout.strip() if done.returncode == 0 else done.stderr[done.stderr.find("FAULT") :]

    threads = [threading.Thread(target=start, args=(i,)) for i in range(len(places))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


@pytest.mark.slow
def test_ranks_meet_and_agree_also_within_their_nodes() -> None:
    """Three ranks on two nodes that are not next to each other. What one writes into a large array, its node sees; and
    itself alone, where a node's ranks cannot share memory."""
    nodes = ["a", "b", "a"]
    said = together([{"RANK": str(i), "WORLD_SIZE": "3", "DPT_HPC_NODE": nodes[i]} for i in range(3)])
    shared = "from 0 [0, 1, 2]"
    large = "\n5 6 7 0 10 11 12 False changed:"
    assert said == [
        f"0 0 2 a 0 2 {shared} [0, 1, 2] {{'a': 3.0}} from 0 [0, 2] {{'a': 2.0}} 0 2{large} 0 11 0{large} 0 11 12",
        f"1 0 1 b 1 2 {shared} None {{'a': 3.0}} from 1 [1] {{'a': 1}} 0 1{large} 10 0 12{large} 10 0 12",
        f"2 1 2 a 0 2 {shared} None {{'a': 3.0}} from 0 [0, 2] {{'a': 2.0}} 1 2{large} 0 11 0{large} 10 11 0",
    ]


@pytest.mark.slow
def test_a_missing_rank_is_named_by_all_that_are_there() -> None:
    said = together([{"RANK": str(rank), "WORLD_SIZE": "3"} for rank in (0, 2)], seconds=30)
    for words in said:
        assert "announced 3 ranks, but 1 did not come within 30 s: rank 1." in words, said
        assert "DPT_HPC_JOIN_SECONDS waits longer" in words


@pytest.mark.slow
def test_two_processes_of_one_rank_are_refused() -> None:
    said = together([{"RANK": rank, "WORLD_SIZE": "2"} for rank in ("0", "1", "1")], seconds=20)
    assert sum("another process is rank 1 too" in words for words in said) == 1, said


def test_one_process_needs_nobody() -> None:
    ranks = Ranks()
    ranks.barrier()
    assert (ranks.rank, ranks.size, ranks.node is ranks, ranks.store) == (0, 1, True, None)
    assert (ranks.broadcast(1), ranks.gather(2), ranks.all_gather(3), ranks.sum({"a": 4})) == (1, [2], [3], {"a": 4})
