"""Loading: structures per second from flat shards, one HDF5 group per structure, and JSON; the memory of each store;
a training run whose dataset is twice its memory limit.

python benchmarks/loading.py DATASET [--out benchmarks/results/loading.json]

DATASET: a directory that `dpt-hpc ingest` wrote, with 5,000 structures or more. One core's time, warm cache. Every
implementation makes the same batches: 50 structures in random order, float32 tensors with all labels.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import torch
from measuring import OUTPUT, facts, in_turn, reset_peak, resident, write

from dpt_hpc.data.group import ALONE
from dpt_hpc.data.loader import Loader, Step
from dpt_hpc.data.manifest import Manifest
from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.store_choice import StoreKind, open_store
from dpt_hpc.data.writing import write_dataset
from dpt_hpc.structure import Batch, Structure

STRUCTURES = 5000
BATCH = 50
WINDOW = 4096
COPIES = (8, 64)
"""Datasets of which the memory is measured: so many copies of the 5,000 structures."""
STEPS = 100
LIMIT = 400 << 20
"""Bytes of the memory limit under which a dataset of twice the size trains."""


def flat(structure: Structure) -> dict[str, Any]:
    """One structure as plain arrays."""
    arrays = {name: getattr(structure, name).numpy() for name in ("positions", "cell", "pbc", "atomic_numbers")}
    labels = {name: getattr(structure, name) for name in ("forces", "stress")}
    arrays |= {name: value.numpy() for name, value in labels.items() if value is not None}
    return arrays | ({} if structure.energy is None else {"energy": structure.energy})


def structure_of(arrays: Any, read: Callable[[Any], Any]) -> Structure:
    """The inverse of `flat`; read: makes an array of a stored value."""

    def tensor(name: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
        return torch.as_tensor(read(arrays[name]), dtype=dtype)

    return Structure(
        tensor("positions"),
        tensor("cell"),
        tensor("pbc", torch.bool),
        tensor("atomic_numbers", torch.int64),
        energy=float(read(arrays["energy"])) if "energy" in arrays else None,
        forces=tensor("forces") if "forces" in arrays else None,
        stress=tensor("stress") if "stress" in arrays else None,
    )


def order() -> np.ndarray:
    return np.random.default_rng(0).permutation(STRUCTURES).reshape(-1, BATCH)


def from_groups(path: Path) -> Iterator[Batch]:
    """One HDF5 group per structure: the file stays open."""
    with h5py.File(path) as file:
        for indices in order():
            yield Batch.from_structures([structure_of(file[str(i)], lambda stored: stored[()]) for i in indices])


def from_json(path: Path) -> Iterator[Batch]:
    """A list of structures in one file."""
    stored = json.loads(path.read_text())
    items = [structure_of(one, np.asarray) for one in stored]
    for indices in order():
        yield Batch.from_structures([items[i] for i in indices])


def from_store(path: Path, kind: StoreKind) -> Iterator[Batch]:
    """This project's, opening and (node) filling the store included; hashes are checked once per run, not here."""
    dataset = Dataset.open(path, verify=False)
    layout = dataset.layout(torch.float32, None)
    steps = [Step(k, [[indices]]) for k, indices in enumerate(order())]
    with (
        open_store(dataset, layout, kind, 0.5, everyone=ALONE, node=ALONE, node_rank=0) as store,
        Loader(store, [steps]) as loader,
    ):
        for _, (batch,) in loader:
            yield batch


def measure_speed(directory: Path, repeats: int) -> dict[str, Any]:
    """Structures of one epoch per second of processor time, that of all threads together: what one core does."""
    readers: dict[str, Callable[[], Iterator[Batch]]] = {
        "flat shards, disk": lambda: from_store(directory / "flat", "disk"),
        "flat shards, node": lambda: from_store(directory / "flat", "node"),
        "one HDF5 group per structure": lambda: from_groups(directory / "groups.h5"),
        "JSON": lambda: from_json(directory / "list.json"),
    }
    sums = {name: sum(float(b.forces.double().abs().sum()) for b in read()) for name, read in readers.items()}
    assert len({round(value, 3) for value in sums.values()}) == 1, sums

    def whole(read: Callable[[], Iterator[Batch]]) -> Callable[[], int]:
        return lambda: sum(batch.num_structures for batch in read())

    runs = {name: whole(read) for name, read in readers.items()}
    processor = in_turn(runs, repeats, time.process_time)
    found: dict[str, Any] = {name: round(STRUCTURES / seconds) for name, seconds in processor.items()}
    disk = processor["flat shards, disk"]
    found["disk over one group per structure"] = round(processor["one HDF5 group per structure"] / disk, 1)
    found["disk over JSON"] = round(processor["JSON"] / disk, 1)
    return found


