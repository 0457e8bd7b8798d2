"""Figures as SVG for inlining. Colours are roles, resolved by the page's style sheet, so that one figure serves a
light page, a dark page and print; text stays text, in the page's own typeface."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any
from xml.etree import ElementTree

import matplotlib
import numpy as np
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.collections import PolyCollection
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullLocator
from numpy.typing import NDArray

from dpt_hpc.report.wording import MINUS, superscript

Array = NDArray[np.float64]

INK, RULE, FIRST, SECOND, THIRD = "#010203", "#020304", "#030405", "#040506", "#050607"
ROLES = {
    INK: "var(--ink-soft)",
    RULE: "var(--rule)",
    FIRST: "var(--first)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
"""Stand-in colours of matplotlib's output, and what the style sheet calls them."""

STYLE: dict[str, Any] = {
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.edgecolor": RULE,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "text.color": INK,
    "text.parse_math": False,
    "xtick.color": RULE,
    "ytick.color": RULE,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "xtick.direction": "out",
    "ytick.direction": "out",
    "grid.color": RULE,
    "grid.linewidth": 0.5,
    "grid.alpha": 0.55,
    "lines.solid_capstyle": "round",
    "legend.frameon": False,
    "legend.handlelength": 1.6,
    "legend.columnspacing": 1.4,
    "figure.constrained_layout.use": True,
}

POINTS_AT_MOST = 600
"""More points than this are drawn as densities."""

SHADES = (0.24, 0.36, 0.5, 0.65, 0.82, 1.0)

NAMESPACE = "http://www.w3.org/2000/svg"
XLINK = "{http://www.w3.org/1999/xlink}href"


@dataclass(frozen=True)
class Line:
    """One curve. role: first, second, third (a colour). faint: in the background. points: marked, not only joined."""

    label: str
    x: Array
    y: Array
    role: str = FIRST
    faint: bool = False
    dashed: bool = False


def curves(
    key: str,
    title: str,
    lines: Sequence[Line],
    xlabel: str,
    ylabel: str,
    *,
    best: float | None = None,
    log: bool = True,
) -> str:
    """Curves over epochs or steps; `best` marks a place on the x axis. key: unique within the page."""
    with _style(key):
        figure, axes = _figure(4.4, 2.75)
        for line in lines:
            few = np.isfinite(line.y).sum() <= 12
            axes.plot(
                line.x,
                line.y,
                color=line.role,
                alpha=0.35 if line.faint else 1.0,
                linewidth=0.9 if line.faint else 1.6,
                linestyle=(0, (4, 2)) if line.dashed else "-",
                marker="o" if few and not line.faint else None,
                markersize=3.2,
                label=_printable(line.label) or "_",
            )
        values = np.concatenate([line.y[np.isfinite(line.y)] for line in lines])
        if log and len(values) and (values > 0).all():
            _log_axis(axes, values)
        else:
            axes.yaxis.set_major_formatter(FuncFormatter(_tick))
            axes.yaxis.set_major_locator(MaxNLocator(5))
        if best is not None:
            axes.axvline(best, color=INK, linewidth=0.8, linestyle=(0, (1, 2)))
        axes.grid(axis="y")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.xaxis.set_major_formatter(FuncFormatter(_tick))
        axes.set(xlabel=xlabel, ylabel=_printable(ylabel))
        if sum(bool(line.label) for line in lines) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1.0), ncols=3, borderpad=0.1)
        return _svg(figure, key, title)


def parity(key: str, title: str, true: Array, predicted: Array, unit: str) -> str:
    """Predicted against true values, both (M,), as points or, for many, as hexagons shaded by count."""
    finite = np.isfinite(true) & np.isfinite(predicted)
    true, predicted = true[finite], predicted[finite]
    with _style(key):
        figure, axes = _figure(3.5, 3.35)
        axes.set_aspect("equal", adjustable="box")
        low, high = _limits(true, predicted)
        axes.plot([low, high], [low, high], color=INK, linewidth=0.8, linestyle=(0, (4, 3)), zorder=3)
        if len(true) > POINTS_AT_MOST:
            _density(axes, true, predicted, low, high)
        else:
            axes.plot(true, predicted, "o", color=FIRST, alpha=0.6, markersize=3.4, markeredgewidth=0)
        suffix = f" ({_printable(unit)})" if unit else ""
        axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"true{suffix}", ylabel=f"predicted{suffix}")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
            axis.set_major_formatter(FuncFormatter(_tick))
        axes.grid()
        return _svg(figure, key, title)


def _style(key: str) -> AbstractContextManager[None]:
    """matplotlib's settings for one figure, whose ids then depend on `key` alone."""
    settings: Any = {**STYLE, "svg.hashsalt": key}
    return matplotlib.rc_context(settings)


def _figure(width: float, height: float) -> tuple[Figure, Any]:
    """Inches, of 72 SVG units each."""
    figure = Figure(figsize=(width, height))
    FigureCanvasSVG(figure)
    figure.patch.set_visible(False)
    axes = figure.add_subplot()
    axes.patch.set_visible(False)
    return figure, axes


