"""Memory that all ranks of a node share: a file in /dev/shm that loses its name before anything is written into it.

So nothing is left behind, however the ranks end, and no MPI is needed.
"""

from __future__ import annotations

import errno
import mmap
import os
import resource
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.data.group import Group, agree
from dpt_hpc.errors import EnvironmentFault

SHARED = Path("/dev/shm")
CGROUP = Path("/sys/fs/cgroup")
KEEP_FREE = 16 << 20
"""Bytes of /dev/shm that stay free: gloo, NCCL and torch need some too."""


def shared_bytes(size: int, node: Group, purpose: str) -> NDArray[np.uint8]:
    """`size` bytes of zeros that all ranks of `node` read and write; plain memory where there is one rank alone.

    Raises EnvironmentFault, on every rank, if there is not enough memory; purpose: what it was for, told then.
    """
    if node.size == 1:
        try:
            _check_memory(size, purpose)
            return np.zeros(size, dtype=np.uint8)
        except MemoryError:
            raise _above_the_limit(size, purpose) from None
    path = node.all_gather(agree(node, lambda: _create(size, purpose) if node.rank == 0 else None))[0]
    mapped = _map(path, size, node)
    if node.rank == 0:
        path.unlink()
    # The file is sparse up to here: writing into it could end in SIGBUS. Now every page is there, or an error.
    agree(node, lambda: _allocate(mapped, size, purpose) if node.rank == 0 else None)
    os.close(mapped.file)
    return np.frombuffer(mapped.memory, dtype=np.uint8, count=size)


def shared_or_own(size: int, node: Group, purpose: str) -> tuple[NDArray[np.uint8], bool]:
    """`size` bytes of zeros, and whether all ranks of `node` have the same ones; else each has its own."""
    try:
        return shared_bytes(size, node, purpose), node.size > 1
    except EnvironmentFault:  # on all of them: for what is small beside the dataset there is another way
        return np.zeros(size, dtype=np.uint8), False


def kept_once(size: int, node: Group, fill: Callable[[NDArray[np.int64]], None]) -> NDArray[np.int64]:
    """(size,) numbers in memory that the ranks of `node` share, written there by `fill` on its rank 0; where they
    cannot share, by each into its own. Not to be written to afterwards."""
    held, shared = shared_or_own(8 * size, node, f"{size} numbers")
    values = held.view(np.int64)

    def work() -> None:
        if node.rank == 0 or not shared:
            fill(values)

    agree(node, work)  # nobody reads before it is there
    values.flags.writeable = False
    return values


OTHER_STORE = "Set data.store=disk (or auto), take more nodes with data.store=cluster, or ask for more memory."


class _Mapping:
    def __init__(self, path: Path, size: int) -> None:
        with path.open("r+b") as file:
            self.file = os.dup(file.fileno())
            self.memory = mmap.mmap(file.fileno(), max(size, 1))


def _create(size: int, purpose: str) -> Path:
    """A new file of that size, without memory behind it yet."""
    _check_memory(size, purpose)
    try:
        free = os.statvfs(SHARED)
        space = free.f_bavail * free.f_frsize
    except OSError as error:
        raise EnvironmentFault(f"shared memory {SHARED}: cannot be used: {error}.\n{OTHER_STORE}") from None
    if size + KEEP_FREE > space:
        raise _full(size, space, purpose)
    path = SHARED / f"dpt_hpc-{uuid.uuid4().hex}"
    try:
        with path.open("xb") as file:
            file.truncate(max(size, 1))
    except OSError as error:
        raise EnvironmentFault(f"shared memory {path}: cannot be made: {error}.\n{OTHER_STORE}") from None
    return path


def _map(path: Path, size: int, node: Group) -> _Mapping:
    mapped: list[_Mapping] = []

    def work() -> None:
        try:
            mapped.append(_Mapping(path, size))
        except OSError as error:
            raise EnvironmentFault(
                f"shared memory {path}: made by local rank 0, but cannot be mapped: {error}.\n"
                "The ranks of a node must share /dev/shm (in a container: --ipc=host), else set data.store=disk."
            ) from None

    try:
        agree(node, work)
    except BaseException:
        if node.rank == 0:
            path.unlink()
        raise
    return mapped[0]


