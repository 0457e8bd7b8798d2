"""The control plane: how the ranks of a run meet, and the few calls by which they agree on something.

`enter_world` is called once per process, before any data is opened. Calls on a Ranks are collective: every rank of the
group makes the same ones in the same order.
"""

from __future__ import annotations

import json
import os
import resource
import socket
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import timedelta
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import distributed

from dpt_hpc.errors import EnvironmentFault, RankLost
from dpt_hpc.stopwatch import count, measuring, part
from dpt_hpc.train.interfaces import host_identity, host_name, interface_towards, own_address_towards, reachable
from dpt_hpc.train.world import World, find_world, leave_mpi

JOIN_SECONDS = 300.0
"""How long the first ranks wait for the last one: a large job's Python can take minutes to start."""
CALL_TIMEOUT = timedelta(minutes=30)
"""No collective call waits longer. Generous: one rank may prepare data while the others wait for it. That a rank is
dead or stopped is found much earlier, by its connections and its heartbeat."""

SECONDS_TO_HEAR = 10.0
"""How long rank 0 stays after it has told the others that a rank is missing."""

CONNECTIONS_PER_RANK = 3.5
"""In rank 0: to the store and for the heartbeat, one of Gloo's mesh, and one of that of the nodes' first ranks, who are
half of all, or fewer, where they have a mesh of their own."""


