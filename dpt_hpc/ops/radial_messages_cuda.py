"""The radial messages on a GPU: the orders of the edges, the workspace, and the calls of the kernels."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from dpt_hpc.ops.radial_taps import RadialTaps
from dpt_hpc.ops.radius_graph import RadiusGraph


def run(
    kernels: Any, name: str, graph: RadiusGraph, taps: RadialTaps, sizes: dict[str, int], tensors: dict[str, Tensor]
) -> None:
    """The pass `name` of `kernels` (dpt_hpc._C): forward, backward or double_backward.

    `tensors`: what the pass reads and writes, by the names of its arguments, contiguous and on one device. Everything
    is launched on the current stream of the device, and nothing waits for it.
    """
    values = tensors["values"]
    pass_ = getattr(kernels, f"cuda_radial_messages_{name}_{'float32' if values.dtype == torch.float32 else 'float64'}")
    with torch.cuda.device(values.device) if values.is_cuda else nullcontext():
        sources, targets = graph.edge_index.contiguous()
        held = {
            "target_ptr": graph.target_ptr.contiguous(),
            "source": sources,
            "target": targets,
            "first": taps.first.contiguous(),
            **tensors,
        }
        if held.keys() & {"out_keys", "out_values", "out_vectors"}:
            held["source_order"], held["source_ptr"] = graph.by_source
        if held.keys() & {"out_weights", "out_bias"}:
            held["first_order"], held["first_ptr"] = taps.by_first
            workspace = kernels.cuda_radial_messages_workspace_bytes(
                channels=sizes["channels"],
                attention=bool(sizes["attention"]),
                oriented=bool(sizes["oriented"]),
                num_edges=graph.num_edges,
                second=name == "double_backward",
                element=values.element_size(),
            )
            held["workspace"] = torch.empty(workspace, dtype=torch.uint8, device=values.device)
        pass_(
            num_atoms=graph.num_atoms,
            num_edges=graph.num_edges,
            **sizes,
            **{key: t.data_ptr() for key, t in held.items()},
            stream=torch.cuda.current_stream().cuda_stream if values.is_cuda else 0,
        )
