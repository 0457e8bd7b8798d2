"""`dpt-hpc bench scaling`: measure the ranks that are there, or start those that are asked for."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.scaling.measure import measure
from dpt_hpc.scaling.predict import Mode, Network
from dpt_hpc.scaling.result import Clock, join_records, keep_record, predicted, read_records, record_path
from dpt_hpc.scaling.start import start
from dpt_hpc.train.config import PretrainConfig
from dpt_hpc.train.monitor import write_json
from dpt_hpc.train.ranks import Ranks

Say = Callable[[str], None]


def rank_counts(asked: str | None, ranks: Ranks) -> list[int]:
    """The numbers of ranks to start, from `1,2,4`; none where a launcher has started the ranks, or nothing is asked.

    Raises ConfigError if the list is none, or asks for other ranks than those that are there.
    """
    if asked is None:
        return []
    try:
        counts = [int(word) for word in asked.split(",")]
    except ValueError:
        counts = [0]
    if min(counts) < 1 or len(set(counts)) != len(counts):
        raise ConfigError(f"--ranks {asked}: expected distinct numbers of ranks, for example 1,2,4.")
    if ranks.size == 1:
        return counts
    if counts != [ranks.size]:
        raise ConfigError(
            f"--ranks {asked}: but {ranks.world.source} has started {ranks.size} ranks, and they cannot start others.\n"
            "Leave --ranks out, and launch once for each size with the same --out."
        )
    return []


def measure_here(
    config: PretrainConfig, mode: Mode, structures: int | None, ranks: Ranks, out: Path, *, warm_up: int, steps: int
) -> None:
    """Measure the ranks that this process is one of, and leave the record in `out`."""
    given = structures or config.training.batch_size
    parent = out / "scratch"
    if ranks.rank == 0:
        parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(ranks.broadcast(tempfile.mkdtemp(dir=parent) if ranks.rank == 0 else None))
    record, edges = measure(config, mode, given, ranks, scratch / "run", warm_up=warm_up, steps=steps)
    if ranks.rank == 0:
        scratch.rmdir()
        if not any(parent.iterdir()):
            parent.rmdir()
        keep_record(record, edges, out)


def measure_each(
    counts: Sequence[int], mode: Mode, arguments: Sequence[str], out: Path, threads: int, say: Say
) -> None:
    """Start ranks once for each of `counts`; each launch is this verb again, without --ranks."""
    for count in counts:
        say(f"measuring {count} rank(s)")
        record_path(out, mode, count).unlink(missing_ok=True)
        start(count, arguments, threads)
        if not record_path(out, mode, count).exists():
            raise ConfigError(
                f"{count} rank(s) were started, but left no {record_path(out, mode, count)}: they did not meet.\n"
                "Start them by hand: srun or mpiexec -n N python -m dpt_hpc.launch bench scaling ..."
            )


def conclude(
    mode: Mode,
    out: Path,
    counts: Sequence[int] = (),
    *,
    predict: bool,
    network: Network,
    conditions: dict[str, float | None],
    clock: Clock = "wall",
) -> dict[str, Any]:
    """Join what lies in `out` into scaling_MODE.json; with `predict` the curve to thousands of ranks too.

    counts: the numbers of ranks to join; none: all that lie there. Raises ConfigError if there is nothing, or if what
    lies there was not measured alike.
    """
    records = read_records(out, mode, counts)
    if not records:
        raise ConfigError(f"--out {out}: holds no measurement of {mode} scaling.\nMeasure first, with --ranks 1,2.")
    try:
        result = join_records(records)
        if predict:
            edges = np.load(out / "edges.npy", allow_pickle=False)
            result = predicted(result, edges, network, conditions, clock)
    except ConfigError as error:
        raise ConfigError(f"--out {out}: {error}") from None
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        raise DataError(
            f"--out {out}: what was measured there cannot be joined: {error!r}.\nMeasure again, into another folder."
        ) from None
    write_json(out / f"scaling_{mode}.json", result)
    return result
