"""One training step (graph, forward, forces and stress, loss backward, clipping, AdamW) of every implementation.

    python benchmarks/training_step.py [--models cgcnn torchmd_et] [--data FOLDER] [--threads 1 16] [--out FILE.json]

The networks at the paper's sizes, 8 Å, nearest 250, on batches of real structures (crystals.py). The implementations
(training.py: plain, reference, pyg, exact, table) run in processes of their own on the same batch, weights and
allocator settings, step by step in turn, so that a busy machine slows all of them alike. Times are medians of process
CPU time, of wall time with several threads; memory is the growth of the peak resident set over a step. What does not
fit into --memory beside the others is left out, and the result says so.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from crystals import DATA, LARGE, benchmark_sets
from measuring import KEPT_HEAP, OUTPUT, clock, facts, reset_peak, resident, write
from roofline import machine_rates, seconds_per_edge, step_work
from training import IMPLEMENTATIONS, MODELS, NATIVE, OTHERS, TrainingStep, batch_within, build

from dpt_hpc.models.derivatives import build_graph
from dpt_hpc.structure import Batch

EDGES = {"cgcnn": [30_000], "torchmd_et": [6_000, 28_000], "schnet": [12_000], "painn": [12_000]}
"""Of a batch, at most. The plain twins of the transformer fit beside each other into the smaller one only."""
PLAIN_BYTES = {"cgcnn": 40_000, "torchmd_et": 450_000, "schnet": 60_000, "painn": 150_000}
NATIVE_BYTES = {"cgcnn": 1_000, "torchmd_et": 8_000, "schnet": 40_000, "painn": 8_000}


def worker(arguments: argparse.Namespace) -> None:
    """Answers each line on stdin with one step and its measurements on stdout."""
    torch.set_num_threads(arguments.threads[0])
    step = TrainingStep(build(arguments.models[0], arguments.worker))
    torch.serialization.add_safe_globals([Batch])
    batch: Batch = torch.load(arguments.batch, weights_only=True)
    step(Batch.from_structures([_first(batch)]))
    before = reset_peak()
    step(batch)
    print(json.dumps({"peak_bytes": resident("VmHWM") - before}), flush=True)
    now = clock(arguments.threads[0])
    for _ in sys.stdin:
        marks, phases = [now()], []

        def mark(phase: str, marks: list[float] = marks, phases: list[str] = phases) -> None:
            marks.append(now())
            phases.append(phase)

        loss = float(step(batch, mark))
        spans = dict(zip(phases, (b - a for a, b in itertools.pairwise(marks)), strict=True))
        print(json.dumps({"loss": loss, "phases": spans}), flush=True)


def _first(batch: Batch) -> Any:
    from dpt_hpc.structure import Structure

    own = slice(0, min(int(batch.atom_ptr[1]), 20))
    return Structure(
        positions=batch.positions[own].double(),
        cell=batch.cell[0].double(),
        pbc=batch.pbc[0],
        atomic_numbers=batch.atomic_numbers[own],
        energy=0.0,
        forces=batch.forces[own].double(),
        stress=batch.stress[0].double(),
    )


class Worker:
    """An implementation in a process of its own."""

    def __init__(self, model: str, implementation: str, batch: Path, threads: int) -> None:
        command = [sys.executable, __file__, "--models", model, "--threads", str(threads)]
        self.process = subprocess.Popen(
            [*command, "--batch", str(batch), "--worker", implementation],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, **KEPT_HEAP, "OMP_NUM_THREADS": str(threads)},
        )

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"stopped with exit status {self.process.wait()}; its message is above")
        found: dict[str, Any] = json.loads(line)
        return found

    def step(self) -> dict[str, Any]:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # of one that has died: answer() tells
            self.process.stdin.write("step\n")
            self.process.stdin.flush()
        return self.answer()

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.close()
        self.process.wait()


def measure(model: str, implementations: list[str], batch: Batch, edges: int, threads: int, repeats: int) -> Any:
    """(results of each implementation, why the others have none)."""
    left_out: dict[str, str] = {}
    workers: dict[str, Worker] = {}
    peaks: dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "batch.pt"
        torch.save(batch, path)
        for name in implementations:
            worker = Worker(model, name, path, threads)
            try:
                peaks[name] = worker.answer()["peak_bytes"]
                workers[name] = worker
            except RuntimeError as error:
                left_out[name] = str(error)
        samples: dict[str, list[dict[str, Any]]] = {name: [] for name in workers}
        for _ in range(repeats):
            for name, worker in list(workers.items()):
                try:
                    samples[name].append(worker.step())
                except RuntimeError as error:  # the others go on
                    left_out[name] = str(error)
                    workers.pop(name).close()
                    del samples[name]
        for worker in workers.values():
            worker.close()
    results = {}
    for name, steps in samples.items():
        scale = 1e6 / edges
        results[name] = {
            "microseconds_per_edge": statistics.median(sum(s["phases"].values()) for s in steps) * scale,
            "phases": {k: statistics.median(s["phases"][k] for s in steps) * scale for k in steps[0]["phases"]},
            "peak_bytes_per_edge": peaks[name] / edges,
            "loss": steps[0]["loss"],
        }
    return results, left_out


def wanted(options: argparse.Namespace, model: str, edges: int) -> tuple[list[str], dict[str, str]]:
    """The implementations that fit into --memory side by side, the fused and the paper's first; why not the others."""
    fit, left_out, free = [], {}, options.memory * 1e9
    for name in sorted(options.only, key=("exact", "table", "plain", "reference", "pyg").index):
        needed = edges * (NATIVE_BYTES if name in NATIVE else PLAIN_BYTES)[model]
        if name == "plain" and model in OTHERS:
            left_out[name] = "not written: reference is the plain twin"
        elif needed > free:
            left_out[name] = f"would need about {needed / 1e9:.0f} GB, {free / 1e9:.0f} GB were left"
        else:
            fit.append(name)
            free -= needed
    return [name for name in options.only if name in fit], left_out


