"""The doctor's findings for one config, several times on the same ranks, each time with something else broken.

python doctor_ranks.py CONFIG BROKEN_DATASET: rank 0 prints a line of JSON for each time.
python doctor_ranks.py CONFIG fail: rank 1 fails alone, where rank 0 waits for it.
"""

from __future__ import annotations

import json
import os
import sys
from typing import Any

from dpt_hpc.doctor.examine import examine
from dpt_hpc.errors import DataError
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.config_file import load_config
from dpt_hpc.train.engine import DeepSpeedEngine
from dpt_hpc.train.ranks import Ranks, enter_world, leave_world

BACKWARD = DeepSpeedEngine.backward


def tell(ranks: Ranks, *changes: str) -> None:
    findings = [f.as_json() for f in examine(load_config(sys.argv[1], PretrainConfig, changes), ranks)]
    if ranks.rank == 0:
        print("findings: " + json.dumps(findings), flush=True)


def unequal(engine: DeepSpeedEngine, loss: Any, last: bool) -> None:
    """A rank whose share of the gradient counts too much: what a mean of means does."""
    BACKWARD(engine, loss * (1.01 if engine.rank == 1 else 1.0), last)


def fails(engine: DeepSpeedEngine, loss: Any, last: bool) -> None:
    if engine.rank == 1:
        raise DataError("structure 7: is not there")
    BACKWARD(engine, loss, last)


if __name__ == "__main__":
    world = enter_world()
    if sys.argv[2] == "fail":
        DeepSpeedEngine.backward = fails  # type: ignore[method-assign]
        list(examine(load_config(sys.argv[1], PretrainConfig), world))
    for stage in (0, 1, 2):
        tell(world, f"engine.zero_stage={stage}")
    DeepSpeedEngine.backward = unequal  # type: ignore[method-assign]
    tell(world)
    DeepSpeedEngine.backward = BACKWARD  # type: ignore[method-assign]
    os.sched_setaffinity(0, {world.broadcast(min(os.sched_getaffinity(0)))})
    tell(world, f"data.path={sys.argv[2]}")
    leave_world()
