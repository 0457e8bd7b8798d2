"""From the scalars of the atoms to one number per structure, for every network alike."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dpt_hpc.network_options import Pooling


def read_out(x: Tensor, atom_ptr: Tensor, pooling: Pooling, hidden: Iterable[nn.Module], output: nn.Module) -> Tensor:
    """Pool x (N,C) over the atoms of each structure, then (Linear, SiLU) for each of `hidden`, then `output` -> (B,).

    A structure without atoms pools to zero.
    """
    counts = atom_ptr.diff()
    structure = torch.repeat_interleave(torch.arange(len(counts), device=x.device), counts, output_size=x.shape[0])
    pooled = torch.zeros(len(counts), x.shape[1], dtype=x.dtype, device=x.device).index_add(0, structure, x)
    if pooling == "mean":
        pooled = pooled / counts.clamp(min=1)[:, None].to(x.dtype)
    for layer in hidden:
        pooled = functional.silu(layer(pooled))
    energy: Tensor = output(pooled)
    return energy[:, 0]
