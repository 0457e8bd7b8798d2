"""What a step must compute and move per edge, counted by hand, and how fast this machine computes and moves.

Counts are of the leanest algorithm known to us, not of any program: arrays that are needed again are read once per
pass, neighbours' rows come from the cache and are not counted as memory traffic, and nothing per edge is stored between
passes but indices, lengths and their gradients. One multiply-add is 2 FLOP; an exponential or a logarithm counts as 10.

A training step with a loss on forces passes over the edges three times: forward; the derivative (of the energy in the
lengths, and in the features of the layer below); and the backward of the loss through both, which must evaluate filters
and their slopes again and sum the gradients of the filters' weights. With M radial functions that are not zero and n
filter columns, evaluating n filters is 2 M n FLOP, so that one layer needs, in units of 2 M n:

    pass                        filters  slopes  weights' gradient (values, slopes)
    forward                     1
    derivative                  1        1
    backward of the loss        1        1       2
    in all: 7

and the rest, per channel, as ELEMENTWISE says. Per atom a layer has GEMMs: forward once, and every backward through one
is twice the forward; with the second order 6 times in all.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from measuring import clock, in_turn

FILTER_PASSES = 7
GEMM_PASSES = 6

ELEMENTWISE = {"cgcnn": 50, "torchmd_et": 230}
"""FLOP per channel (of 2F gate and filter channels; of C channels) and edge of one layer, all passes, besides filters.

cgcnn: forward, adding three terms (2), two exponentials and a logarithm for two channels (15), product and sum (1); the
derivative again the activations (15) and their slopes (4), both sums (2), the product with the slopes (2); backward of
the loss: the activations in part (5: their second derivatives come from the same exponentials), products (4).
torchmd_et: forward 3 C for scores, 3 C for scalars, 15 C for vectors; about three times that in the derivative, which
has a row for each factor; about seven times in the backward of the loss, which has its product rule.
"""
SILU = 12
"""FLOP of a SiLU with its slope; exact filters of torchmd_et need one per column and pass."""


@dataclass(frozen=True)
class Work:
    """Per edge: FLOP, and bytes to and from memory."""

    flops: float
    bytes: float


def graph_work() -> Work:
    """Writing source and target (int64) and three shifts (int32); the search itself is not counted."""
    return Work(flops=0.0, bytes=2 * 8 + 3 * 4)


def gaussian_taps(count: int = 50, relative_width: float = 0.05, negligible: float = 1e-9) -> float:
    """How many of the Gaussians on [0, cutoff] are above `negligible` at a length in the middle."""
    reach = math.sqrt(-2 * math.log(negligible)) * relative_width * (count - 1)
    return min(float(count), 2 * reach)


def expnorm_taps(count: int = 50, cutoff: float = 8.0, negligible: float = 1e-9) -> float:
    """How many of the exp-normal functions are above `negligible` at 3/4 of the cutoff, the mean length of edges.

    They are Gaussians of exp(-5 length / cutoff), a variable that is small there: the lower half of them is missing.
    """
    lowest = math.exp(-cutoff)
    spacing, width = (1 - lowest) / (count - 1), 2 * (1 - lowest) / count
    reach = math.sqrt(-math.log(negligible)) * width
    below = min(math.exp(-5 * 0.75) - lowest, reach)
    return 1 + (below + reach) / spacing


def step_work(
    model: str, filters: str, neighbors: float, *, width: int = 4, hidden: int | None = None, layers: int | None = None
) -> Work:
    """A training step at the paper's sizes. width: bytes of a number.

    model: cgcnn or torchmd_et · filters: exact or table (4 cubic B-splines) · neighbors: edges per atom.
    """
    if model == "cgcnn":
        channels, layers = hidden or 100, layers or 4
        columns, taps = 2 * channels, 4.0 if filters == "table" else gaussian_taps()
        rows, elementwise, gemm = columns, float(columns * ELEMENTWISE[model]), 2 * channels * 2 * columns
    else:
        channels, layers = hidden or 128, layers or 8
        columns, taps = 4 * channels, 4.0 if filters == "table" else expnorm_taps()
        rows, elementwise = 9 * channels, float(channels * ELEMENTWISE[model])  # q, k, 3 v, 3 vectors, and the sums
        elementwise += 0 if filters == "table" else 3 * SILU * columns
        gemm = 2 * channels * (5 + 9 + 3) * channels  # q, k, 3 v; the vectors' projections; the output's
    flops = layers * (FILTER_PASSES * 2 * taps * columns + elementwise + GEMM_PASSES * gemm / neighbors)
    # The graph written and read; vectors and lengths, and their gradients, in three passes; per layer and pass an
    # index and a length, and two gradients of the length; per atom and layer its rows: read in three passes, their
    # gradients written in two and read in two.
    per_edge = 2 * 28 + 3 * 2 * 4 * width + layers * (3 * (8 + width) + 2 * width)
    per_atom = layers * rows * width * (3 + 2 + 2)
    return Work(flops=flops, bytes=per_edge + per_atom / neighbors)


def seconds_per_edge(work: Work, rates: dict[str, float]) -> float:
    """The larger of the time to compute and the time to move: none is hidden better than completely."""
    return max(work.flops / rates["gemm_flops"], work.bytes / rates["copy_bytes"])


def machine_rates(device: str, threads: int = 1, repeats: int = 7) -> dict[str, float]:
    """copy_bytes: read and written per second by a large copy · gemm_flops: per second, float32, no TF32."""
    if device == "cpu":
        torch.set_num_threads(threads)
    side = 1024 if device == "cpu" else 8192
    source = torch.ones(2**26 if device == "cpu" else 2**30, dtype=torch.float32, device=device)
    target = torch.empty_like(source)
    left, right = (torch.ones(side, side, device=device) for _ in range(2))
    product = torch.empty(side, side, device=device)
    runs = {"copy": lambda: target.copy_(source), "gemm": lambda: torch.mm(left, right, out=product)}
    for run in runs.values():
        run()
    if device == "cpu":
        seconds = in_turn(runs, repeats, clock(threads))
    else:
        from cuda_events import median_seconds

        seconds = {name: median_seconds(run, repeats) for name, run in runs.items()}
    return {
        "copy_bytes": 2 * source.numel() * source.element_size() / seconds["copy"],
        "gemm_flops": 2 * side**3 / seconds["gemm"],
    }
