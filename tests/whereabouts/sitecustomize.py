"""Found by each rank's Python before it begins, with this folder in PYTHONPATH: where the rank is, seen from outside
and left as it was when the rank is killed.

A file RANK in the folder DPT_HPC_WHEREABOUTS has a byte for each of PLACES: how many threads are there. The disk is
made slow, so that a checkpoint and the loading of data take long enough to be hit.
"""

from __future__ import annotations

import importlib.abc
import importlib.util
import mmap
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

PLACES = ("step", "checkpoint", "loading")
SLOW_DISK = 0.05
LATEST = "dpt_hpc.train.loop"
"""With it everything that is watched is loaded."""


class Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != LATEST:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None
        assert spec.loader is not None
        load = spec.loader.exec_module

        def exec_module(module: Any) -> None:
            load(module)
            watch()

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def watch() -> None:
    from dpt_hpc.data import store, store_cluster, store_node
    from dpt_hpc.train import loop, writer

    path = Path(os.environ["DPT_HPC_WHEREABOUTS"]) / os.environ.get("SLURM_PROCID", "0")
    path.write_bytes(bytes(len(PLACES)))
    with path.open("r+b") as file:
        held = mmap.mmap(file.fileno(), len(PLACES))

    def marked(place: int, work: Callable[..., Any], slow: float) -> Callable[..., Any]:
        def marks(*arguments: Any, **named: Any) -> Any:
            held[place] += 1
            try:
                time.sleep(slow)
                return work(*arguments, **named)
            finally:
                held[place] -= 1

        return marks

    loop.Trainer.train_step = marked(0, loop.Trainer.train_step, 0)  # type: ignore[method-assign]
    writer.write_checkpoint = marked(1, writer.write_checkpoint, SLOW_DISK)
    for kind in (store.DiskStore, store_node.NodeStore, store_cluster.ClusterStore):
        kind.fetch = marked(2, kind.fetch, SLOW_DISK)  # type: ignore[attr-defined]


if "DPT_HPC_WHEREABOUTS" in os.environ:
    sys.meta_path.insert(0, Finder())