def multiply(source: Path, out: Path, copies: int) -> int:
    """A dataset of many copies of another's shards; the bytes of its shards."""
    manifest = Manifest.read(source)
    out.mkdir()
    shards = []
    for _ in range(copies):
        for shard in manifest.shards:
            name = f"shard_{len(shards):05d}.h5"
            shutil.copyfile(source / shard.file, out / name)
            shards.append(replace(shard, file=name))
    counts = {"num_structures": manifest.num_structures * copies, "num_atoms": manifest.num_atoms * copies}
    replace(manifest, shards=tuple(shards), **counts).write(out)
    return sum(shard.num_bytes for shard in shards)


def epoch_in_memory(path: str, kind: StoreKind) -> dict[str, Any]:
    """Peak of resident memory over what a process has before it opens the dataset, and the epoch's speed."""
    before = reset_peak()
    dataset = Dataset.open(path, verify=False)
    sampler = Sampler(np.arange(len(dataset)), dataset.edge_estimate, BATCH, 0, window=WINDOW)
    windows = ([Step(k, sampler.parts(1, k, 1, 1)) for k in window] for window in sampler.windows())
    began = time.process_time()
    seen = 0
    with (
        open_store(
            dataset,
            dataset.layout(torch.float32, None),
            kind,
            0.5,
            everyone=ALONE,
            node=ALONE,
            node_rank=0,
        ) as store,
        Loader(store, windows) as loader,
    ):
        for _, (batch,) in loader:
            seen += batch.num_structures
    seconds = time.process_time() - began
    assert seen == len(dataset)
    return {
        "structures": seen,
        "peak_mb": round((resident("VmHWM") - before) / 1e6, 1),
        "structures_per_second": round(seen / seconds),
    }


def train_under_limit(path: str) -> dict[str, Any]:
    """Everything that comes before the first step, which looks at every training structure, and some steps."""
    from dpt_hpc.data.shared_memory import free_memory
    from dpt_hpc.errors import EnvironmentFault
    from dpt_hpc.train.config import PretrainConfig
    from dpt_hpc.train.config_file import check_config
    from dpt_hpc.train.data import store_for
    from dpt_hpc.train.pretrain import prepare
    from dpt_hpc.train.ranks import Ranks

    options = {
        "run_dir": str(Path(path).with_name("run")),
        "data": {
            "path": path,
            "shuffle_window": WINDOW,
            "split": {"train": 0.98, "validation": 0.01, "test": 0.01, "by": "structure"},
        },
        "model": {"name": "cgcnn", "cutoff": 3.0, "hidden": 16, "layers": 1, "gaussians": 8, "readout_hidden": 8},
        "training": {"batch_size": BATCH},
    }
    config = check_config(options, PretrainConfig, "loading.py")
    began = time.monotonic()
    run, dataset, split, model = prepare(config, Ranks(), quiet=True)
    found: dict[str, Any] = {"structures": len(dataset), "free_mb": round(free_memory() / 1e6)}
    try:
        store_for(dataset, config.data.model_copy(update={"store": "node"}), torch.float64, None, Ranks())
    except EnvironmentFault as refusal:
        found["store=node"] = "refused: " + str(refusal).splitlines()[0]
    trainer = run.trainer(dataset, split, model, {})
    found |= {"store=auto": trainer.data.store.kind, "ready_after_s": round(time.monotonic() - began, 1)}
    trainer.objective.train()
    losses = []
    with trainer.load() as loader:
        for step, batches in loader:
            losses.append(trainer.objective.loss_of(trainer.train_step(step, batches)[0]))
            if len(losses) == STEPS:
                break
    first, last = (round(float(np.mean(part)), 3) for part in (losses[:20], losses[-20:]))
    return found | {"steps": len(losses), "loss_of_first_20": first, "loss_of_last_20": last}


