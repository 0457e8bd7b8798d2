"""What `dpt-hpc bench scaling` found, as a table and as a plot."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, PercentFormatter

COLORS = {
    "work": "#1f4e79",
    "fixed": "#7a9cc0",
    "graph": "#4a7fb0",
    "forward": "#1f4e79",
    "backward": "#153552",
    "update": "#7a9cc0",
    "imbalance": "#c77700",
    "jitter": "#e3b04b",
    "all-reduce": "#a8324a",
    "bandwidth": "#a8324a",
    "latency": "#dd7a8c",
    "division": "#8c6d46",
    "data": "#2e8b57",
    "checkpoint": "#7d5ba6",
    "other": "#b0b0b0",
}
STYLE: Any = {
    "font.size": 8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlesize": 8.5,
    "axes.titlelocation": "left",
    "grid.alpha": 0.35,
    "grid.linewidth": 0.5,
    "legend.frameon": False,
    "figure.constrained_layout.use": True,
}

Result = Mapping[str, Any]

EFFICIENCY = {"wall": "efficiency_by_edges", "cpu": "efficiency_by_cpu"}
CLOCKS = {"wall": "clock", "cpu": "processor's time (the machine was busy)"}


def write_scaling_report(result: Result, out: Path) -> str:
    """Write scaling_MODE.md and .png into `out`; returns the text, and where it went."""
    lines = scaling_lines(result)
    name = f"scaling_{result['mode']}"
    (out / f"{name}.md").write_text("\n".join(lines) + "\n")
    write_scaling_plot(result, out / f"{name}.png")
    return "\n".join([*lines, "", f"wrote {out / name}.json, .md and .png"])


def scaling_lines(result: Result) -> list[str]:
    """Markdown: what was measured where, the parts of a step, the prediction with its assumptions and verdicts."""
    records = result["measurements"]
    first = records[0]
    what = "the structures of a rank stay" if result["mode"] == "weak" else "the structures of a step stay"
    lines = [f"# {result['mode'].capitalize()} scaling ({what})", ""]
    dataset = first["dataset"]
    lines += [
        f"{first['processor']}, {first['cores']} cores, {first['gpu'] or 'no GPU'}; {first['threads']} thread(s) "
        f"per rank, DeepSpeed's engine with ZeRO stage {first['zero_stage']} at every size, "
        f"data.store {first['store']}; "
        f"{first['structures']:,} structures of a step of {first['ranks']} rank(s), {first['steps']} steps; "
        f"{dataset['structures']:,} structures of {dataset['edges'] / dataset['structures']:,.0f} edges. "
        "By edges: efficiency in edges/s; by CPU: in edges per second of the processor, which other programs do not "
        "stretch, but which sees no waiting; CPU: the processor's share of the time; load: of the last minute, before "
        "and after.",
        "",
    ]
    head = ["ranks", "nodes", "structures/s", "edges/s", "s/step", "±", "efficiency", "by edges", "by CPU", "CPU"]
    rows = [
        [
            f"{r['ranks']:,}",
            f"{r['nodes']:,}",
            f"{r['structures_per_second']:.4g}",
            f"{r['edges_per_second']:.4g}",
            f"{r['seconds_per_step']:.4g}",
            "" if r["spread"] is None else f"{r['spread']:.0%}",
            f"{r['efficiency']:.0%}",
            f"{r['efficiency_by_edges']:.0%}",
            f"{r['efficiency_by_cpu']:.0%}",
            f"{r['cpu_share']:.0%}",
            f"{r['load_before'][0]:g} to {r['load_after'][0]:g}",
        ]
        for r in records
    ]
    lines += [*_table([[*head, "load"], *rows]), "", "Parts of a step, seconds, of each rank:", ""]
    parts = list(first["parts"])
    rows = [
        [f"{r['ranks']:,}", str(s["rank"]), f"{s['edges_per_step']:,.0f}", *[f"{s['parts'][p]:.4f}" for p in parts]]
        for r in records
        for s in r["per_rank"]
    ]
    lines += _table([["ranks", "rank", "edges", *parts], *rows])
    lines += ["", "What is lost against the fewest ranks, as shares of a step:", ""]
    for r in records[1:]:
        total = sum(r["parts"].values())
        told = [f"{p} {s / total:+.1%}" for p, s in sorted(r["lost_seconds"].items(), key=lambda item: -item[1])]
        lines.append(f"- {r['ranks']:,} ranks: {', '.join(told)}")
    lines += ["", "Checkpoint and network:", ""]
    for r in records:
        c, n = r["checkpoint"], r["network"]
        network = (
            "" if n["latency"] is None else f"; all-reduce {n['latency'] * 1e6:.0f} µs, {n['bandwidth'] / 1e9:.2f} GB/s"
        )
        lines.append(
            f"- {r['ranks']:,} rank(s): a checkpoint of {c['bytes'] / 1e6:.2f} MB holds the ranks up for "
            f"{c['held_seconds']:.3f} s and is written after {c['written_seconds']:.3f} s{network}"
        )
    if prediction := result.get("prediction"):
        lines += ["", *_prediction_lines(prediction)]
    return lines


def _prediction_lines(prediction: Result) -> list[str]:
    network, work, conditions = prediction["network"], prediction["work"], prediction["conditions"]
    lines = [
        "## Prediction",
        "",
        f"Given: latency {network['latency'] * 1e6:g} µs and {network['bandwidth'] / 1e9:g} GB/s of each rank; a "
        f"checkpoint every {conditions['checkpoint_minutes']:g} minutes; jitter {conditions['jitter']:.1%}; "
        "the file system gives "
        + (f"{conditions['file_system'] / 1e9:g} GB/s" if conditions["file_system"] else "enough")
        + f". Measured by the {CLOCKS[prediction['clock']]}: {work['fixed'] * 1e3:.2f} ms of a step are fixed, "
        f"{work['per_edge'] * 1e6:.3f} µs per edge, {work['edges']:,.0f} edges per structure, "
        f"{work['gradient_bytes'] / 1e6:.3f} MB of gradients in {work['messages']:g} message(s), "
        f"{work['sums']:g} small sums, "
        f"{work['structure_bytes'] / 1e3:.1f} kB of each structure read from a shared file system.",
        "",
    ]
    names = list(prediction["points"][0]["terms"])
    rows = [
        [
            f"{p['ranks']:,}",
            f"{p['structures_per_second']:,.0f}",
            f"{p['efficiency']:.1%}",
            f"{p['imbalance']:.3f}",
            p["algorithm"],
            *[f"{p['terms'][name] * 1e3:.3g}" for name in names],
            p["bent_by"] or "",
        ]
        for p in prediction["points"]
    ]
    head = [
        "ranks",
        "structures/s",
        "efficiency",
        "max/mean",
        "all-reduce",
        *[f"{name}, ms" for name in names],
        "bent by",
    ]
    lines += [*_table([head, *rows]), ""]
    lines += [f"- {verdict}" for verdict in prediction["verdicts"]]
    for check in prediction["checked"]:
        lines.append(
            f"- the same arithmetic with the network measured here: {check['efficiency']:.0%} at "
            f"{check['ranks']:,} ranks, where {check['measured']:.0%} was measured by the clock, "
            f"{check['measured_by_cpu']:.0%} by the processor's time"
        )
    return [*lines, "", "Assumptions:", "", *[f"- {assumption}" for assumption in prediction["assumptions"]]]


def write_scaling_plot(result: Result, path: Path) -> Path:
    """A PNG: the parts of a measured step, and where there is a prediction its curve and the terms that bend it."""
    with mpl.rc_context(STYLE):
        prediction = result.get("prediction")
        figure = Figure(figsize=(9.6 if prediction else 4.4, 3.4))
        FigureCanvasAgg(figure)
        panels = figure.subplots(1, 3 if prediction else 1, squeeze=False)[0]
        clock = prediction["clock"] if prediction else "wall"
        _parts_panel(panels[0], result["measurements"], result["mode"], clock)
        if prediction:
            _curve_panel(panels[1], result["measurements"], prediction)
            _terms_panel(panels[2], prediction)
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=160, metadata={"Software": None})
    return path


def _parts_panel(axes: Any, records: Sequence[Result], mode: str, clock: str) -> None:
    labels = [f"{r['ranks']:,}\n{r[EFFICIENCY[clock]]:.0%}" for r in records]
    floor = [0.0] * len(records)
    for name in records[0]["parts"]:
        values = [r["parts"][name] for r in records]
        axes.bar(labels, values, bottom=floor, color=COLORS.get(name, "#b0b0b0"), width=0.6, label=name)
        floor = [f + v for f, v in zip(floor, values, strict=True)]
    axes.set_ylim(0, max(floor) * 1.45)
    axes.legend(ncols=2, fontsize=7, loc="upper left", handlelength=1.0)
    loads = ", ".join(f"{r['load_before'][0]:g}" for r in records)
    by = "edges/s" if clock == "wall" else "edges per CPU second"
    axes.set(
        title=f"measured step, {mode} scaling" + ("" if clock == "wall" else "; busy machine"),
        ylabel="seconds",
        xlabel=f"ranks, efficiency by {by}\n(1-minute load before: {loads}; {records[0]['cores']} cores)",
    )


def _curve_panel(axes: Any, records: Sequence[Result], prediction: Result) -> None:
    points = prediction["points"]
    axes.plot([p["ranks"] for p in points], [p["efficiency"] for p in points], color=COLORS["work"], label="predicted")
    axes.plot(
        [r["ranks"] for r in records],
        [r[EFFICIENCY[prediction["clock"]]] for r in records],
        "o",
        color=COLORS["imbalance"],
        label="measured here" + ("" if prediction["clock"] == "wall" else " (CPU time)"),
        markersize=4,
    )
    network = prediction["network"]
    _rank_axis(axes, f"ranks\n({network['latency'] * 1e6:g} µs, {network['bandwidth'] / 1e9:g} GB/s per rank)")
    axes.set_ylim(0, 1.05)
    axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    axes.set(title="efficiency, predicted")
    axes.legend(loc="lower left")


def _terms_panel(axes: Any, prediction: Result) -> None:
    points = [p for p in prediction["points"] if p["ranks"] > 1]
    ranks = [p["ranks"] for p in points]
    drawn = 0.0
    for name in points[0]["losses"]:
        shares = [max(p["losses"][name], 0.0) / p["seconds"] for p in points]
        if max(shares) > 1e-6:
            axes.plot(ranks, shares, color=COLORS.get(name, "#b0b0b0"), label=name)
            drawn = max(drawn, *shares)
    _rank_axis(axes, "ranks")
    if drawn > 0:
        axes.set_yscale("log")
        axes.set_ylim(max(drawn * 1e-4, 1e-6), min(3 * drawn, 3))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.3g}%"))
        axes.legend(fontsize=7)
    axes.set(title="what bends it: share of a step")


def _rank_axis(axes: Any, label: str) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}" if math.isfinite(value) else ""))
    axes.grid(axis="both")
    axes.set_xlabel(label)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    head, *body = rows
    return ["| " + " | ".join(row) + " |" for row in (head, ["---:"] * len(head), *body)]