def free_memory() -> float:
    """GB that this machine has to give, as Linux estimates it."""
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9


def show(row: dict[str, Any]) -> None:
    print(f"{row['model']}, {row['set']}, {row['threads']} thread(s), {row['atoms']} atoms, {row['edges']} edges")
    for name, r in row["implementations"].items():
        limit = f"; limit {r['limit_microseconds']:.2f}" if "limit_microseconds" in r else ""
        phases = ", ".join(f"{k} {v:.2f}" for k, v in r["phases"].items())
        print(
            f"  {name:10} {r['microseconds_per_edge']:7.2f} µs/edge ({phases}{limit})"
            f"  peak {r['peak_bytes_per_edge']:8.0f} B/edge  loss {r['loss']:.6f}"
        )
    for name, reason in row["left_out"].items():
        print(f"  {name:10} {reason}")
    sys.stdout.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS + OTHERS, default=MODELS)
    parser.add_argument("--data", type=Path, default=DATA)
    parser.add_argument("--sets", nargs="+", help="only sets whose names begin so")
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--threads", type=int, nargs="+", default=[1])
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--edges", type=int, nargs="+", help="of a batch, at most; several: one batch of each size")
    parser.add_argument(
        "--memory", type=float, default=0.75 * free_memory(), help="GB for all of them (3/4 of the free)"
    )
    parser.add_argument("--out", type=Path, default=OUTPUT / "training_step.json")
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        worker(options)
        return
    result: dict[str, Any] = {
        "what": "one training step, energy + forces + stress, float32; medians of process CPU time with one thread, of "
        "wall time with several; limit: the larger of FLOP / GEMM rate and bytes / copy bandwidth (roofline.py)",
        **facts(),
        "allocator": KEPT_HEAP,
        "repeats": options.repeats,
        "rates": {str(threads): machine_rates("cpu", threads) for threads in options.threads},
        "measurements": [],
    }
    for set_name, structures in benchmark_sets(options.data).items():
        if options.sets and not set_name.startswith(tuple(options.sets)):
            continue
        for model in options.models:
            network = build(model, "reference")
            # A structure larger than the batches stands for all of them.
            batches = {
                build_graph(network, batch).num_edges: batch
                for most in options.edges or EDGES[model]
                for batch in [batch_within(structures, network, most)]
            }
            for (edges, batch), threads in itertools.product(batches.items(), options.threads):
                implementations, left_out = wanted(options, model, edges)
                repeats = min(options.repeats, 3) if set_name == LARGE else options.repeats
                found, failed = measure(model, implementations, batch, edges, threads, repeats)
                for name, r in found.items() if model in MODELS else ():
                    work = step_work(model, "table" if name == "table" else "exact", edges / batch.num_atoms)
                    r["limit_microseconds"] = seconds_per_edge(work, result["rates"][str(threads)]) * 1e6
                    r["fraction_of_limit"] = r["limit_microseconds"] / r["microseconds_per_edge"]
                row = {"model": model, "set": set_name, "structures": batch.num_structures, "atoms": batch.num_atoms}
                row |= {"edges": edges, "threads": threads, "implementations": found, "left_out": left_out | failed}
                result["measurements"].append(row)
                show(row)
                write(options.out, result)


if __name__ == "__main__":
    main()
