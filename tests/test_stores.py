"""Stores: wherever structures are kept, batches are the same; what cannot be kept is refused before the first step."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
import torch
from groups import ThreadRank, on_ranks, refused
from test_shards import structures, written

from dpt_hpc.data import shared_memory, store_cluster
from dpt_hpc.data.group import ALONE
from dpt_hpc.data.loader import Loader, Step, in_windows
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.store import DiskStore, Store
from dpt_hpc.data.store_choice import choose_store, open_store
from dpt_hpc.data.store_node import NodeStore, size_of
from dpt_hpc.errors import DataError, EnvironmentFault
from dpt_hpc.structure import Batch


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """200 structures in 13 shards, some without some label, and a second property."""
    return written(tmp_path_factory.mktemp("stores") / "small", structures(200, seed=3), shard_atoms=100)


def same(one: Batch, other: Batch) -> None:
    for field in fields(Batch):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a.dtype == b.dtype
        assert torch.equal(a, b), field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("target", ["gap", None])
def test_every_store_gives_the_batch_of_its_structures(small: Path, dtype: torch.dtype, target: str | None) -> None:
    dataset = Dataset.open(small)
    layout = dataset.layout(dtype, target)
    items = structures(200, seed=3)
    stores: list[Store] = [DiskStore(dataset, layout), NodeStore(dataset, layout, ALONE)]
    for order in (np.random.default_rng(0).permutation(200)[:30], np.arange(199, 150, -3), np.array([7])):
        expected = Batch.from_structures([items[i] for i in order], dtype=dtype, target=target)
        expected = replace(expected, structure_index=torch.from_numpy(order))
        for store in stores:
            same(store.read(order), expected)
        same(dataset.read(order, dtype=dtype, target=target), expected)
    for store in stores:
        assert store.read(np.empty(0, dtype=np.int64)).num_structures == 0


@pytest.fixture
def own_shared_memory(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder in /dev/shm into which no other process writes."""
    with TemporaryDirectory(dir=shared_memory.SHARED) as folder:
        monkeypatch.setattr(shared_memory, "SHARED", Path(folder))
        yield Path(folder)


def test_two_ranks_of_a_node_fill_and_read_one_copy(small: Path, own_shared_memory: Path) -> None:

    def work(node: ThreadRank) -> tuple[Batch, int]:
        dataset = Dataset.open(small, node=node)
        store = open_store(
            dataset, dataset.layout(torch.float64, "gap"), "node", 0.5, everyone=node, node=node, node_rank=0
        )
        held = store.fetch(np.arange(3))
        node.all_gather(None)
        if node.rank == 0:
            held.atoms["positions"][0] = 42.0
        node.all_gather(None)
        return store.read(np.arange(200)), len(os.listdir(own_shared_memory))

    expected = Dataset.open(small).read(np.arange(200), dtype=torch.float64, target="gap")
    expected.positions[0] = 42.0
    for result in on_ranks(2, work):
        assert not isinstance(result, BaseException), result
        batch, left = result
        same(batch, expected)
        assert left == 0


def in_thirds(count: int, rank: int) -> list[list[Step]]:
    """`count` structures in random order: windows of 3 steps of 2 micro-batches on 2 ranks, 5 structures each."""
    order = np.random.default_rng(1).permutation(count).reshape(-1, 2, 2, 5)
    steps = [Step(k, [list(micro) for micro in parts], rank) for k, parts in enumerate(order)]
    return [steps[k : k + 3] for k in range(0, len(steps), 3)]


def test_the_loader_gives_this_ranks_batches_in_order(small: Path) -> None:
    dataset = Dataset.open(small)
    store = DiskStore(dataset, dataset.layout(torch.float32, "gap"))
    for rank in (0, 1):
        steps = [step for window in in_thirds(200, rank) for step in window]
        with Loader(store, in_thirds(200, rank)) as loader:
            loaded = list(loader)
        assert [step.number for step, _ in loaded] == list(range(10))
        for step, (_, batches) in zip(steps, loaded, strict=True):
            for of_ranks, batch in zip(step.parts, batches, strict=True):
                same(batch, dataset.read(of_ranks[rank], target="gap"))


