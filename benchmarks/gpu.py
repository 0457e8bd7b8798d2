"""What benchmarks/gpu.sh measures once the extension is built; needs torch and numpy, nothing else.

python benchmarks/gpu.py measure FILE.json [--device cpu]   # radius graphs and training steps, on a CPU small ones
python benchmarks/gpu.py small [--device cpu]               # every kernel once on small inputs, for the sanitizers
"""

from __future__ import annotations

import argparse
import sys
from itertools import product
from pathlib import Path
from typing import Any

import torch
from crystals import SAMPLE, fcc_box, labelled, read_json, silicon
from cuda_events import median_seconds
from measuring import facts, reset_peak, resident, write
from neighbor_peers import flat
from roofline import Work, graph_work, machine_rates, seconds_per_edge, step_work
from training import MODELS, NATIVE, TrainingStep, build

from dpt_hpc.models.derivatives import build_graph
from dpt_hpc.ops import edge_product, gather_aggregate, radius_graph, radius_graph_cuda
from dpt_hpc.structure import Batch, Structure

REPEATS = 20
PUBLISHED = {"512 x 64 atoms": 152.0, "512 x 128 atoms": 188.0}
"""Million atoms/s of nvalchemi-toolkit-ops on an H100 at 5 Å, with buffers and image tables prepared beforehand."""
LEFT_OUT = {
    "training steps of reference and pyg": "slower than plain, and the time is short; benchmarks/training_step.py has "
    "them on a CPU",
    "neighbour lists of other packages on the GPU": "only torch and numpy are assumed to be there",
}


def graph_sets(small: bool) -> dict[str, tuple[list[Structure], float, int | None]]:
    """Structures, cutoff in Å, neighbours kept."""
    copies, real = (4, 20) if small else (512, None)
    crystals = read_json(SAMPLE)[:real]
    supercell = [silicon(3 if small else 10)]
    return {
        f"{copies} x 64 atoms": ([fcc_box(64)] * copies, 5.0, None),
        f"{copies} x 128 atoms": ([fcc_box(128)] * copies, 5.0, None),
        f"{copies} x 64 atoms, 8 Å, nearest 250": ([fcc_box(64)] * copies, 8.0, 250),
        f"{len(crystals)} real crystals, 5 Å": (crystals, 5.0, None),
        f"{len(crystals)} real crystals, 8 Å, nearest 250": (crystals, 8.0, 250),
        f"{supercell[0].num_atoms} atoms in one cell, 5 Å": (supercell, 5.0, None),
        f"{supercell[0].num_atoms} atoms in one cell, 8 Å, nearest 250": (supercell, 8.0, 250),
    }


def of_limit(work: Work, rates: dict[str, Any], edges: int, seconds: float) -> float | None:
    """The fraction of the machine's limit that is reached; none if its rates could not be measured."""
    return None if "failed" in rates else seconds_per_edge(work, rates) * edges / seconds


def measure_graph(
    structures: list[Structure], cutoff: float, nearest: int | None, device: str, rates: dict[str, Any]
) -> dict[str, Any]:
    batch = flat(structures, device)
    edges = radius_graph(*batch, cutoff, nearest).num_edges
    seconds = median_seconds(lambda: radius_graph(*batch, cutoff, nearest), REPEATS, device)
    return {
        "atoms": len(batch[0]),
        "edges": edges,
        "milliseconds": seconds * 1e3,
        "million_atoms_per_second": len(batch[0]) / seconds / 1e6,
        "million_edges_per_second": edges / seconds / 1e6,
        "fraction_of_copy_bandwidth": of_limit(graph_work(), rates, edges, seconds),
    }


def training_batch(model: str, small: bool) -> Batch:
    """Real crystals that ship with dpt_hpc, of 20 to 100 atoms."""
    crystals = [s for s in read_json(SAMPLE) if 20 <= s.num_atoms <= 100]
    count = 1 if small else {"cgcnn": 200, "torchmd_et": 40}[model]  # plain PyTorch needs 35 and 68 GB
    return Batch.from_structures([labelled(s) for s in crystals[:count]])


