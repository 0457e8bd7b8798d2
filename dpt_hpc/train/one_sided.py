"""How fast a rank gets what lies in another one's memory: MPI's one-sided get, measured. A door of mpi4py."""

from __future__ import annotations

import time

import numpy as np

from dpt_hpc.data.store_cluster import check_mpi
from dpt_hpc.train.ranks import Ranks

RECORD, RECORDS = 4096, 32
LARGE = 4 << 20
REPEATS = 5


def measure_get(ranks: Ranks) -> dict[str, float]:
    """Seconds of one record of 4 kB in a batch of 32, and bytes/s of 4 MB, from the rank half a world away; the slowest
    rank's. Collective; raises EnvironmentFault, on every rank alike, if MPI does not connect these ranks.
    """
    check_mpi(ranks)
    from mpi4py import MPI

    everyone = MPI.COMM_WORLD.Dup()
    window = MPI.Win.Create(np.zeros(LARGE, dtype=np.uint8), 1, comm=everyone)
    into = np.empty(LARGE, dtype=np.uint8)
    other = (ranks.rank + ranks.size // 2) % ranks.size
    records, large = [], []
    window.Lock_all(MPI.MODE_NOCHECK)
    for _ in range(REPEATS):
        everyone.Barrier()
        began = time.perf_counter()
        places = [i * RECORD for i in range(RECORDS)]
        MPI.Request.Waitall(
            [window.Rget([into[p : p + RECORD], MPI.BYTE], other, (p, RECORD, MPI.BYTE)) for p in places]
        )
        records.append((time.perf_counter() - began) / RECORDS)
        everyone.Barrier()
        began = time.perf_counter()
        window.Rget([into, MPI.BYTE], other, (0, LARGE, MPI.BYTE)).Wait()
        large.append(time.perf_counter() - began)
    everyone.Barrier()
    window.Unlock_all()
    window.Free()
    everyone.Free()
    slowest = [max(values) for values in zip(*ranks.all_gather((min(records), min(large))), strict=True)]
    return {"seconds_of_a_record": slowest[0], "bytes_per_second": LARGE / slowest[1]}
