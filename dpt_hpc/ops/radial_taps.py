"""Windows of radial functions: the few values of a basis that an edge's filters are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from dpt_hpc.ops.kept import kept
from dpt_hpc.ops.radial_basis import RadialBasis

NEGLIGIBLE = {torch.float32: 1e-9, torch.float64: 1e-17}
"""A radial function is taken as zero where it is below this part of its peak."""


@dataclass(frozen=True)
class RadialTaps:
    """Of K radial functions, those that are not zero on each edge: a window of M neighbours in their numbering.

    values (E,M): function first + m at edge e, zero where the edge has fewer than M · first (E,) int32, 0 <= first <=
    count - M (the ops check it on a CPU; on a GPU they would have to wait) · count: K · trainable: whether parameters
    stand behind the values; where none do, the kernels skip the values' gradient after `inner_derivative`.
    """

    values: Tensor
    first: Tensor
    count: int
    trainable: bool = True

    @property
    def by_first(self) -> tuple[Tensor, Tensor]:
        """(order (E,) int64, ptr (K+1,) int64): order[ptr[k]:ptr[k+1]] are the edges with first = k, ascending."""
        return kept(self, "by_first", self.first, self._by_first)

    def _by_first(self) -> tuple[Tensor, Tensor]:
        first, order = torch.sort(self.first, stable=True)
        borders = torch.arange(self.count + 1, dtype=torch.int32, device=first.device)
        return order, torch.searchsorted(first, borders)

    def dense(self) -> Tensor:
        """(E,K): the values in their columns, zeros elsewhere; differentiable."""
        columns = self.first.long()[:, None] + torch.arange(self.values.shape[1], device=self.first.device)
        return self.values.new_zeros(self.values.shape[0], self.count).scatter(1, columns, self.values)


def spline_taps(lengths: Tensor, basis: RadialBasis) -> RadialTaps:
    """The four B-splines that reach each length (de Boor 1978): M = 4.

    lengths (E,), in the units of the basis; differentiable twice. Beyond the table all values are zero. Errors:
    ValueError for a basis that is not of B-splines.
    """
    if basis.kind != "bspline":
        raise ValueError(f"spline_taps: basis: expected B-splines, got {basis.kind}.")
    x = (lengths - basis.start) / basis.spacing
    knot = x.detach().nan_to_num(nan=0.0).clamp(min=0.0, max=float(basis.count)).floor()
    first = (knot - 1).clamp(min=0, max=basis.count - 4)
    step = torch.arange(4, dtype=lengths.dtype, device=lengths.device)
    # As in RadialBasis: distance from the left end of the support, mirrored at its middle.
    x = x[:, None] - (first[:, None] + step) + 2
    x = torch.where(x > 2, 4 - x, x).clamp(min=0)
    values = (x**3 - 4 * (x - 1).clamp(min=0) ** 3) / 6
    return RadialTaps(values, first.to(torch.int32), basis.count, trainable=False)


@torch.compiler.disable  # type: ignore[untyped-decorator]
def expnorm_taps(
    lengths: Tensor, means: Tensor, betas: Tensor, alpha: float, envelope: Tensor | None = None
) -> RadialTaps:
    """Exponential-normal functions envelope * exp(-beta_k (exp(-alpha d) - mean_k)^2) (Unke & Meuwly 2019, eq. 7).

    lengths (E,) Å · means, betas (K,), trained or not, in any order · alpha 1/Å · envelope (E,) -> windows as wide as
    the longest run of functions from the first to the last that is not negligible on some edge. Differentiable twice in
    lengths, means, betas and envelope. The width of the window is read back from the device, and under torch.compile
    this is a graph break. Errors: ValueError for shapes.
    """
    count = means.shape[0] if means.ndim == 1 else 0
    if count == 0 or tuple(betas.shape) != (count,):
        raise ValueError(
            f"expnorm_taps: means, betas: expected (K,) and (K,), got {tuple(means.shape)} and {tuple(betas.shape)}."
        )
    x = torch.exp(-alpha * lengths)
    with torch.no_grad():
        depth = -math.log(NEGLIGIBLE[lengths.dtype])
        reach = torch.where(betas > 0, (depth / betas).sqrt(), torch.inf)
        inside = (~((x[:, None] - means).abs() > reach)).to(torch.uint8)  # NaN is inside
        first = inside.argmax(1)
        width = torch.where(inside.bool().any(1), count - inside.flip(1).argmax(1) - first, 1)
        widest = int(width.max()) if width.numel() else 1
        first = first.clamp(max=count - widest)
        columns = first[:, None] + torch.arange(widest, device=first.device)
        inside = inside.gather(1, columns).bool()
    flat = columns.flatten()
    mean, beta = (p.index_select(0, flat).view(-1, widest) for p in (means, betas))
    values = torch.exp(-beta * (x[:, None] - mean).square())
    if envelope is not None:
        values = values * envelope[:, None]
    values = torch.where(inside, values, 0.0)
    return RadialTaps(values, first.to(torch.int32), count, means.requires_grad or betas.requires_grad)
