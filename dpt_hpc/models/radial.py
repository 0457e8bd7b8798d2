"""Radial bases: functions of an edge length, and their tabulation on uniform cubic B-splines."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional

from dpt_hpc.ops import RadialBasis, RadialTaps, spline_taps

TABLE_PADDING = 16
"""Knots beyond each end of the table. The end condition of an interpolating spline leaves an error there that decays
by a factor 3.7 per knot, so 16 knots put it below float64's rounding at every length that an edge can have."""


def gaussian_basis(cutoff: float, count: int, relative_width: float) -> RadialBasis:
    """`count` Gaussians exp(-0.5 ((d - mu)/sigma)^2), mu from 0 to `cutoff` Å, sigma = relative_width * cutoff."""
    return RadialBasis(
        kind="gaussian", count=count, start=0.0, spacing=cutoff / (count - 1), width=relative_width * cutoff
    )


def cosine_cutoff(lengths: Tensor, cutoff: float) -> Tensor:
    """0.5 (cos(pi d / cutoff) + 1) (Behler 2011, eq. 5), lengths in Å, any shape: 1 at d = 0, 0 with slope 0 at the
    cutoff. Not clamped beyond it, so that a table can go on smoothly."""
    return 0.5 * (torch.cos(lengths * (math.pi / cutoff)) + 1)


def polynomial_cutoff(lengths: Tensor, cutoff: float) -> Tensor:
    """1 - 28 x^6 + 48 x^7 - 21 x^8, x = d / cutoff (Gasteiger et al. 2020, eq. 8 with p = 6): 1 at d = 0, 0 with slope
    and curvature 0 at the cutoff. Flatter than the cosine at first, and steeper then. lengths in Å, any shape."""
    x = lengths / cutoff
    return 1 - x**6 * (28 - 48 * x + 21 * x * x)


def envelope_of(kind: Literal["cosine", "polynomial"], edge_lengths: Tensor, cutoff: float) -> Tensor:
    """The envelope (E,) of edges of these lengths (E,) Å; 0 beyond the cutoff, where rounding may leave an edge."""
    function = {"cosine": cosine_cutoff, "polynomial": polynomial_cutoff}[kind]
    return function(edge_lengths.clamp(max=cutoff), cutoff)


@dataclass(frozen=True)
class RadialPoints:
    """Lengths (L,) Å at which a network evaluates its filters, and the cosine cutoff (L,) there.

    taps: None where the lengths are the edges'; with a table, its splines on the edges, and the lengths are its knots.
    """

    lengths: Tensor
    envelope: Tensor
    taps: RadialTaps | None = None


class RadialGrid(nn.Module):
    """Where filters that depend on the length alone are evaluated: on every edge, or at the knots of a uniform table.

    With `knots`, a filter may be any smooth function of the length, a whole network too: its values at the knots become
    coefficients (`spline_coefficients`), and `ops.radial_messages` interpolates them on the edges.
    """

    knots: Tensor | None

    def __init__(self, cutoff: float, knots: int | None) -> None:
        super().__init__()
        self.cutoff = cutoff
        self.splines = None if knots is None else spline_basis(cutoff, knots)
        at = None
        if self.splines is not None:
            index = torch.arange(self.splines.count, dtype=torch.float64)
            at = self.splines.start + index * self.splines.spacing
        # In float64 until the model is cast, so that a float64 model has the whole precision.
        self.register_buffer("knots", at, persistent=False)

    def forward(self, edge_lengths: Tensor) -> RadialPoints:
        """edge_lengths (E,) Å."""
        if self.splines is None or self.knots is None:
            return RadialPoints(edge_lengths, envelope_of("cosine", edge_lengths, self.cutoff))
        knots = self.knots.to(edge_lengths.dtype)
        return RadialPoints(knots, cosine_cutoff(knots, self.cutoff), spline_taps(edge_lengths, self.splines))


def tabulate(basis: RadialBasis, cutoff: float, knots: int) -> tuple[RadialBasis, Tensor]:
    """The same functions as a table of cubic B-splines with `knots` intervals on [0, cutoff].

    Returns the spline basis of K functions and the matrix (K, basis.count), float64, such that
    spline(d) @ matrix @ weights interpolates basis(d) @ weights at every knot: linear in the weights, so the table of
    any filter is one small GEMM per step (kernels.md, lead 2). For 50 Gaussians of 0.4 Å on 8 Å and 512 knots the
    largest error is 1e-7 of the largest value, and 2e-5 of the largest slope.
    """
    splines = spline_basis(cutoff, knots)
    index = torch.arange(splines.count, dtype=torch.float64)
    return splines, spline_interpolation(splines.count) @ basis(splines.start + index * splines.spacing)


def spline_basis(end: float, knots: int) -> RadialBasis:
    """Uniform cubic B-splines with `knots` intervals on [0, end], and TABLE_PADDING more beyond either end."""
    spacing = end / knots
    first = -TABLE_PADDING - 1
    return RadialBasis(
        kind="bspline",
        count=knots + 2 * TABLE_PADDING + 3,
        start=first * spacing,
        spacing=spacing,
        width=spacing,
    )


def spline_interpolation(count: int) -> Tensor:
    """The matrix (count, count), float64, that turns values at the knots into coefficients of cubic B-splines.

    The values at the first and the last knot are ignored: the curvature is zero there instead.
    """
    collocation = torch.zeros(count, count, dtype=torch.float64)
    inner = torch.arange(1, count - 1)
    collocation[inner, inner - 1] = collocation[inner, inner + 1] = 1 / 6
    collocation[inner, inner] = 4 / 6
    for end, near, next_ in ((0, 1, 2), (count - 1, count - 2, count - 3)):
        collocation[end, end], collocation[end, near], collocation[end, next_] = 1.0, -2.0, 1.0
    inverse = torch.linalg.inv(collocation)
    inverse[:, [0, -1]] = 0.0
    return inverse


def spline_coefficients(values: Tensor) -> Tensor:
    """Values (K,C) at the knots -> coefficients (K,C) of the cubic B-splines that take them, for every column alike.

    A product with `spline_interpolation` at the cost of a few of its diagonals: away from the ends, coefficient k is
    sqrt(3) sum_n (sqrt(3) - 2)^|n| value_(k+n) (Unser 1993), which is below rounding at |n| > REACH. Values beyond the
    ends count as zero, which TABLE_PADDING keeps away from all lengths. Differentiable any number of times.
    """
    result: Tensor = _Coefficients.apply(values)  # type: ignore[no-untyped-call]
    return result


REACH = {torch.float32: 14, torch.float64: 29}
"""Beyond it the weights sum to 1e-8 and 3e-17."""


class _Coefficients(Function):
    """The matrix is symmetric: the gradient is the same filter."""

    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        rows, columns = values.shape
        reach = REACH[values.dtype]
        block = 2 * reach  # coefficients that are computed together, from as many values more
        blocks = -(-rows // block)
        padded = functional.pad(values, (0, 0, reach, blocks * block - rows + reach))
        windows = padded.as_strided((blocks, block + 2 * reach, columns), (block * columns, columns, 1))
        place = torch.arange(block + 2 * reach, dtype=values.dtype, device=values.device)
        steps = place - reach - place[:block, None]
        root = 3**0.5
        weights = root * (2 - root) ** steps.abs() * (1 - 2 * (steps.abs() % 2))
        return (weights @ windows).reshape(-1, columns)[:rows].contiguous()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _Coefficients.apply(*gradients)  # type: ignore[no-untyped-call]
