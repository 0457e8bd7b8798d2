"""The switch between the native kernels and their plain twins."""

from __future__ import annotations

from types import ModuleType
from typing import Literal, get_args

Backend = Literal["native", "reference", "pyg"]
"""native: the kernels of dpt_hpc · reference: plain PyTorch, slow and obvious · pyg: the same with the reductions of
torch-scatter and the neighbour search of torch-cluster, on which the networks of PyTorch Geometric run."""


def plain_twins(backend: str, op: str) -> ModuleType:
    """The module whose functions have the names and the arguments of the ops, for every backend but native.

    Errors: ValueError for a name that is no backend, or for native.
    """
    from dpt_hpc.ops import pyg, reference

    modules = {"reference": reference, "pyg": pyg}
    if backend not in modules:
        raise ValueError(f"{op}: backend: expected {', '.join(get_args(Backend))}, got {backend!r}.")
    return modules[backend]