def _limits(true: Array, predicted: Array) -> tuple[float, float]:
    both = np.concatenate([true, predicted])
    low, high = (float(both.min()), float(both.max())) if len(both) else (0.0, 1.0)
    margin = 0.04 * (high - low) or 0.5 * abs(high) or 0.5
    return low - margin, high + margin


def _density(axes: Any, true: Array, predicted: Array, low: float, high: float) -> None:
    """Hexagons whose opacity grows with the logarithm of their count, in few steps (many steps are a large page)."""
    hexagons = axes.hexbin(true, predicted, gridsize=60, extent=(low, high, low, high), mincnt=1)
    counts = np.asarray(hexagons.get_array(), dtype=np.float64)
    level = np.log(counts) / max(np.log(counts.max()), 1e-9) * (len(SHADES) - 1)
    opacity = np.asarray(SHADES)[np.rint(level).astype(int)]
    hexagons.set_array(None)
    rgb = matplotlib.colors.to_rgb(FIRST)
    hexagons.set_facecolors([(*rgb, a) for a in opacity])
    hexagons.set_edgecolors("none")
    hexagons.set_linewidth(0)
    assert isinstance(hexagons, PolyCollection)


def _printable(text: str) -> str:
    """Without what XML cannot hold; a leading underscore, which hides a label from matplotlib's legend, is kept."""
    text = "".join(c if c.isprintable() else "\ufffd" for c in text)
    return f"\u200b{text}" if text.startswith("_") else text


def _log_axis(axes: Any, values: Array) -> None:
    axes.set_yscale("log")
    low, high = float(values.min()), float(values.max())
    decades = np.log10(high / low)
    if decades < 0.7:
        margin = 0.08 * (high - low) or 0.1 * high
        ticks = MaxNLocator(5, steps=[1, 2, 5, 10]).tick_values(low, high) if high > low * 1.0001 else [low]
        axes.set_ylim(max(low - margin, low * 0.5), high + margin)
        axes.yaxis.set_major_locator(FixedLocator([t for t in ticks if low - margin <= t <= high + margin and t > 0]))
    else:
        subs = (1.0, 2.0, 5.0) if decades < 2.2 else (1.0,)
        axes.yaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.yaxis.set_minor_locator(NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(_tick))


def _tick(value: float, _: int | None = None) -> str:
    if value == 0:
        return "0"
    if 1e-4 <= abs(value) < 1e5:
        return f"{value:.6g}".replace("-", MINUS)
    mantissa, exponent = f"{value:.3e}".split("e")
    mantissa = f"{float(mantissa):g}"
    power = f"10{superscript(int(exponent))}"
    return (power if mantissa == "1" else f"{mantissa}×{power}").replace("-", MINUS)


def _svg(figure: Figure, key: str, title: str) -> str:
    """The figure as an <svg> element: no width of its own, unique ids, a label for screen readers."""
    out = io.StringIO()
    figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    ElementTree.register_namespace("", NAMESPACE)
    root = ElementTree.fromstring(out.getvalue())
    for parent in list(root.iter()):
        for child in list(parent):
            if child.tag.rpartition("}")[2] in ("metadata", "style"):
                parent.remove(child)
    _rename_ids(root, key)
    for node in root.iter():
        if XLINK in node.attrib:
            node.set("href", node.attrib.pop(XLINK))
        for name in ("d", "transform", "x", "y"):
            if name in node.attrib:
                node.set(name, _shorter(node.attrib[name]))
        if "style" in node.attrib:
            node.set("style", _themed(node.attrib["style"]))
    for name in ("width", "height", "version"):
        root.attrib.pop(name, None)
    root.set("role", "img")
    root.set("aria-label", title)
    root.set("class", "plot")
    return ElementTree.tostring(root, encoding="unicode")


def _rename_ids(root: ElementTree.Element, key: str) -> None:
    """Drop ids that nothing refers to, and prefix the others: a page holds many figures."""
    text = ElementTree.tostring(root, encoding="unicode")
    used = set(re.findall(r'(?:href="#|url\(#)([^")]+)', text))
    for node in root.iter():
        identity = node.get("id")
        if identity is not None and identity not in used:
            del node.attrib["id"]
        elif identity is not None:
            node.set("id", f"{key}-{identity}")
        for name, value in node.attrib.items():
            if name.endswith("href") and value.startswith("#"):
                node.set(name, f"#{key}-{value[1:]}")
            elif "url(#" in value:
                node.set(name, value.replace("url(#", f"url(#{key}-"))


def _themed(style: str) -> str:
    style = re.sub(r"font: ([\d.]+px)[^;]*", r"font-size: \1", style)
    style = re.sub(r"font-family:[^;]*;?", "", style)
    for stand_in, role in ROLES.items():
        style = style.replace(stand_in, role)
    return re.sub(r"\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}", style).strip()


def _shorter(numbers: str) -> str:
    """Coordinates to a hundredth of a point: a third of the bytes, no visible difference."""
    return re.sub(r"-?\d+\.\d{3,}", lambda m: f"{float(m[0]):.2f}".rstrip("0").rstrip("."), numbers)
