"""Radial bases: the functions of an edge length that filters are made of."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor


@dataclass(frozen=True)
class RadialBasis:
    """`count` functions phi_k of a length d, k = 0, 1, ...

    gaussian: exp(-0.5 ((d - centre_k) / width)^2), centre_k = start + k * spacing.
    bspline: the uniform cubic B-spline centred on the knot start + k * spacing, zero beyond two spacings; between two
    knots four of them are not zero, and they sum to one.

    start, spacing, width in Å. Errors: ValueError for a count below 4 or a spacing or width that is not positive.
    """

    kind: Literal["gaussian", "bspline"]
    count: int
    start: float
    spacing: float
    width: float

    def __post_init__(self) -> None:
        if self.kind not in ("gaussian", "bspline"):
            raise ValueError(f"RadialBasis: kind: expected gaussian or bspline, got {self.kind!r}.")
        if self.count < 4:
            raise ValueError(f"RadialBasis: count: expected at least 4 functions, got {self.count}.")
        for name, value in (("spacing", self.spacing), ("width", self.width)):
            if not value > 0:
                raise ValueError(f"RadialBasis: {name}: expected a positive length in Å, got {value}.")

    def __call__(self, lengths: Tensor) -> Tensor:
        """(E,) Å -> (E, count), in plain PyTorch and differentiable twice: for tables and the reference backend."""
        index = torch.arange(self.count, dtype=lengths.dtype, device=lengths.device)
        if self.kind == "gaussian":
            x = (lengths[:, None] - (self.start + index * self.spacing)) / self.width
            return torch.exp(-0.5 * x * x)
        # Distance from the left end of the support, mirrored at its middle: no |x|, whose second derivative autograd
        # takes as zero at x = 0.
        x = (lengths[:, None] - self.start) / self.spacing - index + 2
        x = torch.where(x > 2, 4 - x, x).clamp(min=0)
        return (x**3 - 4 * (x - 1).clamp(min=0) ** 3) / 6
