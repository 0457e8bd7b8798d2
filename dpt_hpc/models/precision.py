"""Mixed precision: the node-wise matrix products of a network in a narrower format, everything else as it was.

Geometry, radial functions and their tables, messages and their sums, normalisation, pooling, the last map to the
energy, weights, gradients and the optimiser stay in float32.
"""

from __future__ import annotations

from torch import Tensor, nn

from dpt_hpc.ops import Precision, linear


class NodeProducts(nn.Module):
    """A module whose node-wise matrix products run in `precision`."""

    precision: Precision = "float32"


class Linear(NodeProducts, nn.Linear):
    """nn.Linear, its product in `precision`."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias, self.precision)


def set_precision(network: nn.Module, precision: Precision) -> None:
    """Let all node-wise matrix products of `network` run in `precision`, from now on and in every derivative."""
    for module in network.modules():
        if isinstance(module, NodeProducts):
            module.precision = precision
