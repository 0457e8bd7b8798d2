"""Edges per second of radius_graph and of every other package's neighbour list that is installed.

    python benchmarks/radius_graph.py [--data FOLDER] [--threads 1 16] [--repeats 9] [--out FILE.json]

Three sets (crystals.py) at 5 and 8 Å. radius_graph takes a set as one batch and compares in float64; so do
nvalchemi-toolkit-ops and our backend pyg, which searches with torch-cluster; the other peers take the structures one by
one, which is what they offer. Times are medians over rounds in which all take turns: of the process's CPU time with one
thread, of wall time with several.
A peer whose list has another number of edges is named: it does not count as exact there.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import torch
from crystals import DATA, benchmark_sets
from measuring import OUTPUT, clock, facts, in_turn, keep_heap, write
from neighbor_peers import Run, flat, installed, left_out
from roofline import graph_work, machine_rates, seconds_per_edge

from dpt_hpc.ops import radius_graph
from dpt_hpc.structure import Structure

TOO_SLOW = 10.0
"""Seconds of wall time; a peer that takes longer for one list is named with that time, and left out of the rounds."""
OURS, NEAREST = "radius_graph", "radius_graph, nearest 250"


def contenders(structures: list[Structure], cutoff: float, threads: int) -> tuple[dict[str, Run], dict[str, str]]:
    """What can run, and why the rest cannot."""
    batch = flat(structures)
    runs: dict[str, Run] = {
        OURS: lambda: radius_graph(*batch, cutoff).num_edges,
        NEAREST: lambda: radius_graph(*batch, cutoff, 250).num_edges,
    }
    failed = {}
    for name, prepare in installed().items():
        try:
            run = prepare(structures, cutoff, threads)
            run()  # compiles what it compiles
            began = time.perf_counter()
            run()
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"[:200]
            continue
        seconds = time.perf_counter() - began
        if seconds > TOO_SLOW:
            failed[name] = f"{seconds:.0f} s a list"
        else:
            runs[name] = run
    return runs, failed


def measure(structures: list[Structure], cutoff: float, threads: int, repeats: int) -> dict[str, Any]:
    torch.set_num_threads(threads)
    runs, failed = contenders(structures, cutoff, threads)
    edges = {name: run() for name, run in runs.items()}
    found = edges[OURS]
    seconds = in_turn(runs, repeats, clock(threads))
    # The nearest 250 are chosen from the full list: its edges are the ones found.
    rate = {name: round(found / s / 1e6, 1) for name, s in seconds.items()}
    exact = [name for name in rate if edges[name] == found and name not in (OURS, NEAREST)]
    fastest = max(exact, key=lambda name: rate[name], default=None)
    return {
        "cutoff": cutoff,
        "threads": threads,
        "edges": found,
        "million_edges_per_second": rate,
        "seconds_per_edge": seconds[OURS] / found if found else None,
        "other_edges": {n: k for n, k in edges.items() if k != found and n != NEAREST},
        "failed": failed,
        "fastest_exact_peer": fastest,
        "ratio": round(rate[OURS] / rate[fastest], 2) if fastest else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", help="only sets whose names begin so")
    parser.add_argument("--cutoffs", type=float, nargs="+", default=[5.0, 8.0])
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--out", type=Path, default=OUTPUT / "radius_graph.json")
    options = parser.parse_args()
    keep_heap()
    result: dict[str, Any] = {
        "what": "directed edges per second; medians of process CPU time with one thread, of wall time with several; "
        "ratio: to the fastest peer that finds the same number of edges; limit: the time that writing the edges takes "
        "at the copy bandwidth measured here",
        **facts(),
        "repeats": options.repeats,
        "left_out": left_out(),
        "rates": {str(threads): machine_rates("cpu", threads) for threads in options.threads},
        "sets": {},
    }
    for name, structures in benchmark_sets(options.data).items():
        if options.sets and not name.startswith(tuple(options.sets)):
            continue
        entry: dict[str, Any] = {"structures": len(structures), "atoms": sum(s.num_atoms for s in structures)}
        result["sets"][name] = entry | {"measurements": []}
        for threads in options.threads:
            limit = seconds_per_edge(graph_work(), result["rates"][str(threads)])
            for cutoff in options.cutoffs:
                row = measure(structures, cutoff, threads, options.repeats)
                if row["seconds_per_edge"]:
                    row["fraction_of_limit"] = round(limit / row.pop("seconds_per_edge"), 3)
                result["sets"][name]["measurements"].append(row)
                print(name, row, flush=True)
                write(options.out, result)


if __name__ == "__main__":
    main()
