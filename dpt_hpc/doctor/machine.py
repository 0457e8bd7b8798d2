"""The software and the machine: versions, build, ranks and their places, memory, start-up."""

from __future__ import annotations

import os
import sys
import time
from importlib import metadata
from pathlib import Path

import torch

from dpt_hpc import __version__
from dpt_hpc.data.shared_memory import free_memory, free_shared_memory
from dpt_hpc.doctor.finding import Finding, ok
from dpt_hpc.ops import NATIVE_DEVICES
from dpt_hpc.train.config import RunConfig
from dpt_hpc.train.engine import choose_device
from dpt_hpc.train.ranks import Ranks

PACKAGES = ("torch", "numpy", "h5py", "deepspeed", "mpi4py", "pydantic", "safetensors")
SLOW_START = 60.0
"""Seconds. Python's thousands of small files on a parallel file system can take minutes."""
LITTLE_MEMORY = 2e9
"""Bytes of a rank: Python, torch and DeepSpeed alone take half of it."""


def versions(ranks: Ranks) -> Finding:
    """Of the packages, the same on every rank."""
    found = {"python": sys.version.split()[0], "dpt-hpc": __version__}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "missing"
    told = ", ".join(f"{name} {version}" for name, version in found.items())
    for rank, other in enumerate(ranks.all_gather(found)):
        differing = [name for name in found if other[name] != found[name]]
        if differing:
            pairs = ", ".join(f"{n} {found[n]} here, {other[n]} on rank {rank}" for n in differing)
            return Finding("versions", "bad", pairs, "Start every rank from the same environment.", found)
    if ranks.size > 1 and found["deepspeed"] == "missing":
        return Finding("versions", "bad", told, "Several ranks need DeepSpeed: pip install deepspeed.", found)
    return ok("versions", told, **found)


def build(ranks: Ranks) -> Finding:
    """What the compiled kernels serve, beside what this torch serves."""
    figures = {
        "kernels": list(NATIVE_DEVICES),
        "torch_cuda": torch.version.cuda,
        "gpus": torch.cuda.device_count(),
        "openmp": torch.backends.openmp.is_available(),
        "mkl": torch.backends.mkl.is_available(),
    }
    said = (
        f"kernels for {' and '.join(NATIVE_DEVICES)}; torch for "
        + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "the CPU")
        + f", OpenMP {'on' if figures['openmp'] else 'off'}, MKL {'on' if figures['mkl'] else 'off'}"
    )
    if torch.cuda.is_available() and "cuda" not in NATIVE_DEVICES:
        todo = "Install dpt_hpc where nvcc is found, or it trains on the CPU beside idle GPUs."
        return Finding("build", "warn", f"{said}, and a GPU is there", todo, figures)
    return ok("build", said, **figures)


def placement(config: RunConfig, ranks: Ranks) -> Finding:
    """Who runs where: ranks, nodes, devices, cores. Two ranks on one GPU, or on too few cores, are no start."""
    device = choose_device(config.engine, ranks.world)
    cores = sorted(os.sched_getaffinity(0))
    gpu = (
        str(getattr(torch.cuda.get_device_properties(device), "uuid", device.index)) if device.type == "cuda" else None
    )
    mine = {"rank": ranks.rank, "node": ranks.world.node, "device": str(device), "gpu": gpu, "cores": cores}
    everyone = ranks.all_gather({**mine, "threads": torch.get_num_threads()})
    nodes = list(dict.fromkeys(e["node"] for e in everyone))
    said = (
        f"{ranks.size} rank(s) on {len(nodes)} node(s) by {ranks.world.source}; {device.type}, "
        f"{len(cores)} core(s) and {torch.get_num_threads()} thread(s) each"
    )
    figures = {"ranks": everyone}
    for node in nodes:
        here = [e for e in everyone if e["node"] == node]
        gpus = [e["gpu"] for e in here if e["gpu"]]
        twice = next((g for g in gpus if gpus.count(g) > 1), None)
        if twice is not None:
            sharing = ", ".join(str(e["rank"]) for e in here if e["gpu"] == twice)
            todo = "Start as many ranks per node as it has GPUs."
            return Finding("placement", "bad", f"{said}; ranks {sharing} share a GPU of {node}", todo, figures)
        have = {core for e in here for core in e["cores"]}
        if device.type == "cpu" and len(have) < len(here):
            todo = "Ask for more cores per rank (Slurm: --cpus-per-task; Open MPI: --bind-to none), or start fewer."
            lacking = f"{len(here)} ranks of {node} have {len(have)} core(s) between them"
            return Finding("placement", "warn", f"{said}; {lacking}", todo, figures)
        threads = sum(e["threads"] for e in here)
        if device.type == "cpu" and threads > len(have):
            todo = f"Set OMP_NUM_THREADS={max(len(have) // len(here), 1)}."
            crowded = f"{threads} threads on {len(have)} core(s) of {node}"
            return Finding("placement", "warn", f"{said}; {crowded}", todo, figures)
    return ok("placement", said, **figures)


def memory(ranks: Ranks) -> Finding:
    """What a rank may use: the node's free memory, or its cgroup's, divided by the ranks of the node."""
    free, room = free_memory() / ranks.world.local_world_size, free_shared_memory()
    said = f"{free / 1e9:.1f} GB free for each rank of a node, {room / 1e9:.1f} GB of shared memory"
    if free < LITTLE_MEMORY:
        todo = "Ask for more memory per rank (Slurm: --mem-per-cpu), or set training.edge_budget."
        return Finding("memory", "warn", f"{said}: little", todo, {"free": free, "shared": room})
    return ok("memory", said, free=free, shared=room)


def start_up(ranks: Ranks) -> Finding:
    """Seconds from the start of the slowest rank's process to here."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    ticks = float(fields[19]) / os.sysconf("SC_CLK_TCK")
    seconds = max(ranks.all_gather(time.clock_gettime(time.CLOCK_BOOTTIME) - ticks))
    said = f"{seconds:.1f} s from the start of the slowest rank until all had met"
    if seconds > SLOW_START:
        todo = "Put the environment on the nodes' own disk, or into one image file (squashfs, Apptainer)."
        return Finding("start-up", "warn", said, todo, {"seconds": seconds})
    return ok("start-up", said, seconds=seconds)