class Watched(DiskStore):
    """Counts how many fetched tables are alive."""

    alive = 0
    most = 0

    def fetch(self, indices: np.ndarray) -> object:  # type: ignore[override]
        tables = super().fetch(indices)
        type(self).alive += 1
        type(self).most = max(self.most, self.alive)
        weakref.finalize(tables, self._gone)
        return tables

    @classmethod
    def _gone(cls) -> None:
        cls.alive -= 1


def test_no_more_than_two_windows_are_in_memory(small: Path) -> None:
    dataset = Dataset.open(small)
    store = Watched(dataset, dataset.layout(torch.float32, None))
    seen = 0
    with Loader(store, in_windows(np.arange(200), 2, 40)) as loader:
        for _, (batch,) in loader:
            seen += batch.num_structures
            time.sleep(0.005)
    assert (seen, Watched.most) == (200, 2)


class Late(DiskStore):
    """Has nothing before somebody has waited for it."""

    def fetch(self, indices: np.ndarray) -> object:  # type: ignore[override]
        time.sleep(LATE)
        return super().fetch(indices)


LATE = 0.2


def test_waiting_is_for_what_is_not_there_yet(small: Path) -> None:
    dataset = Dataset.open(small)
    with Loader(Late(dataset, dataset.layout(torch.float32, None)), in_windows(np.arange(40), 20, 20)) as loader:
        next(batches := iter(loader))
        assert loader.waited >= LATE
        time.sleep(10 * LATE)  # the second window comes meanwhile
        before = loader.waited
        next(batches)
        assert loader.waited - before < LATE


def test_an_error_in_the_background_is_raised_where_the_batch_is_asked_for(small: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(small, tmp_path / "copy"))
    dataset = Dataset.open(copy)
    store = DiskStore(dataset, dataset.layout(torch.float32, None))
    dataset.files.close()
    (copy / "shard_00009.h5").unlink()
    loader = Loader(store, in_windows(np.arange(200), 5, 20))
    batches = iter(loader)
    next(batches)
    with pytest.raises(DataError, match=r"shard .*shard_00009.h5: cannot be read: .*No such file"):
        list(batches)


def test_a_loader_that_is_left_early_ends_its_threads(small: Path) -> None:
    dataset = Dataset.open(small)
    before = threading.active_count()
    with Loader(DiskStore(dataset, dataset.layout(torch.float32, None)), in_windows(np.arange(200), 2, 10)) as loader:
        next(iter(loader))
        assert threading.active_count() == before + 2
    assert threading.active_count() == before