def _allocate(mapped: _Mapping, size: int, purpose: str) -> None:
    try:
        os.posix_fallocate(mapped.file, 0, max(size, 1))
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.ENOMEM):
            raise EnvironmentFault(f"shared memory {SHARED}: {error}.\n{OTHER_STORE}") from None
        free = os.statvfs(SHARED)
        raise _full(size, free.f_bavail * free.f_frsize, purpose) from None


def _check_memory(size: int, purpose: str) -> None:
    if size > min(_rooms_of_this_process(), default=size):
        raise _above_the_limit(size, purpose)
    # Linux would promise the memory all the same, and kill somebody later.
    if size > (free := free_memory()):
        raise EnvironmentFault(
            f"memory: {free / 1e9:.3g} GB are free on this node, but {purpose} takes {size / 1e9:.3g} GB.\n"
            f"{OTHER_STORE}"
        )


def _above_the_limit(size: int, purpose: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"memory: {purpose} takes {size / 1e9:.3g} GB, more than this process may have.\n{OTHER_STORE}"
    )


def _full(size: int, space: int, purpose: str) -> EnvironmentFault:
    return EnvironmentFault(
        f"shared memory {SHARED}: {space / 1e9:.3g} GB are free, but {purpose} takes {size / 1e9:.3g} GB.\n"
        f"{OTHER_STORE} /dev/shm grows with `mount -o remount,size=... /dev/shm`, in a container with --shm-size."
    )


def free_shared_memory() -> int:
    """Bytes that /dev/shm still takes; 0 where there is none."""
    try:
        free = os.statvfs(SHARED)
    except OSError:
        return 0
    return max(int(free.f_bavail * free.f_frsize) - KEEP_FREE, 0)


def free_memory(processes: int = 1) -> int:
    """Bytes that this process can still take: of its node, or of the job's share of it (its cgroup), divided by the
    `processes` that take as much there; and of what `ulimit` lets each have."""
    words = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    free = next(int(line[1]) * 1024 for line in words if line[0] == "MemAvailable:")
    return min([min([free, *_cgroup_rooms()]) // processes, *_rooms_of_this_process()])


def status_bytes(field: str) -> int:
    """Bytes, from what Linux says of this process in a field such as VmRSS; 0 if it does not say."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    return 0


def _rooms_of_this_process() -> list[int]:
    """What the limits of its address space and of its data (ulimit -v and -d) leave."""
    limits = ((resource.RLIMIT_AS, "VmSize"), (resource.RLIMIT_DATA, "VmData"))
    set_ones = [(resource.getrlimit(kind)[0], field) for kind, field in limits]
    return [max(most - status_bytes(field), 0) for most, field in set_ones if most != resource.RLIM_INFINITY]


def _cgroup_rooms() -> list[int]:
    """What the memory limits of this process's cgroup, and of those around it, leave."""
    rooms = []
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, name = line.split(":", 2)
        if controllers not in ("", "memory"):
            continue
        root = CGROUP / controllers
        limit, used = (
            ("memory.limit_in_bytes", "memory.usage_in_bytes") if controllers else ("memory.max", "memory.current")
        )
        inner = root / name.lstrip("/")
        for place in (inner, *inner.parents):
            if not place.is_relative_to(root):
                break
            try:
                bound = int((place / limit).read_text())
                stat = dict(row.split() for row in (place / "memory.stat").read_text().splitlines())
                # Pages of files that nobody looks at are given back when they are needed.
                cached = int(stat.get("total_inactive_file", stat.get("inactive_file", 0)))
                rooms.append(max(bound - int((place / used).read_text()) + cached, 0))
            except (OSError, ValueError):
                continue  # no such file, or "max": no limit at this level
    return rooms
