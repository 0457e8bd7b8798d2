"""What narrower matrix products cost: a trained network in float32, bf16 and (on a GPU) tf32, against float64.

    python benchmarks/precision.py RUN_OR_CHECKPOINT DATASET [--structures 100] [--device cpu|cuda] [--out FILE.json]

RUN_OR_CHECKPOINT from `dpt-hpc pretrain`, DATASET from `dpt-hpc ingest` with energies, forces and stresses. Differences
are mean absolute ones over all components, the errors those against the dataset's labels. The gradient is that of the
loss 1:500:500 over these structures in all weights; its difference is relative, in the norm.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measuring import facts, write
from torch import Tensor

from dpt_hpc.data.shards import Dataset
from dpt_hpc.models import EnergyModel, predict, set_precision
from dpt_hpc.structure import Batch
from dpt_hpc.train.checkpoint import load_card, load_model

UNITS = {"energy": "meV/atom", "forces": "meV/Å", "stress": "meV/Å³"}
BATCH = 25


def evaluate(model: EnergyModel, batches: list[Batch]) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor]:
    """Predictions and labels in eV, Å, per atom for energies, and the gradient of the loss."""
    found: dict[str, list[Tensor]] = {label: [] for label in UNITS}
    labels: dict[str, list[Tensor]] = {label: [] for label in UNITS}
    structures = sum(len(batch.energy) for batch in batches)
    atoms_in_all = sum(len(batch.forces) for batch in batches)
    model.train()
    model.zero_grad()
    for batch in batches:
        p = predict(model, batch)
        assert p.forces is not None
        assert p.stress is not None
        loss = (p.energy - batch.energy).abs().sum() / structures
        loss = loss + 500 * (p.forces - batch.forces).abs().sum() / (3 * atoms_in_all)
        loss = loss + 500 * (p.stress - batch.stress).abs().sum() / (9 * structures)
        loss.backward()
        atoms = batch.atoms_per_structure
        for label, value, true in (
            ("energy", p.energy / atoms, batch.energy / atoms),
            ("forces", p.forces, batch.forces),
            ("stress", p.stress, batch.stress),
        ):
            found[label].append(value.detach().double().cpu())
            labels[label].append(true.double().cpu())
    gradient = torch.cat([p.grad.flatten().double().cpu() for p in model.parameters() if p.grad is not None])
    return {k: torch.cat(v) for k, v in found.items()}, {k: torch.cat(v) for k, v in labels.items()}, gradient


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    torch.manual_seed(0)
    dataset = Dataset.open((str(arguments.dataset),))
    indices = np.linspace(0, len(dataset) - 1, arguments.structures).astype(int)
    parts = np.array_split(indices, -(-len(indices) // BATCH))
    results: dict[str, Any] = {}
    truth: tuple[dict[str, Tensor], dict[str, Tensor], Tensor] | None = None
    narrow = ["bf16", "tf32"] if arguments.device == "cuda" else ["bf16"]
    for precision in ("float64", "float32", *narrow):
        dtype = torch.float64 if precision == "float64" else torch.float32
        model = load_model(arguments.checkpoint).to(arguments.device, dtype)
        if precision in narrow:
            set_precision(model, precision)  # type: ignore[arg-type]
        batches = [dataset.read(part, dtype=dtype).to(torch.device(arguments.device)) for part in parts]
        found, labels, gradient = evaluate(model, batches)
        truth = truth or (found, labels, gradient)
        results[precision] = {
            label: {
                "difference": float((found[label] - truth[0][label]).abs().mean()) * 1e3,
                "largest_difference": float((found[label] - truth[0][label]).abs().max()) * 1e3,
                "error": float((found[label] - labels[label]).abs().mean()) * 1e3,
            }
            for label in UNITS
        }
        results[precision]["gradient"] = float((gradient - truth[2]).norm() / truth[2].norm())
    return {
        **facts(),
        "device": arguments.device,
        "checkpoint": arguments.checkpoint.name,
        "dataset": arguments.dataset.name,
        "network": load_card(arguments.checkpoint).options.name,
        "structures": len(indices),
        "atoms": int(dataset.num_atoms[indices].sum()),
        "units": UNITS,
        "precisions": results,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("dataset", type=Path)
    parser.add_argument("--structures", type=int, default=100)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    results = measure(arguments)
    where = results["gpu"] if arguments.device == "cuda" else results["machine"]
    print(f"{results['network']}, {results['structures']} structures, {results['atoms']} atoms, {where}")
    columns = [f"{label}, {unit}: difference (largest) · error" for label, unit in UNITS.items()]
    print("| products in | " + " | ".join(columns) + " | weight gradient, relative |")
    print("|---" * (len(columns) + 2) + "|")
    for precision, values in results["precisions"].items():
        cells = [
            f"{v['difference']:.2g} ({v['largest_difference']:.2g}) · {v['error']:.4g}"
            for v in (values[label] for label in UNITS)
        ]
        print(f"| {precision} | " + " | ".join(cells) + f" | {values['gradient']:.1e} |")
    if arguments.out:
        write(arguments.out, results)


if __name__ == "__main__":
    main()
