"""Operations on graphs: periodic radius graphs and messages along their edges.

Each has a native kernel (C++, dpt_hpc._C) and a slow plain twin in `dpt_hpc.ops.reference`, the oracle of the tests.
"""

from dpt_hpc import _C
from dpt_hpc.network_options import Backend
from dpt_hpc.ops.autograd import inner_derivative
from dpt_hpc.ops.gather_aggregate import edge_product, gather_aggregate
from dpt_hpc.ops.linear import Precision, linear
from dpt_hpc.ops.messages import cgconv
from dpt_hpc.ops.radial_basis import RadialBasis
from dpt_hpc.ops.radial_messages import radial_messages
from dpt_hpc.ops.radial_taps import RadialTaps, expnorm_taps, spline_taps
from dpt_hpc.ops.radius_graph import RadiusGraph, radius_graph

NATIVE_DEVICES = ("cpu", "cuda") if _C.has_cuda else ("cpu",)
"""Device types on which the native kernels of this build run."""

__all__ = [
    "NATIVE_DEVICES",
    "Backend",
    "Precision",
    "RadialBasis",
    "RadialTaps",
    "RadiusGraph",
    "cgconv",
    "edge_product",
    "expnorm_taps",
    "gather_aggregate",
    "inner_derivative",
    "linear",
    "radial_messages",
    "radius_graph",
    "spline_taps",
]
