"""From the records of single measurements to one result: efficiency, what it is lost to, and the prediction."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from dpt_hpc.errors import ConfigError, DataError
from dpt_hpc.plain_text import from_json
from dpt_hpc.scaling.imbalance import SimulatedImbalance
from dpt_hpc.scaling.predict import RANKS, Conditions, Network, Work, as_json, predict_curve, predict_step
from dpt_hpc.train.monitor import write_json

Record = dict[str, Any]
Clock = Literal["wall", "cpu"]

FABRIC = Network(latency=5e-6, bandwidth=12.5e9)
"""Where nothing else is said: 5 µs, and 100 Gbit/s for each rank."""


def record_path(out: Path, mode: str, ranks: int) -> Path:
    """Where the measurement of `ranks` ranks lies."""
    return out / f"{mode}_{ranks:06d}.json"


def keep_record(record: Record, edges: NDArray[np.int64], out: Path) -> None:
    """Write a measurement and the dataset's edges per structure, counted, from which shares are simulated."""
    out.mkdir(parents=True, exist_ok=True)
    np.save(out / "edges.npy", edges)
    write_json(record_path(out, record["mode"], record["ranks"]), record)


def join_records(records: Sequence[Record]) -> Record:
    """Measurements of one mode, by rising numbers of ranks, each compared with the smallest.

    Raises ConfigError if they do not measure the same thing.
    """
    records = sorted(records, key=lambda r: r["ranks"])
    base = records[0]
    for record in records:
        if differing := _differences(_kind(base), _kind(record)):
            raise ConfigError(
                f"the measurements of {base['ranks']} and {record['ranks']} ranks differ in {', '.join(differing)}.\n"
                "Efficiency compares like with like: one may be left from an earlier day.\n"
                "Measure all of them anew, with the same OMP_NUM_THREADS, or with another --out."
            )
    return {"mode": base["mode"], "measurements": [_compared(record, base) for record in records]}


def _kind(record: Record) -> Record:
    """What measurements must share to be compared."""
    structures = "structures_per_rank" if record["mode"] == "weak" else "structures"
    same = (structures, "parameters", "device", "threads", "processor", "gpu", "options")
    dataset = {key: record["dataset"][key] for key in ("structures", "digests")}
    return {**{key: record[key] for key in same}, "commit": record["git"], "dataset": dataset}


def _differences(a: Any, b: Any, name: str = "") -> list[str]:
    """The entries in which two trees differ, with both values."""
    if isinstance(a, dict) and isinstance(b, dict):
        below = [_differences(a.get(k), b.get(k), f"{name}.{k}".lstrip(".")) for k in {**a, **b}]
        return [found for some in below for found in some]
    return [] if a == b else [f"{name} ({a} and {b})"]


def _compared(record: Record, base: Record) -> Record:
    """A measurement with its efficiency and, part by part, the seconds of a step that an ideal machine would not need.

    By edges: the steps of two measurements are not the same structures, and edges are what the work is.
    """
    share = base["ranks"] / record["ranks"]
    work = record["edges_per_step"] * share / base["edges_per_step"]
    watched = record["watched_edges_per_step"] * share / base["watched_edges_per_step"]
    parts, before = _mean_parts(record), _mean_parts(base)
    return {
        **record,
        "parts": parts,
        "efficiency": record["structures_per_second"] / base["structures_per_second"] * share,
        "efficiency_by_edges": base["seconds_per_step"] * work / record["seconds_per_step"],
        "efficiency_by_cpu": record["edges_per_cpu_second"] / base["edges_per_cpu_second"],
        "lost_seconds": {name: parts[name] - before[name] * watched for name in parts},
    }


def _mean_parts(record: Record) -> dict[str, float]:
    shares = record["per_rank"]
    return {name: statistics.fmean(s["parts"][name] for s in shares) for name in shares[0]["parts"]}


