"""Exponential-normal radial functions (Unke & Meuwly 2019) with trained means and widths, on edges or in a table."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.models.radial import cosine_cutoff, envelope_of, spline_basis, spline_coefficients
from dpt_hpc.ops import RadialTaps, expnorm_taps, spline_taps

LINEAR_PART = 0.2
"""Share of d / cutoff in the table's coordinate, beside 1 - exp(-alpha d), which alone is too coarse at the cutoff."""

Activation = Literal["identity", "silu"]


@dataclass(frozen=True)
class EdgeGeometry:
    """What all layers read of the edges; made once per step.

    taps: the radial functions, or splines, that are not zero on an edge · envelope (E,): cosine cutoff · directions
    (E,3): unit vectors from target to source · values (K,R): the radial functions at the knots of the table; None
    without one.
    """

    taps: RadialTaps
    envelope: Tensor
    directions: Tensor
    values: Tensor | None = None

    def filters(self, weight: Tensor, bias: Tensor, activation: Activation) -> tuple[Tensor, Tensor | None, Activation]:
        """`filter_weights`, `filter_bias` and `activation` of the filters activation(functions @ weight.t() + bias) of
        the radial functions: weight (C,K), bias (C,)."""
        if self.values is None:
            return weight.t(), bias, activation
        at_knots = functional.linear(self.values, weight, bias)
        if activation == "silu":
            at_knots = functional.silu(at_knots)
        return spline_coefficients(at_knots), None, "identity"


class ExpNormal(nn.Module):
    """cutoff(d) exp(-beta_k (exp(-alpha d) - mean_k)^2), alpha = 5 / cutoff, with the cosine cutoff.

    With `knots`, filters are tabulated on that many intervals of xi(d) = 1 - exp(-alpha d) + LINEAR_PART d / cutoff:
    the functions are sharp where two atoms are close, and wide where they are far apart. For random weights, SiLU
    included, 512 intervals leave 3e-7 of the largest value and 3e-5 of the largest slope, where uniform intervals of
    d would need four times as many.
    """

    knots: Tensor | None

    def __init__(self, count: int, cutoff: float, knots: int | None) -> None:
        super().__init__()
        self.cutoff, self.alpha = cutoff, 5.0 / cutoff
        first = math.exp(-cutoff)  # as published: without alpha, so a little below all that exp(-alpha d) reaches
        self.means = nn.Parameter(torch.linspace(first, 1.0, count))
        self.betas = nn.Parameter(torch.full((count,), (2 / count * (1 - first)) ** -2))
        self.splines = None
        at = None
        if knots is not None:
            self.splines = spline_basis(float(self._coordinate(torch.tensor(cutoff, dtype=torch.float64))), knots)
            index = torch.arange(self.splines.count, dtype=torch.float64)
            at = self._length(self.splines.start + index * self.splines.spacing)
        # In float64 until the model is cast, so that a float64 model has the whole precision.
        self.register_buffer("knots", at, persistent=False)

    def forward(self, edge_vectors: Tensor) -> EdgeGeometry:
        """edge_vectors (E,3) Å; the radius graph has none of length zero."""
        lengths = torch.linalg.vector_norm(edge_vectors, dim=1)
        directions = edge_vectors / lengths[:, None]
        envelope = envelope_of("cosine", lengths, self.cutoff)
        if self.splines is None or self.knots is None:
            taps = expnorm_taps(lengths, self.means, self.betas, self.alpha, envelope)
            return EdgeGeometry(taps, envelope, directions)
        taps = spline_taps(self._coordinate(lengths), self.splines)
        # Beyond the cutoff the table goes on smoothly: the clamped cosine would bend the last spline.
        knots = self.knots.to(self.means.dtype)
        decay = torch.exp(-self.alpha * knots)[:, None] - self.means
        values = cosine_cutoff(knots, self.cutoff)[:, None] * torch.exp(-self.betas * decay * decay)
        return EdgeGeometry(taps, envelope, directions, values)

    def _coordinate(self, lengths: Tensor) -> Tensor:
        return 1 - torch.exp(-self.alpha * lengths) + (LINEAR_PART / self.cutoff) * lengths

    def _length(self, coordinate: Tensor) -> Tensor:
        """The inverse, by Newton's method: xi is concave, so it climbs from the left without overshooting."""
        lengths = coordinate / (self.alpha + LINEAR_PART / self.cutoff)
        for _ in range(100):
            slope = self.alpha * torch.exp(-self.alpha * lengths) + LINEAR_PART / self.cutoff
            lengths = lengths + (coordinate - self._coordinate(lengths)) / slope
        return lengths