def measure_step(model: str, implementation: str, small: bool, device: str, rates: dict[str, Any]) -> dict[str, Any]:
    network = build(model, implementation).to(device)
    batch = training_batch(model, small)
    edges = build_graph(network, batch).num_edges
    batch, step = batch.to(device), TrainingStep(network)
    repeats = 2 if small else REPEATS if implementation in NATIVE else 5
    seconds = median_seconds(lambda: step(batch), repeats, device)
    if device == "cpu":
        before = reset_peak()
        loss = float(step(batch))
        peak = resident("VmHWM") - before
    else:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss = float(step(batch))
        peak = torch.cuda.max_memory_allocated() - before
    work = step_work(model, "table" if implementation == "table" else "exact", edges / batch.num_atoms)
    by_flops = "failed" not in rates and work.flops / rates["gemm_flops"] > work.bytes / rates["copy_bytes"]
    return {
        "structures": batch.num_structures,
        "atoms": batch.num_atoms,
        "edges": edges,
        "milliseconds": seconds * 1e3,
        "structures_per_second": batch.num_structures / seconds,
        "nanoseconds_per_edge": seconds / edges * 1e9,
        "peak_bytes_per_edge": peak / edges,
        "fraction_of_limit": of_limit(work, rates, edges, seconds),
        "limited_by": "FLOP" if by_flops else "bytes",
        "loss": loss,
    }


def attempt(what: str, run: Any) -> Any:
    """The result of run(), or why there is none: the next measurement goes on."""
    try:
        found = run()
    except Exception as error:
        found = {"failed": f"{type(error).__name__}: {error}"[:300]}
    print(what, found, flush=True)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def measure(out: Path, device: str) -> None:
    small = device == "cpu"
    result: dict[str, Any] = {
        **facts(),
        "what": "CUDA events around each call, medians; set-up, allocation and synchronisation are inside the timing",
        "device": device,
        "rates": attempt("rates", lambda: machine_rates(device)),
        "left_out": LEFT_OUT,
        "published_million_atoms_per_second": PUBLISHED,
        "radius_graph": {},
        "training_step": {},
    }
    for name, arguments in graph_sets(small).items():
        result["radius_graph"][name] = attempt(name, lambda a=arguments: measure_graph(*a, device, result["rates"]))
        write(out, result)
    for implementation in NATIVE if small else (*NATIVE, "plain"):
        for model in MODELS:
            key = f"{model}, {implementation}"
            call = (model, implementation, small, device, result["rates"])
            result["training_step"][key] = attempt(key, lambda c=call: measure_step(*c))
            write(out, result)


def small_inputs(device: str) -> None:
    """Every kernel on two small cells, in both precisions, results compared with the CPU's; exits with 1 where they
    differ."""
    crystals = [labelled(s) for s in read_json(SAMPLE) if s.num_atoms <= 4][:2]
    worst = 0.0
    for cell_list_atoms in (radius_graph_cuda.CELL_LIST_ATOMS, 0):  # 0: the cell list, which is for large structures
        radius_graph_cuda.CELL_LIST_ATOMS = cell_list_atoms
        for nearest in (None, 7):
            graphs = [radius_graph(*flat(crystals, where), 5.0, nearest) for where in ("cpu", device)]
            assert torch.equal(graphs[0].edge_index, graphs[1].edge_index.cpu()), "radius_graph differs"
    for model, implementation, dtype in product(MODELS, NATIVE, (torch.float32, torch.float64)):
        losses = []
        for where in ("cpu", device):
            network = build(model, implementation).to(where, dtype)
            network.cutoff, network.max_neighbors = 4.0, 9  # small
            losses.append(float(TrainingStep(network)(Batch.from_structures(crystals, dtype).to(where))))
        what = f"{model}, {implementation}, {dtype}"
        print(f"{what}: loss {losses[0]:.6f} on the CPU, {losses[1]:.6f} on {device}", flush=True)
        worst = max(worst, abs(losses[1] / losses[0] - 1))
    graph = radius_graph(*flat(crystals, device), 4.0)
    for dtype in (torch.float32, torch.float64):
        features = torch.randn(graph.num_atoms, 20, device=device, dtype=dtype, requires_grad=True)
        weights = edge_product(features, features, graph)
        gather_aggregate(weights, features, graph).sum().backward()
    if worst > 1e-4:
        sys.exit(f"a loss differs from the CPU's by {worst:.1e} of it")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=["measure", "small"])
    parser.add_argument("out", nargs="?", type=Path)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    options = parser.parse_args()
    if options.verb == "measure":
        measure(options.out, options.device)
    else:
        small_inputs(options.device)


if __name__ == "__main__":
    main()