def work_of(records: Sequence[Record], clock: Clock = "wall") -> Work:
    """What one rank does, from its measurement; what is sent, from that of the fewest ranks that send anything.

    clock: wall, or cpu for a machine that is busy with other things: seconds of the processor, which those do not
    stretch; then no data wait and no checkpoint is taken over. Raises ConfigError without a measurement of one rank.
    """
    alone = next((r for r in records if r["ranks"] == 1), None)
    if alone is None:
        raise ConfigError(
            "a prediction starts from the steps of a single rank, which have not been measured.\n"
            "Measure them too, for example with --ranks 1,2."
        )
    seconds = "seconds" if clock == "wall" else "cpu_seconds"
    fixed, per_edge = fit_line([s["edges"] for s in alone["work"]], [s[seconds] for s in alone["work"]])
    together = next((r for r in sorted(records, key=lambda r: r["ranks"]) if r["ranks"] > 1), None)
    counts = together["counts"] if together else {}
    dataset = alone["dataset"]
    from_disk = alone["store"] == "disk" and alone["options"]["data"]["stage"] is None
    return Work(
        fixed=fixed,
        per_edge=per_edge,
        edges=alone["edges_per_step"] / alone["structures"],
        gradient_bytes=counts.get("gradient_bytes", 4.0 * alone["parameters"]),
        messages=counts.get("gradient_messages", 1.0),
        sums=counts.get("sums", 2.0),
        data_wait=_mean_parts(alone)["data"] if clock == "wall" else 0.0,
        # Of the shared file system nothing is read after the start, unless the structures stay there.
        structure_bytes=dataset["bytes"] / dataset["all_structures"] if from_disk else 0.0,
        checkpoint=alone["checkpoint"]["held_seconds"] if clock == "wall" else 0.0,
    )


def fit_line(edges: Sequence[float], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds = fixed + per_edge x edges, with least relative errors and neither below 0."""
    x, y = np.asarray(edges, dtype=np.float64), np.asarray(seconds, dtype=np.float64)
    if len(set(edges)) > 1:
        (fixed, slope), *_ = np.linalg.lstsq(np.stack([1 / y, x / y], axis=1), np.ones_like(y), rcond=None)
        if fixed >= 0 and slope >= 0:
            return float(fixed), float(slope)
        if slope < 0:
            return float(y.mean()), 0.0
    return 0.0, float(y.sum() / x.sum())


def predicted(
    result: Record, edges: NDArray[np.int64], network: Network, options: Mapping[str, float | None], clock: Clock
) -> Record:
    """`result` with a prediction for many ranks on `network`, and with what the same arithmetic says, from the measured
    network of each measurement, for the ranks that were measured. options: of `Conditions`."""
    records = result["measurements"]
    work = work_of(records, clock)
    structures = next(r["structures"] for r in records if r["ranks"] == 1)
    conditions = Conditions(result["mode"], structures, **options)  # type: ignore[arg-type]
    similar = records[0]["options"]["training"]["batching"] == "similar_sizes"
    imbalance = SimulatedImbalance(edges, structures, weak=result["mode"] == "weak", similar_sizes=similar)
    points = predict_curve(work, network, conditions, imbalance, RANKS, imbalance.seconds)
    as_measured = Conditions(result["mode"], structures)
    checked = []
    for record in records:
        own = record["network"]
        if own["latency"] is None:
            continue
        here = Network(own["latency"], own["bandwidth"])
        n = record["ranks"]
        point = predict_step(work, here, as_measured, n, imbalance(n), imbalance.seconds(n))
        measured = {"measured": record["efficiency_by_edges"], "measured_by_cpu": record["efficiency_by_cpu"]}
        checked.append({"ranks": n, "efficiency": point.efficiency, **measured})
    told = as_json(work, network, conditions, points, imbalance)
    return {**result, "prediction": {**told, "clock": clock, "checked": checked}}


def read_records(out: Path, mode: str, ranks: Sequence[int] = ()) -> list[Record]:
    """The measurements that lie in `out`; those of `ranks` alone, if any are given. Raises DataError for a damaged
    one."""
    found = []
    for path in sorted(out.glob(f"{mode}_[0-9]*.json")):
        try:
            record = from_json(path.read_bytes())
        except (OSError, ValueError) as error:
            raise DataError(f"{path}: cannot be read: {error}.\nMeasure again, or delete the file.") from None
        if not isinstance(record, dict) or not isinstance(record.get("ranks"), int) or record["ranks"] < 1:
            raise DataError(f"{path}: holds no measurement of some ranks.\nMeasure again, or delete the file.")
        found.append(record)
    return [record for record in found if not ranks or record["ranks"] in ranks]