def test_a_full_dev_shm_is_refused_on_every_rank_before_anything_is_read(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is free is what the machine says; what is asked to stay free is more."""
    monkeypatch.setattr(shared_memory, "KEEP_FREE", 1 << 60)

    def work(node: ThreadRank) -> Store:
        dataset = Dataset.open(small, node=node)
        return open_store(
            dataset, dataset.layout(torch.float32, None), "node", 0.5, everyone=node, node=node, node_rank=0
        )

    message = (
        r"shared memory /dev/shm: [\d.]+ GB are free, but a dataset of 200 structures takes .*\nSet data.store=disk"
    )
    refused(on_ranks(2, work), EnvironmentFault, message)


def test_more_than_the_memory_is_refused(small: Path) -> None:
    with pytest.raises(EnvironmentFault, match=r"memory: .* GB are free on this node, but all takes 1.15e\+09 GB"):
        shared_memory.shared_bytes(1 << 60, ALONE, "all")
    found = on_ranks(2, lambda node: shared_memory.shared_bytes(1 << 60, node, "all"))
    refused(found, EnvironmentFault, "but all takes")


def test_the_store_is_chosen_by_size_and_every_rank_chooses_the_same(
    small: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Dataset.open(small)
    layout = dataset.layout(torch.float32, None)
    size = shared_memory_of(dataset)

    def choose(memory: float) -> Callable[[ThreadRank], str]:
        return lambda node: choose_store(dataset, layout, memory, node, node)

    assert choose_store(dataset, layout, 0.5, ALONE, ALONE) == "node"
    assert on_ranks(2, choose(0.5)) == ["node", "node"]
    assert on_ranks(2, choose(1e-15)) == ["disk", "disk"]
    monkeypatch.setattr("dpt_hpc.data.store_choice.free_memory", lambda: size - 1)
    assert on_ranks(2, choose(1.0)) == ["disk", "disk"]
    monkeypatch.setattr("dpt_hpc.data.store_choice.mpi_missing", lambda size: None)
    # Each rank a node of its own, of which half the dataset fits into one.
    assert on_ranks(2, lambda node: choose_store(dataset, layout, 1.0, node, ALONE)) == ["cluster", "cluster"]


def test_auto_does_not_take_more_than_ulimit_leaves(small: Path) -> None:
    """And what does not fit after all, other than it was computed, is read from disk with a warning."""
    program = (
        "import resource, sys, torch\n"
        "from dpt_hpc.data import store_choice, store_node\n"
        "from dpt_hpc.data.group import ALONE\n"
        "from dpt_hpc.data.shards import Dataset\n"
        "from dpt_hpc.data.shared_memory import status_bytes\n"
        "dataset = Dataset.open(sys.argv[1])\n"
        "layout = dataset.layout(torch.float32, None)\n"
        "def kind(memory):\n"
        "    return store_choice.open_store(\n"
        "        dataset, layout, 'auto', memory, everyone=ALONE, node=ALONE, node_rank=0\n"
        "    ).kind\n"
        "print(kind(1.0))\n"
        "resource.setrlimit(resource.RLIMIT_AS, (status_bytes('VmSize') + 200_000_000,) * 2)\n"
        "store_choice.size_of = store_node.size_of = lambda *arguments: (400_000_000, 0)\n"
        "print(kind(1.0))\n"
        "store_choice.free_memory = lambda: 10**9\n"
        "print(kind(1.0))\n"
    )
    done = subprocess.run([sys.executable, "-c", program, str(small)], capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["node", "disk", "disk"], done.stderr
    assert re.fullmatch(
        r"warning: data.store is auto, took node, and now reads from disk: memory: a dataset of 200 structures takes "
        r"0.4 GB, more than this process may have.\n.*\n",
        done.stderr,
    )


def shared_memory_of(dataset: Dataset) -> int:
    return size_of(dataset, dataset.layout(torch.float32, None), range(len(dataset)))[0]


def test_the_cluster_store_without_mpi_is_refused_with_the_reason(small: Path) -> None:
    """As under srun --mpi=none: MPI_Init would make worlds of one, or abort."""
    program = (
        "import torch, sys\n"
        "from dpt_hpc.data.shards import Dataset\n"
        "from dpt_hpc.data.store_choice import open_store\n"
        "from groups import on_ranks\n"
        "dataset = Dataset.open(sys.argv[1])\n"
        "def work(node):\n"
        "    layout = dataset.layout(torch.float32, None)\n"
        "    return open_store(dataset, layout, 'cluster', 0.5, everyone=node, node=node, node_rank=0)\n"
        "for error in on_ranks(2, work):\n"
        "    print(type(error).__name__, error)\n"
    )
    mpi = {name: value for name, value in os.environ.items() if not name.startswith(("PMI", "OMPI"))}
    words = [sys.executable, "-c", program, str(small)]
    done = subprocess.run(
        words, env=mpi | {"PYTHONPATH": str(Path(__file__).parent)}, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("EnvironmentFault data.store is cluster, but ") == 2, done.stdout
    assert "its own launcher did not start this rank" in done.stdout or "cannot be loaded" in done.stdout


def test_many_ranks_that_read_from_disk_are_told_what_it_costs(small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    dataset = Dataset.open(small)

    def opened(size: int) -> str:
        everyone = ThreadRank(0, [None] * size, threading.Barrier(1))
        layout = dataset.layout(torch.float32, None)
        open_store(dataset, layout, "disk", 0.5, everyone=everyone, node=ALONE, node_rank=0)
        return capsys.readouterr().err

    assert opened(63) == ""
    told = (
        "data.store is disk, with 64 ranks: each reads almost structure by structure.\nTake enough nodes for data.store"
    )
    assert told in opened(64)


def test_no_rank_starts_mpi_before_all_have_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """MPI_Init would wait for the one that has refused."""
    here = threading.local()

    def work(everyone: ThreadRank) -> None:
        here.rank = everyone.rank
        store_cluster.check_mpi(everyone)

    started: list[int] = []
    monkeypatch.setattr(store_cluster, "mpi_missing", lambda size: "mpi4py is not here" if here.rank == 1 else None)
    monkeypatch.setattr(store_cluster, "_connect", lambda everyone: started.append(everyone.rank))
    refused(on_ranks(2, work), EnvironmentFault, r"data\.store is cluster, but mpi4py is not here\.\nStart with mpirun")
    assert started == []