CHILDREN: dict[str, Callable[..., dict[str, Any]]] = {"epoch": epoch_in_memory, "train": train_under_limit}


def in_child(name: str, *arguments: str, cgroup: Path | None = None) -> dict[str, Any]:
    """What one of CHILDREN returns, called in a process of its own, inside `cgroup`."""
    words = [sys.executable, __file__, "--child", name, *arguments]

    def enter() -> None:
        if cgroup is not None:
            (cgroup / "cgroup.procs").write_text(str(os.getpid()))

    done = subprocess.run(words, preexec_fn=enter, capture_output=True, text=True, check=False)
    if done.returncode:
        return {"failed": done.stderr.splitlines()[-1:] or f"exit code {done.returncode}"}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def memory_cgroup(limit: int) -> Path:
    """A new cgroup with that memory limit; needs to be root, and cgroups that may be written."""
    root = Path("/sys/fs/cgroup")
    old = (root / "memory").is_dir()
    group = (root / "memory" if old else root) / f"dpt-hpc-{os.getpid()}"
    group.mkdir()
    (group / ("memory.limit_in_bytes" if old else "memory.max")).write_text(str(limit))
    return group


def measure_limit(directory: Path, source: Path) -> dict[str, Any]:
    """A dataset of twice the memory limit, trained on under that limit."""
    one = sum(shard.num_bytes for shard in Manifest.read(source).shards)
    num_bytes = multiply(source, directory / "large", -(-2 * LIMIT // one))
    try:
        cgroup = memory_cgroup(LIMIT)
    except OSError as error:
        return {"skipped": f"no cgroup can be made here: {error}"}
    try:
        found = in_child("train", str(directory / "large"), cgroup=cgroup)
        peak = next(p for p in (cgroup / "memory.max_usage_in_bytes", cgroup / "memory.peak") if p.exists())
        return {
            "limit_mb": round(LIMIT / 1e6),
            "dataset_mb": round(num_bytes / 1e6),
            **found,
            "peak_of_cgroup_mb": round(int(peak.read_text()) / 1e6),
        }
    finally:
        cgroup.rmdir()


def main(arguments: Sequence[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--out", type=Path, default=OUTPUT / "loading.json")
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    result: dict[str, Any] = {"facts": facts(), "batch": BATCH, "structures": STRUCTURES, "window": WINDOW}
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        dataset = Dataset.open(options.dataset)
        if len(dataset) < STRUCTURES:
            parser.error(f"{options.dataset} has {len(dataset)} structures, expected {STRUCTURES} or more")
        items = [replace(dataset.get(i), properties={}) for i in range(STRUCTURES)]
        result["atoms"] = sum(item.num_atoms for item in items)
        write_dataset(items, directory / "flat", provenance={})
        with h5py.File(directory / "groups.h5", "w") as file:
            for i, item in enumerate(items):
                file.create_group(str(i)).update(flat(item))
        plain = [{k: v.tolist() if isinstance(v, np.ndarray) else v for k, v in flat(item).items()} for item in items]
        (directory / "list.json").write_text(json.dumps(plain))
        del items, plain
        result["speed"] = measure_speed(directory, options.repeats)
        write(options.out, result)
        print(json.dumps(result["speed"], indent=1), flush=True)
        sizes: dict[str, Any] = {}
        for copies in (1, *COPIES):
            path = directory / f"times_{copies}"
            num_bytes = multiply(directory / "flat", path, copies)
            kinds = {kind: in_child("epoch", str(path), kind) for kind in ("disk", "node")}
            sizes[f"{copies * STRUCTURES} structures"] = {"dataset_mb": round(num_bytes / 1e6, 1), **kinds}
            shutil.rmtree(path)
        result["memory"] = sizes
        write(options.out, result)
        print(json.dumps(sizes, indent=1), flush=True)
        result["limit"] = measure_limit(directory, directory / "flat")
        write(options.out, result)
        print(json.dumps(result["limit"], indent=1), flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        torch.set_num_threads(1)
        print(json.dumps(CHILDREN[sys.argv[2]](*sys.argv[3:])))
    else:
        main(sys.argv[1:])
