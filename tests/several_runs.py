"""Pre-train several configs, one after the other, in one world of ranks: a launch costs more than a small run.

python several_runs.py [--two-nodes] CONFIG...   (by mpiexec)

--two-nodes: the first half of the ranks takes itself to be on one node, the second half on another, so that the node
and the cluster store are what they are on two.
"""

from __future__ import annotations

import os
import sys

from dpt_hpc.train.config import PretrainConfig, load_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import enter_world, leave_world

TWO_NODES = "--two-nodes"


def pretend() -> None:
    """Tell this rank, and DeepSpeed, which of two nodes it is on."""
    rank, size = (int(os.environ[f"OMPI_COMM_WORLD_{name}"]) for name in ("RANK", "SIZE"))
    nodes = [2 * other // size for other in range(size)]
    os.environ["DPT_HPC_NODE"] = f"node {nodes[rank]}"
    os.environ["OMPI_COMM_WORLD_LOCAL_RANK"] = str(nodes[:rank].count(nodes[rank]))


if __name__ == "__main__":
    if TWO_NODES in sys.argv:
        pretend()
    ranks = enter_world()
    for config in (argument for argument in sys.argv[1:] if argument != TWO_NODES):
        print(f"== {config}", flush=True)
        pretrain(load_config(config, PretrainConfig), ranks, quiet=True)
    leave_world()
