"""The switch between the native kernels and their plain twins."""

from __future__ import annotations

from types import ModuleType
from typing import get_args

from torch import Tensor

from dpt_hpc import _C
from dpt_hpc.errors import EnvironmentFault
from dpt_hpc.network_options import Backend


def plain_twins(backend: str, op: str) -> ModuleType:
    """The module whose functions have the names and the arguments of the ops, for every backend but native.

    Errors: ValueError for a name that is no backend, or for native.
    """
    from dpt_hpc.ops import pyg, reference

    modules = {"reference": reference, "pyg": pyg}
    if backend not in modules:
        raise ValueError(f"{op}: backend: expected {', '.join(get_args(Backend))}, got {backend!r}.")
    return modules[backend]


def refuse_other_devices(op: str, tensor: Tensor) -> None:
    """Errors: EnvironmentFault for a tensor on a device that this build has no kernels for."""
    if tensor.device.type != "cpu" and not (tensor.is_cuda and _C.has_cuda):
        raise EnvironmentFault(
            f"{op}: tensors are on {tensor.device}, but this build of dpt_hpc has no kernels for it.\n"
            "Install it where nvcc is found (or with -C cmake.define.DPT_HPC_CUDA=ON), or use backend='reference'."
        )
