"""Who a process is among all ranks, by the environment variables of each launcher."""

from __future__ import annotations

import pytest

from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.train.world import World, find_world

RANK_3_OF_8 = {
    "torchrun": {"RANK": "3", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "MASTER_ADDR": "node1", "MASTER_PORT": "1234"},
    "srun": {
        "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "node[1-2,4]",
        "SLURM_JOB_ID": "77",
    },
}  # fmt: skip


@pytest.mark.parametrize("launcher", RANK_3_OF_8)
def test_the_world_is_found(launcher: str) -> None:
    world = find_world(RANK_3_OF_8[launcher])
    assert (world.rank, world.local_rank, world.world_size, world.master_address) == (3, 1, 8, "node1")
    assert launcher in world.source


def test_no_launcher_is_one_process() -> None:
    assert find_world({}) == World()


def test_contradictions_are_refused() -> None:
    with pytest.raises(EnvironmentFault, match="RANK=8, but WORLD_SIZE=8"):
        find_world(RANK_3_OF_8["torchrun"] | {"RANK": "8"})
    with pytest.raises(EnvironmentFault, match="WORLD_SIZE is 'eight', expected an integer"):
        find_world(RANK_3_OF_8["torchrun"] | {"WORLD_SIZE": "eight"})
    without = {k: v for k, v in RANK_3_OF_8["torchrun"].items() if k != "MASTER_ADDR"}
    with pytest.raises(EnvironmentFault, match="MASTER_ADDR is not set"):
        find_world(without)
