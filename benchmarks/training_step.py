"""One training step of CGCNN (graph, forward, forces and stress, loss backward, clipping, AdamW) on real structures.

    python benchmarks/training_step.py STRUCTURES.xyz [--batch 16] [--repeats 7] [--threads 1] [--out FILE.json]

Compares, in turn and on the same batch, weights and allocator settings:
  plain      the gate on the concatenation [x_i, x_j, e_ij], two linear maps, plain PyTorch, as the paper's code has it
  reference  split gate, plain PyTorch (backend="reference")
  exact      the fused kernels, Gaussians evaluated on every edge
  table      the fused kernels, filters interpolated on 512 intervals
Each runs in a process of its own, step by step in turn, so that a busy machine slows all of them alike. Times are
medians of process CPU time (wall time with more than one thread); memory is the growth of the peak resident set over
a step.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

IMPLEMENTATIONS = ("plain", "reference", "exact", "table")
KEPT_HEAP = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": "1000000000000", "MALLOC_TOP_PAD_": "268435456"}
"""glibc keeps freed memory: the page faults of large temporaries would cost the plain implementations 1.3 to 2.7 x."""


def worker(arguments: argparse.Namespace) -> None:
    """Answer each line on stdin with one step and its measurements on stdout."""
    import ase.io
    import torch
    from torch import Tensor
    from torch.nn import functional

    from dpt_hpc import _C
    from dpt_hpc.models import CGCNN, CGCNNOptions, predict
    from dpt_hpc.models.cgcnn import CGConv
    from dpt_hpc.models.derivatives import build_graph
    from dpt_hpc.structure import Batch, Structure

    class Concatenated(CGConv):
        def forward(self, x: Tensor, edge_lengths: Tensor, basis: Any, table: Any, graph: Any, backend: str) -> Tensor:
            source, target = graph.edge_index
            z = torch.cat([x.index_select(0, target), x.index_select(0, source), basis(edge_lengths)], dim=1)
            (gate, filter_), (gate_bias, filter_bias) = self.weight.chunk(2), self.bias.chunk(2)
            messages = torch.sigmoid(functional.linear(z, gate, gate_bias)) * functional.softplus(
                functional.linear(z, filter_, filter_bias)
            )
            total = torch.zeros_like(x).index_add(0, target, messages)
            return x + total / graph.target_ptr.diff().clamp(min=1)[:, None]

    def read(count: int) -> Batch:
        structures = []
        for atoms in ase.io.read(arguments.structures, index=f"{arguments.skip}:{arguments.skip + count}"):
            structures.append(
                Structure(
                    positions=torch.tensor(atoms.positions),
                    cell=torch.tensor(atoms.cell.array),
                    pbc=torch.tensor(atoms.pbc),
                    atomic_numbers=torch.tensor(atoms.numbers).long(),
                    energy=float(atoms.get_potential_energy()),
                    forces=torch.tensor(atoms.get_forces()),
                    stress=torch.tensor(atoms.get_stress(voigt=False)),
                )
            )
        return Batch.from_structures(structures)

    name = arguments.worker
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    model = CGCNN(
        CGCNNOptions(
            filters="table" if name == "table" else "exact",
            backend="reference" if name in ("plain", "reference") else "native",
        )
    )
    if name == "plain":
        for convolution in model.convolutions:
            convolution.__class__ = Concatenated
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def step(batch: Batch) -> tuple[float, dict[str, float]]:
        clock = time.process_time if arguments.threads == 1 else time.perf_counter
        marks = [clock()]
        optimizer.zero_grad()
        prediction = predict(model, batch)
        assert prediction.forces is not None
        assert prediction.stress is not None
        marks.append(clock())
        loss = functional.l1_loss(prediction.energy, batch.energy)
        loss = loss + 500 * functional.l1_loss(prediction.forces, batch.forces)
        loss = loss + 500 * functional.l1_loss(prediction.stress, batch.stress)
        loss.backward()
        marks.append(clock())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        marks.append(clock())
        names = ("prediction", "loss_backward", "optimizer")
        return loss.item(), dict(zip(names, (b - a for a, b in itertools.pairwise(marks)), strict=True))

    step(read(1))
    batch = read(arguments.batch)
    edges = build_graph(model, batch).num_edges
    Path("/proc/self/clear_refs").write_text("5")  # reset the peak
    before = resident("VmRSS")
    step(batch)
    peak = resident("VmHWM") - before
    facts = {
        "atoms": batch.num_atoms,
        "edges": edges,
        "peak_bytes": peak,
        "level": _C.level,
        "torch": torch.__version__,
    }
    print(json.dumps(facts), flush=True)
    for _ in sys.stdin:
        loss, phases = step(batch)
        print(json.dumps({"loss": loss, **phases}), flush=True)


def resident(field: str) -> int:
    """Bytes of resident memory (VmRSS) or their peak (VmHWM), from Linux."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    environment = {**os.environ, **KEPT_HEAP, "OMP_NUM_THREADS": str(arguments.threads)}
    workers = {
        name: subprocess.Popen(
            [sys.executable, __file__, *sys.argv[1:], "--worker", name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for name in arguments.only
    }

    def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
        assert process.stdout is not None
        line = process.stdout.readline()
        if not line:
            raise SystemExit(f"training_step: {process.args} stopped; its message is above.")
        result: dict[str, Any] = json.loads(line)
        return result

    facts = {name: answer(process) for name, process in workers.items()}
    steps: dict[str, list[dict[str, float]]] = {name: [] for name in workers}
    for _ in range(arguments.repeats):
        for name, process in workers.items():
            assert process.stdin is not None
            process.stdin.write("step\n")
            process.stdin.flush()
            steps[name].append(answer(process))
    for process in workers.values():
        assert process.stdin is not None
        process.stdin.close()
        process.wait()

    results: dict[str, Any] = {}
    for name, samples in steps.items():
        edges = facts[name]["edges"]
        phases = {k: statistics.median(s[k] for s in samples) / edges * 1e6 for k in samples[0] if k != "loss"}
        total = statistics.median(sum(v for k, v in s.items() if k != "loss") for s in samples) / edges * 1e6
        results[name] = {
            "microseconds_per_edge": total,
            "phases": phases,
            "peak_bytes_per_edge": facts[name]["peak_bytes"] / edges,
            "loss": samples[0]["loss"],
        }
    first = facts[arguments.only[0]]
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "machine": processor(),
        "python": platform.python_version(),
        "torch": first["torch"],
        "level": first["level"],
        "threads": arguments.threads,
        "structures": arguments.batch,
        "atoms": first["atoms"],
        "edges": first["edges"],
        "implementations": results,
    }


def processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.split(":")[1].strip()
    return platform.machine()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("structures", help="a file that ASE reads, with energies, forces and stress")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--skip", type=int, default=0, help="structures of the file to leave out")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=IMPLEMENTATIONS, default=IMPLEMENTATIONS)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--worker", choices=IMPLEMENTATIONS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.worker:
        worker(arguments)
        return
    results = measure(arguments)
    print(f"{results['machine']}, {results['threads']} thread(s), {results['atoms']} atoms, {results['edges']} edges")
    slowest = max(r["microseconds_per_edge"] for r in results["implementations"].values())
    for name, r in results["implementations"].items():
        phases = ", ".join(f"{k} {v:.2f}" for k, v in r["phases"].items())
        ratio = slowest / r["microseconds_per_edge"]
        print(
            f"{name:10} {r['microseconds_per_edge']:7.2f} µs/edge ({ratio:4.1f} x; {phases})"
            f"  peak {r['peak_bytes_per_edge']:8.0f} B/edge  loss {r['loss']:.6f}"
        )
    if arguments.out:
        arguments.out.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
