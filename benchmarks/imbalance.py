"""How unequal the work of the ranks is: edges of the fullest rank over the mean of all, per step, by the real sampler.

    python benchmarks/imbalance.py DATASET [--cutoff 8] [--max-neighbors 250] [--out FILE.json]

DATASET from `dpt-hpc ingest`. Edges are counted with the network's own graph. A few ranks take the dataset's
training part (80 %, by material) for three epochs, short last steps included; for many ranks, structures with sizes
drawn from the counted ones stand in for a dataset large enough, of whole steps. Beside the sampler's division: the same
from the ingest's estimate instead of counted edges, and what plain random batches give, each rank an equal number of
structures of the step in the order drawn. The loads are counted edges throughout.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
from measuring import facts, write
from numpy.typing import NDArray

from dpt_hpc.data.sampler import Sampler
from dpt_hpc.data.shards import Dataset
from dpt_hpc.data.split import split_dataset
from dpt_hpc.ops import radius_graph

Edges = NDArray[np.int64]
SEED = 0
SPLIT = (0.8, 0.05, 0.15)
SIMULATED_STEPS = 10
SIMULATED_STRUCTURES = 262_144
"""Of each, whichever gives more: four windows of the default size."""
AT_ONCE = 64

# Ranks, structures per step, how steps are formed.
MEASURED = ((4, 50, "random"), (4, 8, "random"), (4, 8, "similar_sizes"), (2, 50, "random"), (8, 50, "random"))
SIMULATED = (
    (1024, 12_800, "random"),
    (1024, 4_096, "random"),
    (1024, 4_096, "similar_sizes"),
    (1024, 1_024, "similar_sizes"),
    (16_000, 200_000, "random"),
)


def count(dataset: Dataset, cutoff: float, max_neighbors: int) -> Edges:
    """(S,) directed edges of every structure."""
    counted = []
    for start in range(0, len(dataset), AT_ONCE):
        batch = dataset.read(range(start, min(start + AT_ONCE, len(dataset))))
        graph = radius_graph(batch.positions, batch.cell, batch.pbc, batch.atom_ptr, cutoff, max_neighbors)
        counted.append(graph.target_ptr[batch.atom_ptr].diff().numpy())
    return np.concatenate(counted)


def spread(ratios: list[float]) -> dict[str, float]:
    """Mean, 95th percentile and maximum over the steps."""
    return {
        "mean": round(float(np.mean(ratios)), 4),
        "p95": round(float(np.percentile(ratios, 95)), 4),
        "max": round(float(np.max(ratios)), 4),
    }


def compare(
    indices: Edges, edges: Edges, estimate: Edges | None, ranks: int, batch_size: int, batching: str, epochs: int
) -> dict[str, Any]:
    """One line of the table: every step of `epochs` epochs."""
    similar = batching == "similar_sizes"
    sampler = Sampler(indices, edges, batch_size, SEED, similar_sizes=similar)
    plain = Sampler(indices, edges, batch_size, SEED)
    rough = None if estimate is None else Sampler(indices, estimate, batch_size, SEED)
    found: dict[str, list[float]] = {"balanced": [], "plain_random": []}
    seconds = 0.0
    for epoch in range(1, epochs + 1):
        for step in range(sampler.steps_per_epoch):
            sampler.step(epoch, step)  # the drawing of a window is not a step's
            began = time.process_time()
            parts = sampler.parts(epoch, step, ranks, 1)
            seconds += time.process_time() - began
            found["balanced"].append(sampler.imbalance(parts))
            found["plain_random"].append(sampler.imbalance([np.array_split(plain.step(epoch, step), ranks)]))
            if rough is not None and not similar:
                divided = rough.parts(epoch, step, ranks, 1)
                found.setdefault("balanced_by_estimate", []).append(sampler.imbalance(divided))
    steps = len(found["balanced"])
    return {
        "ranks": ranks,
        "batch_size": batch_size,
        "batching": batching,
        "structures": len(indices),
        "steps": steps,
        **{name: spread(ratios) for name, ratios in found.items()},
        "division_ms_per_step": round(seconds / steps * 1e3, 3),
    }


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    dataset = Dataset.open(arguments.dataset)
    began = time.process_time()
    edges = count(dataset, arguments.cutoff, arguments.max_neighbors)
    seconds = time.process_time() - began
    train = split_dataset(dataset.groups, SPLIT, SEED).train
    rows = [compare(train, edges, dataset.edge_estimate, *row, epochs=3) for row in MEASURED]
    random = np.random.default_rng(SEED)
    simulated = []
    for ranks, batch_size, batching in SIMULATED:
        steps = max(SIMULATED_STEPS, -(-SIMULATED_STRUCTURES // batch_size))
        sizes = random.choice(edges, steps * batch_size)
        simulated.append(compare(np.arange(len(sizes)), sizes, None, ranks, batch_size, batching, epochs=1))
    quantiles = np.percentile(edges, [0, 50, 95, 100]).round().astype(int).tolist()
    return {
        "what": "edges of the fullest rank over the mean of all ranks, over the steps; the sampler of a training run",
        **facts(),
        "dataset": arguments.dataset.name,
        "cutoff": arguments.cutoff,
        "max_neighbors": arguments.max_neighbors,
        "counted": {
            "structures": len(edges),
            "edges": int(edges.sum()),
            "min_median_p95_max": quantiles,
            "seconds": round(seconds, 2),
        },
        "training_part": rows,
        "simulated": simulated,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--cutoff", type=float, default=8.0)
    parser.add_argument("--max-neighbors", type=int, default=250)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    counted = results["counted"]
    print(f"{results['dataset']}: {counted['edges']} edges of {counted['structures']} structures", end="; ")
    print(f"counted in {counted['seconds']} s; mean (max) over the steps")
    print("| ranks | structures per step | batching | balanced | by the estimate | plain random | ms per step |")
    print("|---" * 7 + "|")
    for row in results["training_part"] + results["simulated"]:
        cells = [
            f"{row[name]['mean']:.3f} ({row[name]['max']:.3f})" if name in row else ""
            for name in ("balanced", "balanced_by_estimate", "plain_random")
        ]
        print("| " + " | ".join(map(str, [row["ranks"], row["batch_size"], row["batching"], *cells])), end=" | ")
        print(f"{row['division_ms_per_step']} |")
    if arguments.out:
        write(arguments.out, results)


if __name__ == "__main__":
    main()
