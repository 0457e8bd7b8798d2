"""A table (speed.md) and a plot (speed.png) of the results that lie in benchmarks/results/.

    python benchmarks/summary.py [FOLDER]

Reads radius_graph.json, training_step.json and gpu.json, those that are there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib as mpl
from measuring import RESULTS

mpl.use("Agg")
import matplotlib.pyplot as plt

COLORS = {"exact": "#1f4e79", "table": "#2e8b57", "radius_graph": "#1f4e79", "radius_graph, nearest 250": "#2e8b57"}
PEER = "#b0b0b0"


def lines_of(rows: list[list[str]]) -> list[str]:
    """A markdown table; the first row is its head."""
    head, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *body)]


def provenance(result: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    machine = result.get("gpu") or f"{result['machine']}, {result['cores']} cores, {result['kernels']} kernels"
    return f"{machine}; {result['date'][:10]}; Python {result['python']}, {versions}. `{result['command']}`"


def threads_of(count: int) -> str:
    return "1 core" if count == 1 else f"{count} cores"


def graph_tables(result: dict[str, Any]) -> list[str]:
    rows = [(s, m) for s, entry in result["sets"].items() for m in entry["measurements"]]
    names = list(dict.fromkeys(name for _, m in rows for name in m["million_edges_per_second"]))
    text = ["## Neighbour lists, million directed edges per second", "", provenance(result), ""]
    table = [["set", "Å", "", *names, "to the fastest exact peer", "of the limit"]]
    remarks = []
    for set_name, m in rows:
        rates = m["million_edges_per_second"]
        inexact = m["other_edges"]
        cells = [f"{rates[n]:.1f}{'*' if n in inexact else ''}" if n in rates else "" for n in names]
        ratio = f"{m['ratio']} ({m['fastest_exact_peer']})" if m["ratio"] else ""
        place = [set_name, f"{m['cutoff']:g}", threads_of(m["threads"])]
        table.append([*place, *cells, ratio, f"{m.get('fraction_of_limit', 0):.0%}"])
        remarks += [
            f"- {set_name}, {m['cutoff']:g} Å: {n} lists {k} edges, not {m['edges']}" for n, k in inexact.items()
        ]
        remarks += [f"- {set_name}, {m['cutoff']:g} Å: {n}: {why}" for n, why in m["failed"].items()]
    remarks += [f"- {name}: left out, {why}" for name, why in result.get("left_out", {}).items()]
    return [*text, *lines_of(table), "", *dict.fromkeys(remarks), ""]


def step_tables(result: dict[str, Any]) -> list[str]:
    text = ["## One training step: energy, forces, stress, second order", "", provenance(result), ""]
    table = [
        ["network", "batch", "", "implementation", "µs/edge", "to plain", "peak kB/edge", "limit µs/edge", "reached"]
    ]
    for m in result["measurements"]:
        found = m["implementations"]
        plain = found.get("plain", {}).get("microseconds_per_edge")
        for name, r in found.items():
            table.append(
                [
                    m["model"],
                    f"{m['set']}: {m['structures']} with {m['atoms']:,} atoms, {m['edges']:,} edges",
                    threads_of(m["threads"]),
                    name,
                    f"{r['microseconds_per_edge']:.1f}",
                    f"{plain / r['microseconds_per_edge']:.1f} x" if plain else "",
                    f"{r['peak_bytes_per_edge'] / 1e3:.2f}",
                    f"{r['limit_microseconds']:.1f}",
                    f"{r['fraction_of_limit']:.0%}",
                ]
            )
        for name, why in m["left_out"].items():
            table.append([m["model"], m["set"], threads_of(m["threads"]), name, why, "", "", "", ""])
    return [*text, *lines_of(table), ""]


def share(value: float | None) -> str:
    return "" if value is None else f"{value:.0%}"


def gpu_tables(result: dict[str, Any]) -> list[str]:
    stages = ", ".join(f"{name} {stage['exit_status']}" for name, stage in result["stages"].items())
    place = provenance(result) if "versions" in result else f"{result['machine']}; {result['date'][:10]}"
    text = ["## On a GPU", "", place, f"Exit statuses: {stages}.", ""]
    table = [["radius graph", "million atoms/s", "million edges/s", "of the copy bandwidth"]]
    for name, m in result.get("radius_graph", {}).items():
        if "failed" in m:
            table.append([name, m["failed"], "", ""])
            continue
        atoms, edges = f"{m['million_atoms_per_second']:.1f}", f"{m['million_edges_per_second']:.0f}"
        table.append([name, atoms, edges, share(m["fraction_of_copy_bandwidth"])])
    steps = [["training step", "structures/s", "ns/edge", "peak bytes/edge", "of the limit"]]
    for name, m in result.get("training_step", {}).items():
        if "failed" in m:
            steps.append([name, m["failed"], "", "", ""])
            continue
        speed = [f"{m['structures_per_second']:.0f}", f"{m['nanoseconds_per_edge']:.1f}"]
        steps.append(
            [name, *speed, f"{m['peak_bytes_per_edge']:.0f}", f"{share(m['fraction_of_limit'])} ({m['limited_by']})"]
        )
    return [*text, *lines_of(table), "", *lines_of(steps), ""]


def plot(results: dict[str, Any], path: Path) -> None:
    """Bars of one core: edges per second of every list, microseconds per edge of every step, each with its limit."""
    panels = []
    for set_name, entry in results.get("radius_graph", {"sets": {}})["sets"].items():
        for m in entry["measurements"]:
            if m["threads"] == 1:
                title = f"{set_name}, {m['cutoff']:g} Å\nmillion edges/s"
                panels.append((title, m["million_edges_per_second"], {}))
    for m in results.get("training_step", {"measurements": []})["measurements"]:
        if m["threads"] == 1:
            found = m["implementations"]
            values = {name: r["microseconds_per_edge"] for name, r in found.items()}
            limits = {name: r["limit_microseconds"] for name, r in found.items()}
            panels.append((f"{m['model']}, {m['set']}\nµs per edge (| limit)", values, limits))
    if not panels:
        return
    columns = 3
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 2.2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, values, limits) in zip(axes.flat, panels, strict=False):
        names = list(values)[::-1]
        axis.barh(names, [values[n] for n in names], color=[COLORS.get(n, PEER) for n in names])
        for place, name in enumerate(names):
            axis.text(values[name], place, f" {values[name]:.3g}", va="center", fontsize=7)
            if name in limits:
                axis.plot([limits[name]] * 2, [place - 0.4, place + 0.4], color="#c00000", linewidth=1.5)
        axis.set_title(title, fontsize=8)
        axis.tick_params(labelsize=7)
        axis.margins(x=0.15)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=110, metadata={"Software": None})


def main() -> None:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else RESULTS
    tables = {"radius_graph": graph_tables, "training_step": step_tables, "gpu": gpu_tables}
    results = {
        name: json.loads((folder / f"{name}.json").read_text()) for name in tables if (folder / f"{name}.json").exists()
    }
    text = ["# Speed", "", "Written by `python benchmarks/summary.py` from the JSON files beside it.", ""]
    for name, result in results.items():
        text += tables[name](result)
    (folder / "speed.md").write_text("\n".join(text))
    plot(results, folder / "speed.png")
    print(f"{folder / 'speed.md'} and speed.png: {', '.join(results) or 'no results'}")


if __name__ == "__main__":
    main()
