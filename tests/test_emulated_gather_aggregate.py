"""The CUDA kernels of the general pair, emulated: the bits of the CPU kernels."""

from __future__ import annotations

import importlib
from types import ModuleType

import pytest
import torch
from test_gather_aggregate import GRAPHS, gather_inputs, normal
from torch import Tensor

from dpt_hpc.ops import RadiusGraph

module = importlib.import_module("dpt_hpc.ops.gather_aggregate")  # the function has its name


def everything(ends: object, graph: RadiusGraph, channels: int, shared: bool, dtype: torch.dtype) -> list[Tensor]:
    w, x = gather_inputs(graph, channels, shared, dtype)
    y = module._gather(w, x, ends)
    first = torch.autograd.grad((y * y.detach()).sum(), (w, x), create_graph=True)
    second = torch.autograd.grad(sum((g * g.detach()).sum() for g in first), (w, x))
    p = module._product(x, normal(*x.shape, seed=5, dtype=dtype), ends, shared)
    return [t.detach() for t in (y, *first, *second, p)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("channels", [3, 8])
def test_same_bits_as_on_the_cpu(emulated: ModuleType, channels: int, shared: bool, dtype: torch.dtype) -> None:
    for name in ("mixed batch", "isolated atom", "no edges", "no atoms", "nearest 5, asymmetric"):
        graph = GRAPHS[name]()
        expected = everything(module._Ends(graph), graph, channels, shared, dtype)
        found = everything(module._Ends(graph, kernels=emulated), graph, channels, shared, dtype)
        for value, right in zip(found, expected, strict=True):
            assert torch.equal(value, right), name


def test_more_channels_than_lanes(emulated: ModuleType) -> None:
    graph = GRAPHS["mixed batch"]()
    for shared in (False, True):
        expected = everything(module._Ends(graph), graph, 70, shared, torch.float32)
        found = everything(module._Ends(graph, kernels=emulated), graph, 70, shared, torch.float32)
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