class Ranks:
    """The ranks of one run, or (`.node`) those of this process's node, or (`.leaders`, on them) the first
    rank of each node. `Ranks()` is a single process.

    world: who this process is. rank, size: its place in this group. store: what all ranks of the run can write keys
    into (a torch.distributed.Store), None for a single process.
    """

    def __init__(
        self,
        world: World | None = None,
        *,
        members: Sequence[int] = (0,),
        group: distributed.ProcessGroup | None = None,
        store: distributed.Store | None = None,
        node: Ranks | None = None,
        leaders: Ranks | None = None,
    ) -> None:
        self.world = World() if world is None else world
        self.rank = members.index(self.world.rank)
        self.size = len(members)
        self.store = store
        self.node = self if node is None else node
        self.leaders = self if leaders is None and self.size == self.node.size == 1 else leaders
        self._root = members[0]
        self._group = group

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank (pickled; other ranks' argument is not looked at)."""
        if self.size == 1:
            return value
        held = [value if self.rank == 0 else None]
        distributed.broadcast_object_list(held, src=self._root, group=self._group)
        return held[0]

    def gather(self, value: Any) -> list[Any] | None:
        """The values of all ranks in their order, on rank 0; None elsewhere."""
        if self.size == 1:
            return [value]
        gathered: list[Any] | None = [None] * self.size if self.rank == 0 else None
        distributed.gather_object(value, gathered, dst=self._root, group=self._group)
        return gathered

    def all_gather(self, value: Any) -> list[Any]:
        """The values of all ranks in their order, on every rank."""
        if self.size == 1:
            return [value]
        gathered: list[Any] = [None] * self.size
        distributed.all_gather_object(gathered, value, group=self._group)
        return gathered

    def sum(self, values: Mapping[str, float]) -> dict[str, float]:
        """Sums over the ranks in float64, the same bits on each; the same keys on every rank."""
        if self.size == 1:
            return dict(values)
        packed = torch.tensor(list(values.values()), dtype=torch.float64)
        with measured_call(self._group):
            distributed.all_reduce(packed, group=self._group)
        count("sums")
        return dict(zip(values, packed.tolist(), strict=True))

    def add_up(self, values: NDArray[np.int64]) -> None:
        """Replace `values`, of one shape on every rank, by their sum over the ranks, in place: for what is large."""
        if self.size > 1 and values.size:
            distributed.all_reduce(torch.from_numpy(values), group=self._group)

    def barrier(self) -> None:
        """Wait for all ranks."""
        # Not torch's own, which on a machine with GPUs would be NCCL's and take memory on GPU 0 from every rank.
        self.sum({"here": 1.0})


def enter_world(join_seconds: float | None = None) -> Ranks:
    """Meet the other ranks that the launcher started, if any; returns once all are there.

    join_seconds: how long to wait for the last one; else DPT_HPC_JOIN_SECONDS, else JOIN_SECONDS. Raises
    EnvironmentFault, on every rank that is there, if one is missing or the launcher's variables contradict each other.
    """
    world = find_world()
    if world.world_size == 1:
        return Ranks(world)
    world = replace(world, master_address=reachable(world.master_address))
    # Where torch.distributed, DeepSpeed and our error messages look for them.
    os.environ.update(world.environment())
    allow_connections(world)
    seconds = _seconds_to_join() if join_seconds is None else join_seconds
    store = _meet(world, seconds)
    answer = _introduce(world, store, seconds)
    members: list[int] = answer["members"]
    world = replace(
        world,
        local_rank=members.index(world.rank),
        local_world_size=len(members),
        node_rank=answer["node_rank"],
        num_nodes=answer["num_nodes"],
    )
    os.environ.update(world.environment())
    # Gloo would listen where the host's own name points to, which may be the loopback device, or nowhere.
    if interface := interface_towards(answer["towards"]):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    distributed.init_process_group(
        backends(),
        store=distributed.PrefixStore("torch", store),
        rank=world.rank,
        world_size=world.world_size,
        timeout=CALL_TIMEOUT,
    )
    node = _group_of(world, members) if len(members) < world.world_size else None
    leaders = _group_of(world, answer["leaders"]) if world.rank in answer["leaders"] else None
    everyone = range(world.world_size)
    store = distributed.PrefixStore("dpt_hpc", store)
    return Ranks(world, members=everyone, store=store, node=node, leaders=leaders)


def _group_of(world: World, members: Sequence[int]) -> Ranks:
    """Some ranks of the run, this one among them. Collective among them alone."""
    group = None
    # A node's only rank has a group too where others have more: torch makes the name of the next one from their number
    # on this rank, and waits for ever for ranks that name it otherwise.
    if 1 < world.num_nodes < world.world_size:
        group = distributed.new_group(members, timeout=CALL_TIMEOUT, backend="gloo", use_local_synchronization=True)
    return Ranks(world, members=members, group=group)


def backends() -> str:
    """What carries the ranks' calls, in torch's words: Gloo those on the CPU, as the small sums are everywhere."""
    return "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"


def allow_connections(world: World) -> None:
    """Let this process have connections to all other ranks: raises its soft limit of open files to the hard one.

    Raises EnvironmentFault if the hard one is too low.
    """
    needed = int(CONNECTIONS_PER_RANK * world.world_size) + 100
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if resource.RLIM_INFINITY in (soft, hard) or hard >= needed:
        with suppress(ValueError, OSError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        return
    raise EnvironmentFault(
        f"{world.place}: {world.world_size} ranks need {needed} open files in a process, but the "
        f"hard limit here is {hard}.\nRaise it (`ulimit -Hn`, LimitNOFILE of slurmd), or start fewer ranks."
    )


@contextmanager
def measured_call(group: distributed.ProcessGroup | None = None) -> Iterator[None]:
    """Around a collective call: to a stopwatch that runs, waiting for the slowest rank is a part of its own."""
    if not measuring():
        yield
        return
    with part("imbalance"):
        distributed.all_reduce(torch.zeros(1), group=group)
    with part("all-reduce"):
        yield


def leave_world() -> None:
    """Leave the other ranks, if there are any: the last thing that a rank does."""
    # A group of one stays: DeepSpeed remembers it, and would not find it again if this process made another engine.
    if distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1:
        distributed.destroy_process_group()
        # A thread of Gloo may still hold a tensor of the last call. It needs the interpreter to let it go, and aborts
        # the process if that is gone.
        time.sleep(0.05)
    leave_mpi()


def _meet(world: World, seconds: float) -> distributed.Store:
    """The key-value store in rank 0's process (or in torchrun's)."""
    listens = world.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not listens:
        _wait_for_listener(world, seconds)
    try:
        store = distributed.TCPStore(
            world.master_address,
            world.master_port,
            is_master=listens,
            wait_for_workers=False,
            timeout=timedelta(seconds=seconds),
        )
    except RuntimeError as error:
        place = f"{world.master_address}:{world.master_port}"
        if listens:
            raise EnvironmentFault(
                f"{world.place}: cannot listen on {place}: {_first_line(error)}\n"
                "Another job may hold the port: set MASTER_PORT to a free one, the same for all ranks."
            ) from error
        raise EnvironmentFault(
            f"{world.place}: rank 0 did not answer at {place} within {seconds:g} s: "
            f"{_first_line(error)}\nSet MASTER_ADDR to a name or address of rank 0's host that {host_name()} reaches."
        ) from error
    # torchrun keeps one store for all restarts of a job.
    return distributed.PrefixStore(f"join {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)


def _introduce(world: World, store: distributed.Store, seconds: float) -> dict[str, Any]:
    """What rank 0 finds out from all ranks, for this one: the members of its node, and where the nodes are."""
    if store.add(f"claims {world.rank}", 1) > 1:
        raise EnvironmentFault(
            f"{world.place}: another process is rank {world.rank} too ({world.source}).\n"
            "Two jobs may share MASTER_PORT, or ranks were numbered by hand: give each job a port, each process a rank."
        )
    address = own_address_towards(world.master_address)
    hello = {"node": world.node, "host": host_identity(), "address": address, "source": world.source}
    store.set(f"hello {world.rank}", json.dumps(hello))
    if world.rank == 0:
        _answer_all(world, store, seconds)
    try:
        # Rank 0 is the one that knows who is missing: let it speak first.
        there = _is_there(store, f"answer {world.rank}", time.monotonic() + seconds + 30, world.world_size)
        reason = f"no answer within {seconds + 30:g} s"
    except RuntimeError as error:
        there, reason = False, _first_line(error)
    if not there:
        raise RankLost(
            f"{world.place}: rank 0, at {world.master_address}:{world.master_port}, is gone: {reason}.\n"
            "Its own message says why, if it could write one."
        )
    answer: dict[str, Any] = json.loads(store.get(f"answer {world.rank}"))
    if "fault" in answer:
        if world.rank:
            store.set(f"heard {world.rank}", "")
        raise EnvironmentFault(answer["fault"])
    return answer


def _is_there(store: distributed.Store, key: str, until: float, size: int) -> bool:
    """Whether `key` is set before the clock says `until`. Asked again and again, by all ranks together at most some
    thousand times a second: the store's own `wait` would not let a signal through."""
    while not store.check([key]):
        if time.monotonic() >= until:
            return False
        time.sleep(0.05 + size / 4000)
    return True


def _wait_for_listener(world: World, seconds: float) -> None:
    """Until rank 0 listens, or it is time for the store to say that nobody does; signals come through."""
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with suppress(OSError), socket.create_connection((world.master_address, world.master_port), timeout=5):
            return
        time.sleep(0.05 + world.world_size / 4000)


def _seconds_to_join() -> float:
    text = os.environ.get("DPT_HPC_JOIN_SECONDS", str(JOIN_SECONDS))
    try:
        return float(text)
    except ValueError:
        raise EnvironmentFault(f"DPT_HPC_JOIN_SECONDS is {text!r}, expected a number of seconds.") from None


def _answer_all(world: World, store: distributed.Store, seconds: float) -> None:
    """Rank 0's part of the introduction."""
    hellos: dict[int, dict[str, str]] = {}
    until = time.monotonic() + seconds
    for rank in range(world.world_size):
        if _is_there(store, f"hello {rank}", until, 1):
            hellos[rank] = json.loads(store.get(f"hello {rank}"))
    fault = _missing(world, hellos, seconds)
    nodes: dict[str, list[int]] = {}
    for rank, hello in hellos.items():
        nodes.setdefault(hello["node"], []).append(rank)
    order = list(nodes)
    one_host = len({hello["host"] for hello in hellos.values()}) == 1
    # Rank 0's own host name may lead rank 0 itself to the loopback device: an address of another host does not.
    here = host_identity()
    abroad = next((h["address"] for h in hellos.values() if h["host"] != here and h["address"]), None)
    for rank, hello in hellos.items():
        if fault:
            answer: dict[str, Any] = {"fault": fault}
        else:
            towards = abroad if rank == 0 or hello["host"] == here else world.master_address
            answer = {
                "members": nodes[hello["node"]],
                "leaders": [members[0] for members in nodes.values()],
                "node_rank": order.index(hello["node"]),
                "num_nodes": len(order),
                "towards": "127.0.0.1" if one_host else towards,
            }
        store.set(f"answer {rank}", json.dumps(answer))
    if fault:  # the store goes with this process
        until = time.monotonic() + SECONDS_TO_HEAR
        for rank in (rank for rank in hellos if rank):
            _is_there(store, f"heard {rank}", until, 1)


def _missing(world: World, hellos: Mapping[int, Mapping[str, str]], seconds: float) -> str | None:
    missing = [rank for rank in range(world.world_size) if rank not in hellos]
    if not missing:
        return None
    some = ", ".join(map(str, missing[:8])) + (", ..." if len(missing) > 8 else "")
    return (
        f"{world.source} announced {world.world_size} ranks, but {len(missing)} did not come within {seconds:g} s: "
        f"rank {some}.\nLook for their messages above, or for a host that cannot reach "
        f"{world.master_address}:{world.master_port}; DPT_HPC_JOIN_SECONDS waits longer."
    )


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0].rstrip(".")
