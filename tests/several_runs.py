"""Pre-train several configs, one after the other, in one world of ranks: a launch costs more than a small run.

python several_runs.py CONFIG...
"""

from __future__ import annotations

import sys

from dpt_hpc.train.config import PretrainConfig, load_config
from dpt_hpc.train.pretrain import pretrain
from dpt_hpc.train.ranks import enter_world, leave_world

if __name__ == "__main__":
    ranks = enter_world()
    for config in sys.argv[1:]:
        print(f"== {config}", flush=True)
        pretrain(load_config(config, PretrainConfig), ranks, quiet=True)
    leave_world()
